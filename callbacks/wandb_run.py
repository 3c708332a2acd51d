"""Lets a resumed run go on in its W&B run, and a run go on when W&B cannot be reached."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.loggers import WandbLogger

from lightning_modules.sharded_files import META


class WandbRun(lightning.Callback):
    """Keeps the id of the W&B run in checkpoints, and starts the run offline where W&B does not answer.

    `begin` comes before `Trainer.fit`, because Lightning restores callbacks after it has started its loggers; the
    `quiver` command calls it. An `id` of the logger's own wins over that of the checkpoint.

    Attributes:
        offline_folder: What `wandb sync` uploads, where W&B could not be reached; else None.
    """

    def __init__(self) -> None:
        self.offline_folder: Path | None = None
        self._run: Any = None
        self._step = 0

    def begin(self, trainer: lightning.Trainer, checkpoint: str | Path | None) -> None:
        """Start the W&B run of a logger, on rank 0.

        Args:
            trainer: Before it trains.
            checkpoint: What it will resume from.

        Raises:
            ValueError: If W&B answers, but knows no such user.
        """
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not loggers or not trainer.is_global_zero:
            return
        import wandb

        logger = loggers[0]
        saved = _saved_state(checkpoint)
        if logger.version is None:
            # Chosen here, so that the run keeps it if it has to go offline.
            logger._id = saved.get("id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
            logger._wandb_init["id"] = logger._id
        before = _folders(logger)
        try:
            self._run = logger.experiment
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise ValueError(
                f"W&B refuses this user: {error}. Run `wandb login`, or keep the run on this disk: "
                "WANDB_MODE=offline."
            ) from None
        except (wandb.errors.CommError, TimeoutError) as error:
            wandb.teardown()  # its process holds the id
            for folder in _folders(logger) - before:
                shutil.rmtree(folder, ignore_errors=True)
            logger._wandb_init["mode"] = "offline"
            self._run = logger.experiment
            self.offline_folder = Path(self._run.dir).parent
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            sys.stderr.write(f"W&B cannot be reached ({reason}). {self._notice()}\n")
        if saved.get("id") == self._run.id:
            self._step = saved["step"]

    def _notice(self) -> str:
        assert self.offline_folder is not None
        return (
            f"Run {self._run.id} is kept on this disk, and nothing is lost. To upload it later: "
            f"wandb sync {self.offline_folder}"
        )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Count W&B's steps on from those of the checkpoint; offline, W&B would start at 0."""
        if self._run is not None and self._run.step < self._step:
            self._run.log({}, step=self._step)

    def state_dict(self) -> dict[str, Any]:
        """Return the run's id, and the step after that whose metrics are logged next; nothing without a run."""
        return {} if self._run is None else {"id": self._run.id, "step": self._run.step + 1}

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Remind of what is to be uploaded."""
        if self.offline_folder is not None:
            sys.stderr.write(f"W&B could not be reached. {self._notice()}\n")


def _folders(logger: WandbLogger) -> set[Path]:
    """Folders of online runs of this id."""
    root = Path(logger.save_dir or ".")
    return {place for name in ("wandb", ".wandb") for place in root.glob(f"{name}/run-*-{logger.version}")}


def _saved_state(checkpoint: str | Path | None) -> dict[str, Any]:
    """What a checkpoint keeps of this callback; empty if there is none, or none that can be read here."""
    if checkpoint is None or not Path(checkpoint).exists():
        return {}
    file = Path(checkpoint) / META if Path(checkpoint).is_dir() else Path(checkpoint)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return dict(loaded["callbacks"].get(WandbRun.__qualname__, {}))
    except Exception:  # Lightning reads it again and says what is wrong
        return {}
