"""EvaluationMeans: how a module measures itself, without touching the course of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as lightning
import torch

from lightning_modules.distributed import rng_state, set_rng_state
from lightning_modules.metrics import Means


class EvaluationMeans(lightning.LightningModule):
    """Collects means over an epoch of validation or test and logs them under `val/` or `test/`.

    A subclass names its metrics and adds to `evaluation_means` in `validation_step`.
    """

    def evaluation_metrics(self) -> Sequence[str]:
        """Name the metrics that `validation_step` adds to `evaluation_means`. A subclass overrides this."""
        return ()

    def on_validation_epoch_start(self) -> None:
        """Start the epoch's means; the same names on every rank, whatever rows it gets."""
        self.evaluation_means = Means()
        for name in self.evaluation_metrics():
            self.evaluation_means.add(name, torch.empty(0))

    def on_validation_epoch_end(self) -> None:
        """Log the means over all rows and ranks; of a metric that applied to no row, none."""
        stage = "test" if self.trainer.testing else "val"
        for name, value in self.evaluation_means.reduce(self.trainer.strategy).items():
            if not math.isnan(value):
                self.log(f"{stage}/{name}", value)

    def on_test_epoch_start(self) -> None:
        """Do what validation does."""
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        """Do what validation does."""
        self.on_validation_epoch_end()

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """Do what validation does, on the test set, under `test/`."""
        return self.validation_step(batch, batch_idx)

    def on_validation_start(self) -> None:
        """Give validation random numbers of its own.

        So it neither changes the course of training, however often it runs, nor differs between runs for
        another reason than the policy.
        """
        self._training_rng = rng_state()
        torch.manual_seed(self.global_rank)

    def on_validation_end(self) -> None:
        """Give training its random numbers back."""
        set_rng_state(self._training_rng)
