"""Draws how a GRPO run learns: reward, accuracy, dead groups and completion length over steps."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.loggers import WandbLogger

from lightning_modules.files import complete_file, set_aside
from lightning_modules.ranges import check_whole

_PANELS = {
    "train/reward": "reward",
    "train/accuracy": "accuracy of samples",
    "train/dead_groups": "share of dead groups",
    "train/completion_length": "completion length (tokens)",
}


class LearningCurve(lightning.Callback):
    """Draws the run's curves as a PNG at its end and after each validation, and sends it to W&B.

    Args:
        filename: Name of the picture in the run's folder.
        window: Steps of the moving average drawn over the single steps.
    """

    def __init__(self, filename: str = "learning_curve.png", window: int = 5) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("LearningCurve draws with matplotlib: pip install 'lightning-quiver[plots]'")
        check_whole("window", window)
        self.filename = filename
        self.window = window
        self._steps: list[int] = []
        self._values: dict[str, list[float]] = {name: [] for name in _PANELS}
        self._target: Path | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the picture of an earlier run in this folder."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._target = Path(trainer.log_dir or trainer.default_root_dir) / self.filename
        if trainer.is_global_zero and not self._steps:
            set_aside(self._target)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        *args: Any,
    ) -> None:
        """Remember the step's metrics."""
        if all(name in trainer.callback_metrics for name in _PANELS):
            self._steps.append(trainer.fit_loop.total_batch_idx + 1)
            for name, values in self._values.items():
                values.append(float(trainer.callback_metrics[name]))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw."""
        self._draw(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw, and send the picture to W&B."""
        self._draw(trainer)
        if trainer.is_global_zero and self._steps and self._target is not None:
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image("learning_curve", [str(self._target)])

    def _draw(self, trainer: lightning.Trainer) -> None:
        if not trainer.is_global_zero or not self._steps or self._target is None:
            return
        # The object interface: pyplot would keep a global list of figures and pick a window system.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2, sharex=True)
        for axis, (name, title) in zip(axes.flat, _PANELS.items(), strict=True):
            values = self._values[name]
            axis.plot(self._steps, values, ".", color="0.7", label="step")
            axis.plot(self._steps, _moving_average(values, self.window), label=f"mean of {self.window} steps")
            axis.set_title(title)
            axis.grid(alpha=0.3)
        for axis in axes[1]:
            axis.set_xlabel("step")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0, 0].legend()
        with complete_file(self._target) as file:
            figure.savefig(file, dpi=120)

    def state_dict(self) -> dict[str, Any]:
        """Keep the curves for a resumed run."""
        return {"steps": self._steps, "values": self._values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the curves."""
        self._steps, self._values = state_dict["steps"], state_dict["values"]


def _moving_average(values: list[float], window: int) -> list[float]:
    """Mean of each value and up to `window - 1` before it; steps without a value, such as a reward, do not count."""
    parts = [
        [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        for end in range(1, len(values) + 1)
    ]
    return [sum(part) / len(part) if part else math.nan for part in parts]
