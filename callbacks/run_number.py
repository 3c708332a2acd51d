"""Tells apart the runs that leave checkpoints in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_modules.latest import RUN, next_run_number


class RunNumber(lightning.Callback):
    """Numbers the runs of a folder of checkpoints, so that `--ckpt_path latest` finds the newest run's.

    A run that starts anew gets a number of its own; one that goes on keeps that of its checkpoint.

    Attributes:
        number: The run's number; 0 before training starts.
    """

    def __init__(self) -> None:
        self.number = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the next number, unless a checkpoint brought one."""
        if self.number == 0:  # rank 0 decides: on a shared disk others may see less
            savers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
            folders = [Path(one.dirpath) for one in savers if one.dirpath and "://" not in str(one.dirpath)]
            mine = next_run_number(folders) if trainer.is_global_zero else 0
            self.number = trainer.strategy.broadcast(mine)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the number down."""
        checkpoint[RUN] = self.number

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the number of the run that goes on."""
        self.number = int(checkpoint.get(RUN, 0))
