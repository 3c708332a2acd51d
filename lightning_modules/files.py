"""Files that appear complete or not at all, and never replace what an earlier run left."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# What `safe_open` raises for a file that is broken, or missing, or was removed while it was being opened: torch opens
# it a second time, with an error of its own.
UNREADABLE = (SafetensorError, OSError, RuntimeError)


def sync(path: Path) -> None:
    """Bring a file or folder to the disk, so that it survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# A disk that is full, a quota, a limit of file size, a disk that has become read-only or fails.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


@contextmanager
def naming(target: Path) -> Iterator[None]:
    """Name a file in errors of the disk; those of `write` name none, and safetensors and torch raise their own.

    Args:
        target: What is written in the block.

    Raises:
        OSError: With `errno` and `filename`.
    """
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if said := re.search(r"os error (\d+)", str(error)):  # safetensors
            code = int(said[1])
        elif isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):  # does not say why
            code = errno.ENOSPC if shutil.disk_usage(target.parent).free < 1 << 20 else errno.EIO
        if code not in DISK_ERRORS or (isinstance(error, OSError) and error.filename == str(target)):
            raise
        raise OSError(code, os.strerror(code), str(target)) from error


@contextmanager
def complete_folder(target: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place when the block succeeds.

    A block that raises leaves nothing behind.

    Args:
        target: The folder to appear. Its parents are made.
        shared: Other processes may make the same folder with the same content; the first one's stays. Else an
            existing folder of this name is set aside.

    Yields:
        The folder to write into.

    Raises:
        OSError: If no folder can be made there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise OSError(f"{target} cannot be made: {error}. Name a folder that can be written.") from None
    try:
        with naming(target):
            yield aside
            mask = os.umask(0)
            os.umask(mask)
            for file in (aside, *aside.rglob("*")):
                # mkdtemp and safetensors make what they write private, whatever the user's mask says.
                file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)
                sync(file)
        if not shared:
            set_aside(target)
        try:
            aside.rename(target)
        except OSError:
            if not (shared and target.is_dir()):
                raise
        sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def complete_file(target: Path) -> Iterator[Path]:
    """Yield a file name beside `target` that takes its place when the block succeeds.

    Args:
        target: The file to appear or to be replaced. Its parents are made.

    Yields:
        The name to write to; it ends like `target`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        with naming(target):
            yield aside
            sync(aside)
            aside.replace(target)
            sync(target.parent)
    finally:
        aside.unlink(missing_ok=True)


def set_aside(path: Path) -> Path | None:
    """Rename what an earlier run left at `path`, so that this run writes to a free name.

    `metrics.csv` becomes `metrics.1.csv`, the next one `metrics.2.csv`, and so on.

    Args:
        path: A file or folder that is about to be written.

    Returns:
        The new name of the earlier one, or None where there was none.
    """
    if not path.exists():
        return None
    number = 1
    suffix = "" if path.is_dir() else path.suffix  # a folder's name may hold a dot: adapter-v1.5
    stem = path.name.removesuffix(suffix)
    while (earlier := path.with_name(f"{stem}.{number}{suffix}")).exists():
        number += 1
    path.rename(earlier)
    return earlier
