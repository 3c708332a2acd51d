"""Folder in, file out: a checkpoint that many ranks wrote, as one file."""

from __future__ import annotations

from pathlib import Path

from lightning_modules.checkpoint_io import CompleteCheckpointIO
from lightning_modules.sharded_files import is_sharded_checkpoint, read_sharded, whole_tensors


def consolidate_checkpoint(folder: str, output: str) -> None:
    """Write a checkpoint folder as one file, which `load_from_checkpoint` takes too.

    Args:
        folder: A checkpoint folder.
        output: The file to make; must not exist.

    Raises:
        ValueError: If `folder` is no checkpoint folder or damaged, or `output` exists.
    """
    source, target = Path(folder), Path(output)
    if not is_sharded_checkpoint(source):
        raise ValueError(
            f"folder={folder!r} is no checkpoint folder: it has no manifest. A file needs no consolidation."
        )
    if target.exists():
        raise ValueError(f"output={output!r} exists already. Give a new name, or remove that one.")
    CompleteCheckpointIO().save_checkpoint(whole_tensors(read_sharded(source)), target)
    print(f"Wrote {target}")  # noqa: T201
