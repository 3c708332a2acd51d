"""Checkpoints that are complete or invisible."""

from __future__ import annotations

import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_modules.files import complete_file
from lightning_modules.sealed import is_intact, seal
from lightning_modules.sharded_files import (
    is_sharded_checkpoint,
    previous_name,
    read_sharded,
)

# Errors of torch for files that are damaged, or no checkpoint of its own.
UNREADABLE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    struct.error,
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,
)


class CompleteCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, brings it to the disk, and renames it; reads files and folders.

    A run that is killed at any instant leaves the earlier checkpoint or the new one. Reading verifies a checksum of
    the whole file. Nothing but tensors and plain data is read from a checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write one file.

        Raises:
            OSError: If it cannot be written; an earlier one of this name is as it was.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            for stale in target.parent.glob(f".*-{target.name}"):  # of a run that was killed while it wrote
                stale.unlink(missing_ok=True)
            earlier = target.with_name(previous_name(target.name)) if is_sharded_checkpoint(target) else None
            with complete_file(target) as aside:
                torch.save(checkpoint, aside)
                seal(aside)
                if earlier is not None:  # a file cannot take the place of a folder at once
                    target.rename(earlier)
            if earlier is not None:
                shutil.rmtree(earlier)
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
            raise OSError(
                f"The checkpoint {target} cannot be written ({error}). Earlier checkpoints are as they were. Free "
                "some space or name another folder, and go on from the latest one: --ckpt_path latest."
            ) from None

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file, or a folder whose tensors are read when they are used.

        Raises:
            ValueError: If it is damaged, or no checkpoint.
            FileNotFoundError: If it does not exist.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only is not False)
        place = Path(path)
        if is_sharded_checkpoint(place):
            return read_sharded(place)
        if not place.exists():
            raise FileNotFoundError(
                f"There is no checkpoint {place}. --ckpt_path latest takes the newest one of the run."
            )
        if place.is_dir():
            raise ValueError(
                f"{place} is a folder without a checkpoint. Name a file, or a folder with a manifest."
            )
        try:
            if is_intact(place) is False:
                raise ValueError("it is not what was written")
            loaded = torch.load(place, map_location="cpu", weights_only=weights_only is not False)
        except (OSError, *UNREADABLE) as error:  # torch seeks before the start of a file that was cut
            raise ValueError(
                f"The checkpoint {place} is damaged, or holds more than tensors and plain data "
                f"({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}). Go on from an "
                "earlier one."
            ) from None
        if not isinstance(loaded, dict) or "global_step" not in loaded:
            raise ValueError(f"{place} is no checkpoint of a run: it has no global_step.")
        return loaded


class AsyncCompleteCheckpointIO(AsyncCheckpointIO):
    """Writes checkpoints in a thread while training goes on; files only.

    Deviation from Lightning's: an earlier checkpoint is removed when the new one is complete, not before.
    """

    def __init__(self) -> None:
        super().__init__(CompleteCheckpointIO())

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint after what was asked for before is written, unless that failed."""
        self._ensure_setup()
        assert self._executor is not None
        self._executor.submit(self._remove, path)

    def wait(self) -> None:
        """Return when what was asked for before is written.

        Raises:
            OSError: If it could not be written.
        """
        if self._executor is not None:
            self._executor.submit(lambda: None).result()  # one thread, so in order
        if self._error is not None:
            raise self._error

    def _remove(self, path: Any) -> None:
        assert self.checkpoint_io is not None
        if self._error is None:
            self.checkpoint_io.remove_checkpoint(path)
