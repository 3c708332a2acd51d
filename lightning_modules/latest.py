"""The checkpoint from which a run goes on: the furthest one of the newest run in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.checkpoint_io import UNREADABLE
from lightning_modules.sealed import is_intact
from lightning_modules.sharded_files import META, check_parts, is_sharded_checkpoint, read_sharded

RUN = "run_number"
"""Key of a checkpoint under which the number of its run stands."""


class _Order(NamedTuple):
    """How far a checkpoint is; a later run comes first, then training progress, then the file's time.

    The time decides alone where checkpoints have no number, as those of a Trainer without RunNumber.
    """

    run: int
    steps: int
    batches: int
    epochs: int
    written_ns: int
    name: str


def latest_checkpoint(folders: Iterable[Path]) -> Path | None:
    """Return the checkpoint from which the newest run goes on.

    Order comes from inside the checkpoints, for clocks jump and files are copied.

    Args:
        folders: Where to look; those that do not exist are left out.

    Returns:
        A file or folder `*.ckpt`, or None where there is none. Damaged ones are named in a warning and passed over.
    """
    ordered = sorted(((_order(place, head), place) for place, head in _heads(folders)), reverse=True)
    for _, place in ordered:
        if _is_whole(place):
            return place
        _pass_over(place)
    return None


def next_run_number(folders: Iterable[Path]) -> int:
    """Return a number greater than those of all runs that left checkpoints in `folders`."""
    return 1 + max((_number(head) for _, head in _heads(folders)), default=0)


def _heads(folders: Iterable[Path]) -> list[tuple[Path, Mapping[str, Any]]]:
    """Read what checkpoints say of themselves, without their tensors."""
    found = []
    for place in sorted({place for folder in folders if folder.is_dir() for place in folder.glob("*.ckpt")}):
        if place.name.startswith(".") or not place.exists():
            continue
        try:
            file = place / META if place.is_dir() else place
            head = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            head["global_step"]
        except (OSError, *UNREADABLE):
            _pass_over(place)
        else:
            found.append((place, head))
    return found


def _number(head: Mapping[str, Any]) -> int:
    number = head.get(RUN, 0)
    return number if isinstance(number, int) else 0


def _order(place: Path, head: Mapping[str, Any]) -> _Order:
    number = _number(head)
    steps = batches = epochs = 0
    if number:
        steps = int(head["global_step"])
        loop = head.get("loops", {}).get("fit_loop", {})
        batches = loop.get("epoch_loop.batch_progress", {}).get("total", {}).get("completed", 0)
        epochs = loop.get("epoch_progress", {}).get("total", {}).get("processed", 0)
    return _Order(number, steps, batches, epochs, place.stat().st_mtime_ns, place.name)


def _is_whole(place: Path) -> bool:
    """Check all bytes of a checkpoint."""
    try:
        if is_sharded_checkpoint(place):
            check_parts(read_sharded(place))
            return True
        return is_intact(place) is not False
    except (OSError, *UNREADABLE):
        return False


def _pass_over(place: Path) -> None:
    rank_zero_warn(f"{place} is no complete checkpoint and is passed over.")
