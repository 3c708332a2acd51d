"""Stops a run on Ctrl-C or SIGTERM at the next step border, with a checkpoint that resumes exactly."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop(lightning.Callback):
    """Finishes the running step, saves a checkpoint, and stops. A second signal stops at once.

    Lightning's own handlers stop within a step, and with several processes they can hang. Here all ranks
    agree after each step whether one of them was told to stop.

    Args:
        filename: Name of the checkpoint in the folder of the run's checkpoints.
    """

    def __init__(self, filename: str = "interrupted.ckpt") -> None:
        self.filename = filename
        self.stopped = False
        self._asked = False
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take over the signals, after Lightning has set its own handlers."""
        self._previous = {number: signal.signal(number, self._ask) for number in _SIGNALS}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            self._give_back()
            raise KeyboardInterrupt
        self._asked = True
        name = signal.Signals(number).name
        sys.stderr.write(
            f"\n{name}: finishing this step, then saving a checkpoint. Once more stops at once.\n"
        )

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        *args: Any,
    ) -> None:
        """Save and stop where any rank was asked to."""
        asked = trainer.strategy.reduce(
            torch.tensor(float(self._asked), device=trainer.strategy.root_device), reduce_op="sum"
        )
        if not asked or self.stopped:
            return
        # A stop makes Lightning validate. Where that is not due now it would only delay the stop; where it
        # is due it must run, because a resumed run counts it as done.
        fit_loop = trainer.fit_loop
        assert fit_loop._data_fetcher is not None
        if not fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher):
            trainer.limit_val_batches = 0
        self.stopped = True
        trainer.should_stop = True
        # Here and not at the end of training, where Lightning's loops count the epoch as finished.
        folder = self._checkpoint_folder(trainer)
        trainer.save_checkpoint(folder / self.filename)
        if trainer.is_global_zero:
            sys.stderr.write(f"Stopped after a full step. Go on with: --ckpt_path {folder / self.filename}\n")

    @staticmethod
    def _checkpoint_folder(trainer: lightning.Trainer) -> Path:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath:
                return Path(callback.dirpath)
        return Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
