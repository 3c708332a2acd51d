"""Stops a run on Ctrl-C, SIGTERM or a SLURM signal, with a checkpoint that resumes exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_modules.distributed import gathered, rng_state, set_rng_state

_REPEAT = 1.0  # seconds within which a launcher may repeat the terminal's Ctrl-C


class StoppedError(Exception):
    """The run was told to stop while it validated, and has saved its checkpoint."""


class StoppedAtOnceError(KeyboardInterrupt):
    """The run was told to stop while it had nothing to save, or was told twice."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class GracefulStop(lightning.Callback):
    """Finishes the running step or validation batch, saves a checkpoint, and stops.

    A second Ctrl-C stops at once; so does any signal before the first step. Lightning's own handlers stop within a
    step, and with several processes they can hang. Here all ranks agree after each step and each batch of a
    validation whether one of them was told to stop. A validation that was cut short is repeated on resume.

    Args:
        filename: Name of the checkpoint in the folder of the run's checkpoints.
        requeue_on: Signals after which a SLURM job is put back into the queue: SIGUSR1, which `sbatch --signal`
            sends before the time limit, and SIGTERM, which comes with a preemption, but with `scancel` too.

    Attributes:
        stopped: Whether the run was stopped.
        number: The signal that did it.
    """

    def __init__(
        self,
        filename: str = "interrupted.ckpt",
        requeue_on: Sequence[Literal["SIGUSR1", "SIGTERM"]] = (),
    ) -> None:
        self.filename = filename
        self.requeue_on = tuple(requeue_on)
        self.stopped = False
        self.number = 0
        self._asked = 0
        self._asked_at = 0.0
        self._has_trained = False
        self._validation: tuple[dict[str, Any], int] | None = None
        self._previous: dict[int, Any] = {}

    # ------------------------------------------------------------------ signals

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Take over the signals for a training run, from Lightning too."""
        if stage != "fit":
            return
        self.stopped, self.number, self._asked, self._has_trained = False, 0, 0, False
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        numbers = [signal.SIGINT, signal.SIGTERM]
        if "SLURM_JOB_ID" in os.environ:
            numbers.append(signal.SIGUSR1)
        self._previous = {number: signal.signal(number, self._ask) for number in numbers}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """From here on there is something to save."""
        self._has_trained = True

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self._has_trained:
            raise StoppedAtOnceError(number)
        if not self._asked:
            self._asked, self._asked_at = number, time.monotonic()
            once_more = " Once more stops at once." if number == signal.SIGINT else ""
            sys.stderr.write(
                f"\n{signal.Signals(number).name}: finishing this step, then saving a checkpoint.{once_more}\n"
            )
        elif number == signal.SIGINT and time.monotonic() - self._asked_at > _REPEAT:
            raise StoppedAtOnceError(number)

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _agreed(self, trainer: lightning.Trainer) -> int:
        """The signal that any rank got, the same on every rank; 0 if none. A collective."""
        mine = torch.tensor(float(self._asked), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(mine, reduce_op="max"))  # type: ignore[arg-type]

    # ------------------------------------------------------------------ training

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        *args: Any,
    ) -> None:
        """Save and stop where any rank was asked to."""
        asked = self._agreed(trainer)
        if not asked or self.stopped:
            return
        self.stopped, self.number = True, asked
        # A stop makes Lightning validate. Where that is not due now it would only delay the stop; where it is due,
        # a resumed run counts it as done, so it begins, and `on_validation_batch_end` puts it off.
        fit_loop = trainer.fit_loop
        assert fit_loop._data_fetcher is not None
        if not fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher):
            trainer.limit_val_batches = 0
        trainer.should_stop = True
        # Here and not at the end of training, where Lightning's loops count the epoch as finished.
        self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        place = self._checkpoint_folder(trainer) / self.filename
        trainer.save_checkpoint(place)
        if trainer.is_global_zero:
            sys.stderr.write(f"Stopped after a full step. Go on with: --ckpt_path {place}\n")

    @staticmethod
    def _checkpoint_folder(trainer: lightning.Trainer) -> Path:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath:
                return Path(callback.dirpath)
        return Path(trainer.log_dir or trainer.default_root_dir)

    # ------------------------------------------------------------------ validation

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note the random states and counts from which a validation that is cut short is repeated."""
        self._validation = None
        if not self._has_trained or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        # Ranks with unequal numbers of batches could not agree at each.
        if len(set(gathered(tuple(trainer.num_val_batches)))) == 1:
            done = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.completed
            self._validation = (rng_state(), done)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        *args: Any,
    ) -> None:
        """Save and stop where any rank was asked to; the validation is repeated on resume.

        A validation after the last step is finished.

        Raises:
            StoppedError: After saving.
        """
        if self._validation is None:
            return
        asked = self._agreed(trainer)
        if not asked:
            return
        if (
            trainer.global_step >= trainer.max_steps > 0
        ):  # nothing would resume, so this validation has to end
            self._validation = None
            place = self._checkpoint_folder(trainer) / self.filename
            trainer.save_checkpoint(place)
            if trainer.is_global_zero:
                sys.stderr.write(
                    f"The last step is done and saved: {place}. Finishing the last validation.\n"
                )
            return
        state, done = self._validation
        set_rng_state(state)
        # For Lightning this is a validation whose first batch is under way.
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        for counts, before in ((progress.total, done), (progress.current, 0)):
            begun, ended = before + 1, before
            counts.load_state_dict({"ready": begun, "started": begun, "processed": ended, "completed": ended})
        self.stopped, self.number = True, asked
        self._save(trainer)
        raise StoppedError(signal.Signals(asked).name)

    # ------------------------------------------------------------------ the end

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Give the signals back, and requeue the job if that was asked for."""
        self._end(trainer)

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Give the signals back, and requeue the job if that was asked for."""
        if not isinstance(exception, StoppedError):
            self.stopped = False
        self._end(trainer)

    def _end(self, trainer: lightning.Trainer) -> None:
        in_slurm = trainer.is_global_zero and "SLURM_JOB_ID" in os.environ
        if in_slurm and self.stopped and signal.Signals(self.number).name in self.requeue_on:
            self._requeue(trainer)
        self._give_back()

    def _requeue(self, trainer: lightning.Trainer) -> None:
        """Put the job back into the queue. SLURM ends it then, so loggers write what they hold before."""
        for logger in trainer.loggers:
            logger.finalize("finished")
        job = os.environ["SLURM_JOB_ID"]
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        try:
            subprocess.run(
                ["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60
            )
        except (OSError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip()
            sys.stderr.write(f"SLURM did not requeue job {job}: {reason}. Submit it again.\n")
        else:
            sys.stderr.write(f"Requeued SLURM job {job}.\n")
