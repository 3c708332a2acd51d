"""One run, one folder: a folder is taken for the time of a run, if it can be written and nobody uses it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NAME = ".quiver.lock"
_ROOM = 1 << 20  # bytes that must be free: less is a disk that the first checkpoint fills


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Take a folder for the time of the block.

    The lock is the operating system's and ends with the process, however that ends. Folders that had to be made
    are removed again if they stay empty.

    Args:
        folder: Where a run writes.

    Raises:
        ValueError: If another process has it.
        OSError: If it cannot be made or written, or its disk is full.
    """
    folder = folder.resolve()
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    lock = folder / _NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(lock)
    except OSError as error:
        _remove_empty(missing)
        raise _unwritable(folder, error) from None
    try:
        try:
            _sign(descriptor)
        except OSError as error:
            raise _unwritable(folder, error) from None
        yield
    finally:
        with suppress(OSError):  # a disk that has become read-only, say
            lock.unlink(missing_ok=True)
        os.close(descriptor)
        _remove_empty(missing)


def _locked(lock: Path) -> int:
    """Open and lock a file; return its descriptor."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            raise ValueError(
                f"The run folder {lock.parent} is in use by {owner}. Wait for that run or stop it, or give this "
                "one folders of its own (trainer.default_root_dir, save_dir of the loggers, dirpath of "
                "ModelCheckpoint)."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                os.close(descriptor)
                raise
            return descriptor  # a file system without locks; nothing tells two runs apart there
        # Its last owner may have removed the file between our opening and our locking it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        os.close(descriptor)


def _sign(descriptor: int) -> None:
    """Write who we are, after checking that there is room on the disk."""
    if os.pwrite(descriptor, b" " * _ROOM, 0) < _ROOM:  # as much as fits, without an error
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(descriptor)
    os.ftruncate(descriptor, 0)
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    owner = {"process": os.getpid(), "host": socket.gethostname(), "command": command[:200]}
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {owner['process']} on {owner['host']} ({owner['command']})"
    except (ValueError, KeyError):  # it is about to write
        return "another process"


def _unwritable(folder: Path, error: OSError) -> OSError:
    if error.errno == errno.ELOOP:
        return OSError(
            f"{folder / _NAME} is a link, and a run writes into that file. Remove the link, or name another folder."
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OSError(
            f"The run folder {folder} has less than 1 MiB of free space ({error.strerror}). Free some, or give "
            "the run a folder on another disk (trainer.default_root_dir, save_dir of the loggers, dirpath of "
            "ModelCheckpoint)."
        )
    return OSError(
        f"The run folder {folder} cannot be written: {error.strerror or error}. Name one that can "
        "(trainer.default_root_dir, save_dir of the loggers, dirpath of ModelCheckpoint)."
    )


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, as far as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
