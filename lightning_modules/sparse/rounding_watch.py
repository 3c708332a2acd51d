"""RoundingWatch: says how much of what a sparse adapter learns is rounded away where the model computes with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.rounding import Rounding, name_of, sum_of
from lightning_modules.sparse.weight import SparseWeight

NEGLIGIBLE = 0.05
"""Relative error of the written change below which nothing is said."""


class RoundingWatch:
    """Measures the first change that an optimiser makes and warns once if little of it arrives.

    Attributes:
        computes_in: What the model computes in; None for the type of its weights.
    """

    def __init__(self) -> None:
        self.computes_in: torch.dtype | None = None
        self._is_over = False

    def before_forward(self, device: str, gathered: torch.dtype | None) -> None:
        """Note the type in which the forward pass computes.

        Args:
            device: Kind of the device that the weights are on.
            gathered: The type in which sharded layers compute, if it is another one than their weights'.
        """
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.computes_in = autocast or gathered

    def measure(self, weights: Sequence[SparseWeight]) -> Rounding:
        """Measure what arrives of all that was learned; a collective under sharding."""
        return sum_of(weight.rounding(self._type_of(weight)) for weight in weights)

    def after_step(self, weights: Sequence[SparseWeight]) -> None:
        """Warn, after the first step that changed anything; the same on every rank."""
        types = {self._type_of(weight) for weight in weights}
        if self._is_over or types <= {torch.float32, torch.float64}:
            return
        found = self.measure(weights)
        if not found.changes:
            return
        self._is_over = True
        if found.error < NEGLIGIBLE:
            return
        name = " and ".join(sorted(map(name_of, types)))
        remedy = (
            "model.dtype: float32"
            if any(weight.dtype in types for weight in weights)
            else "trainer.precision: 32-true, and no param_dtype in the strategy"
        )
        rank_zero_warn(
            f"The model computes with weight + learned change, rounded to {name}. Measured after the first update: "
            f"{found.unmoved:.0%} of the {found.changes} changed entries have not moved, {found.share:.0%} of the "
            f"norm of the change arrives, and its relative error is {found.error:.2f}. Learned values stay float32 and "
            f"go on adding up. Set {remedy}, or take a higher learning rate. SparseStats logs how the error goes on."
        )

    def _type_of(self, weight: SparseWeight) -> torch.dtype:
        own = weight.dtype
        return self.computes_in if self.computes_in is not None and own == torch.float32 else own
