"""Writes what was learned as a folder that PEFT loads, with a model card, and as a W&B artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from callbacks.graceful_stop import StoppedError
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.checkpoint_io import CompleteCheckpointIO
from lightning_modules.export import save_adapter
from lightning_modules.finite import check_finite


class AdapterExport(lightning.Callback):
    """Exports the adapter at the end of training, and that of the best checkpoint where one is monitored.

    Args:
        folder: Name of the adapter folder in the run's folder; the best one is `<folder>-best`.
        artifact: Also log the folder to W&B.
    """

    def __init__(self, folder: str = "adapter", artifact: bool = True) -> None:
        self.folder = folder
        self.artifact = artifact
        self._trained = False

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any
    ) -> None:
        """Note that there is something new to export."""
        self._trained = True

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Check the module before it is trained.

        Raises:
            ValueError: If it has no adapter to export.
        """
        if not isinstance(pl_module, CausalLMModule):
            raise ValueError(f"AdapterExport exports a CausalLMModule, not {type(pl_module).__name__}.")

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Export what a run has learned that was told to stop, which all ranks are at once."""
        if isinstance(exception, StoppedError):
            self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Export.

        Raises:
            ValueError: If a trained value is NaN or infinite.
        """
        root = Path(trainer.log_dir or trainer.default_root_dir)
        if trainer.fast_dev_run or not self._trained:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, CausalLMModule)  # see `setup`
        logged = trainer.callback_metrics
        # Without timings, and without what is logged a second time for the progress bar.
        metrics = {
            name: float(value)
            for name, value in logged.items()
            if "/time/" not in name and f"train/{name}" not in logged
        }
        # Under sharding all ranks gather what one of them writes.
        state = pl_module.adapter.state_dict()
        self._export(trainer, pl_module, state, root / self.folder, trainer.global_step, metrics)
        best = _best_checkpoint(trainer)
        # Rank 0 decides: on a shared disk others may not see yet what it does.
        place = trainer.strategy.broadcast(None if best is None else str(best.best_model_path))
        if best is None or place is None:
            return
        checkpoint = CompleteCheckpointIO().load_checkpoint(place)
        last = {name: tensor.clone() for name, tensor in state.items()}
        pl_module.adapter.load_state_dict(checkpoint["state_dict"])
        scores = {str(best.monitor): float(best.best_model_score)}  # type: ignore[arg-type]
        steps = checkpoint["global_step"]
        state = pl_module.adapter.state_dict()
        self._export(trainer, pl_module, state, root / f"{self.folder}-best", steps, scores)
        pl_module.adapter.load_state_dict(last)

    def _export(
        self,
        trainer: lightning.Trainer,
        module: CausalLMModule,
        state: dict[str, Tensor],
        folder: Path,
        steps: int,
        metrics: dict[str, float],
    ) -> None:
        check_finite(
            state.items(), f"AdapterExport writes no {folder.name}"
        )  # on all ranks, so that none waits
        if not trainer.is_global_zero:
            return
        save_adapter(module, folder, steps=steps, metrics=metrics, state=state)
        for logger in trainer.loggers:
            if self.artifact and isinstance(logger, WandbLogger):
                import wandb

                artifact = wandb.Artifact(f"{folder.name}-{logger.experiment.id}", type="adapter")
                artifact.add_dir(str(folder))
                logger.experiment.log_artifact(artifact)


def _best_checkpoint(trainer: lightning.Trainer) -> ModelCheckpoint | None:
    """Return the checkpoint callback that monitors a metric and has saved something."""
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or not callback.monitor:
            continue
        if callback.best_model_path and Path(callback.best_model_path).exists():
            return callback
    return None
