"""Checksums beside the files of a folder, so that damage is noticed and never trained on, merged or served.

`SHA256SUMS` has the format of `sha256sum`, which checks it too: `sha256sum -c SHA256SUMS`. PEFT and transformers do not
mind the file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

SUMS = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\]+)")


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Write the checksums of a folder's files; not those of model cards, which people edit.

    Args:
        folder: An adapter or a model that is complete.
    """
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and file.suffix != ".md")
    lines = [f"{checksum(folder / name)}  {name}\n" for name in names if name != SUMS]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_checksums(folder: Path, names: Iterable[str]) -> None:
    """Check files against the checksums of their folder. A folder without checksums is taken as it is.

    Args:
        folder: An adapter or a model.
        names: The files that will be read.

    Raises:
        ValueError: If a file has changed, or the checksums are damaged or do not know it.
    """
    sums = folder / SUMS
    if not sums.exists():
        return
    known = _read(sums)
    for name in names:
        path = folder / name
        if not path.is_file():
            continue  # its reader says what is missing
        if name not in known:
            raise ValueError(f"{sums} does not know {name}. {_remedy(sums)}")
        if checksum(path) != known[name]:
            raise ValueError(f"{path} is damaged: it has changed since it was written. {_remedy(sums)}")


def _read(sums: Path) -> dict[str, str]:
    try:
        lines = sums.read_bytes().decode("ascii").splitlines()
    except UnicodeDecodeError:
        lines = [""]
    found = [_LINE.fullmatch(line) for line in lines]
    if not found or not all(found):
        raise ValueError(f"{sums} is damaged: a line is no checksum. {_remedy(sums)}")
    return {line[2]: line[1] for line in found if line}


def _remedy(sums: Path) -> str:
    return f"Copy the folder again; if you changed it on purpose, delete {sums.name}."
