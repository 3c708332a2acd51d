"""A checksum inside a zip file, as its comment: torch reads past it, and does not check those of the entries."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

_END = b"PK\x05\x06"  # the last record of a zip file, 22 bytes long; its last two say how long the comment is
_MARK = b"quiver sha256 "
_COMMENT = len(_MARK) + 64


def seal(path: Path) -> None:
    """Append a checksum of everything else to a zip file without comment."""
    with path.open("r+b") as file:
        file.seek(-22, 2)
        assert file.read(4) == _END
        file.seek(-2, 2)
        file.write(struct.pack("<H", _COMMENT))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, 2)
        file.write(_MARK + digest.encode())


def is_intact(path: Path) -> bool | None:
    """Return whether a zip file is as it was sealed; None if it never was."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < _COMMENT + 22:
            return None
        file.seek(size - _COMMENT)
        comment = file.read()
        if not comment.startswith(_MARK):
            return None
        file.seek(0)
        digest, left = hashlib.sha256(), size - _COMMENT
        while left:
            block = file.read(min(left, 1 << 20))
            digest.update(block)
            left -= len(block)
    return comment[len(_MARK) :] == digest.hexdigest().encode()
