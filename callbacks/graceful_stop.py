"""Stops a run on Ctrl-C, SIGTERM or a SLURM signal, with a checkpoint that resumes exactly."""

from __future__ import annotations

import contextlib
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

from callbacks.stuck_call import StuckCallWatch
from lightning_modules.checkpoint_io import AsyncCompleteCheckpointIO
from lightning_modules.distributed import gathered, rng_state, set_rng_state

_REPEAT = 1.0  # seconds within which a launcher may repeat the terminal's Ctrl-C


class StoppedError(Exception):
    """The run was told to stop, and has saved its checkpoint."""


class StoppedAtOnceError(KeyboardInterrupt):
    """The run was told to stop while it had nothing to save, or was told twice."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class GracefulStop(lightning.Callback):
    """Finishes the running step or validation batch, saves a checkpoint, and stops.

    A second Ctrl-C stops at once; so does any signal before the first step. Lightning's own handlers stop within a
    step, and with several processes they can hang. Here all ranks agree after each step and each batch of a
    validation whether one of them was told to stop. A validation that was cut short is repeated on resume. After the
    last step nothing is left to stop: the run ends as it would have. `Trainer.fit` raises StoppedError, without which
    Lightning would close the epoch and save it as complete.

    Args:
        filename: Name of the checkpoint in the folder of the run's checkpoints. One of another run is kept: this one
            is then called `interrupted-v1.ckpt`, and so on.
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
        self._saved = ""
        self._has_trained = False
        self._validation: tuple[dict[str, Any], int] | None = None
        self._previous: dict[int, Any] = {}
        self._watch: StuckCallWatch | None = None

    # ------------------------------------------------------------------ signals

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Take over the signals for a training run, from Lightning too."""
        if stage != "fit":
            return
        self.stopped, self.number, self._asked, self._has_trained = False, 0, 0, False
        # Last, so that what is saved holds what ModelCheckpoint did at this step. A new list: this one is in use.
        trainer.callbacks = [*(one for one in trainer.callbacks if one is not self), self]  # type: ignore[attr-defined]
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        if "SLURM_JOB_ID" in os.environ:
            numbers.append(signal.SIGUSR1)
        self._previous = {number: signal.signal(number, self._ask) for number in numbers}
        self._watch = StuckCallWatch(_REPEAT)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """From here on there is something to save."""
        self._has_trained = True

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self._has_trained:
            raise StoppedAtOnceError(number)
        if not self._asked:
            self._asked, self._asked_at = number, time.monotonic()
            once_more = " Once more stops at once." if number == signal.SIGINT else ""
            _say(
                f"\n{signal.Signals(number).name}: finishing this step, then saving a checkpoint.{once_more}"
            )
        elif number == signal.SIGINT and time.monotonic() - self._asked_at > _REPEAT:
            raise StoppedAtOnceError(number)

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self._watch is not None:
            self._watch.close()

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
        """Save where any rank was asked to stop; the next step stops."""
        asked = self._agreed(trainer)
        if not asked or self.stopped or _is_last_step(trainer):
            return
        self.stopped, self.number = True, asked
        # Here, and not where the next step begins: by then its batch was drawn from the data.
        self._save(trainer)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop, after all that belongs to the step before: its metrics, its checkpoints, its end of an epoch.

        Raises:
            StoppedError: If the step before was saved to stop after it.
        """
        if self.stopped:
            raise StoppedError(signal.Signals(self.number).name)

    def _save(self, trainer: lightning.Trainer) -> None:
        place = self._save_as(trainer)
        if trainer.is_global_zero:
            _say(f"Stopped after a full step. Go on with: --ckpt_path {place}")

    def _save_as(self, trainer: lightning.Trainer) -> Path:
        """Save, and return where once it is written."""
        place = self._checkpoint_folder(trainer) / self.filename
        number = 0
        while place.exists() and str(place) != self._saved:
            number += 1
            place = place.with_name(f"{Path(self.filename).stem}-v{number}{Path(self.filename).suffix}")
        # Rank 0 decides: on a shared disk others may see less.
        self._saved = str(trainer.strategy.broadcast(str(place)))
        trainer.save_checkpoint(self._saved)
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, AsyncCompleteCheckpointIO):
            writer.wait()
        return Path(self._saved)

    def state_dict(self) -> dict[str, Any]:
        """Keep the name of this run's checkpoint, which the next stop may replace."""
        return {"saved": self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._saved = str(state_dict.get("saved", ""))

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
        if _is_last_step(trainer):  # nothing would resume, so this validation has to end
            self._validation = None
            place = self._save_as(trainer)
            if trainer.is_global_zero:
                _say(f"The last step is done and saved: {place}. Finishing the last validation.")
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
            _say(f"SLURM did not requeue job {job}: {reason}. Submit it again.")
        else:
            _say(f"Requeued SLURM job {job}.")


def _is_last_step(trainer: lightning.Trainer) -> bool:
    """Whether training ends with the step that has just ended."""
    steps = trainer.global_step >= trainer.max_steps > 0
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    stopping = trainer.should_stop and trainer.fit_loop._can_stop_early  # EarlyStopping, say
    return steps or (last_epoch and trainer.is_last_batch) or stopping


def _say(line: str) -> None:
    """Print to stderr; the terminal may be gone, which is no reason not to save."""
    with contextlib.suppress(OSError):
        sys.stderr.write(line + "\n")
