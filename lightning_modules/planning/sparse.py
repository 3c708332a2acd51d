"""A sparse adapter without scores: as many entries as it would train, wherever they may be.

Shapes: K trained entries; N entries of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.adapters import Adapter
from lightning_modules.sparse.adapter import SparseAdapter
from lightning_modules.sparse.masks import Structure, budget
from lightning_modules.sparse.targets import find_targets, find_users
from lightning_modules.sparse.weight import BASE, INDICES, VALUES, SparseWeight


class PlannedSparseAdapter(Adapter):
    """Takes up the memory of a `SparseAdapter`.

    Args:
        adapter: What is planned.
        choosing: Be in a step before weights are chosen, which looks at the gradients of all of them; else be in
            one of those after.
    """

    def __init__(self, adapter: SparseAdapter, *, choosing: bool) -> None:
        self._planned = adapter
        self._choosing = choosing
        self._weights: list[SparseWeight] = []

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze `model`, and make entries of its target weights trainable."""
        planned = self._planned
        users = find_users(model, find_targets(model, planned.target_modules))
        model.requires_grad_(False)
        for name, found in users.items():
            weight = SparseWeight(name, model.get_parameter(name), found)
            if self._choosing and planned.schedule.dense:
                _train(weight, None)
            else:
                _train(weight, num_trained(weight.shape, planned.density, planned.structure, planned.block))
                weight.line_dim = {"row": 0, "column": 1}.get(planned.structure)
                weight.observing = weight.idle = self._choosing
            self._weights.append(weight)
        model.register_forward_pre_hook(lambda *_: self._write())
        return model

    def _write(self) -> None:
        for weight in self._weights:
            weight.write()

    def watch(self, optimizer: Optimizer, epoch: Callable[[], int] = lambda: 0) -> None:
        """Score all weights around a step that chooses, and write after every step."""
        scores: list[Tensor] = []

        def before(*_: Any) -> None:
            if self._choosing:
                scores.extend(torch.zeros(weight.shape) for weight in self._weights)

        def after(*_: Any) -> None:
            scores.clear()
            for weight in self._weights:
                weight.observed = None
            self._write()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch all entries off."""
        for weight in self._weights:
            weight.switch_off()
        try:
            yield
        finally:
            for weight in self._weights:
                weight.switch_on()

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: nothing is learned."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load nothing."""

    def write(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write nothing."""


def num_trained(shape: torch.Size, density: float, structure: Structure, block: int) -> int:
    """Return how many entries of a weight are trained where weights do not compete.

    Args:
        shape: Of the weight (out, in).
        density: Share of its units.
        structure: What a unit is.
        block: Side of a block; those at the edges count as whole ones.

    >>> num_trained(torch.Size((4, 10)), 0.5, "row", 16)
    20
    """
    if structure == "element":
        return budget(density, shape.numel())
    rows, columns = shape
    if structure == "block":
        blocks = budget(density, math.ceil(rows / block) * math.ceil(columns / block))
        return min(shape.numel(), blocks * block * block)
    units = rows if structure == "row" else columns
    return budget(density, units) * shape.numel() // units


def _train(weight: SparseWeight, count: int | None) -> None:
    """What `SparseWeight.put` does, with entries whose positions are not known; None trains all."""
    place: dict[str, Any] = {"device": weight.device}
    entries = weight.shape.numel() if count is None else count
    setattr(weight.owner, VALUES, nn.Parameter(torch.zeros(entries, **place)))
    indices = None if count is None else torch.zeros(count, dtype=torch.int32, **place)
    base = None if count is None else torch.zeros(count, dtype=weight.weight.dtype, **place)
    setattr(weight.owner, INDICES, indices)
    setattr(weight.owner, BASE, base)
