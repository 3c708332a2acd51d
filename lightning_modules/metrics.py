"""Weighted means over micro-batches, batches and ranks, and the clock of a step's phases."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_modules.distributed import all_sum


class Means:
    """Collects sums and counts, so that uneven micro-batches and ranks get their true weight.

    Every rank adds the same names in the same order; a rank without data adds empty tensors.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add values to a mean.

        Args:
            name: Name of the metric.
            values: Any shape. NaN (a reward that is not applicable) does not count.
            mask: 1 where a value counts; same shape. None: everywhere.
        """
        counts = ~values.isnan() if mask is None else mask.bool()
        # Kept where they are: reading a number would make the host wait for the device at every micro-batch.
        part = torch.stack([torch.where(counts, values, 0.0).float().sum(), counts.float().sum()])
        self._parts.setdefault(name, []).append(part.detach())

    def state_dict(self) -> dict[str, Tensor]:
        """Return what was added so far, sum and count of each call (calls, 2), by name."""
        return {name: torch.stack(parts).cpu() for name, parts in self._parts.items()}

    def load_state_dict(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from what `state_dict` returned, on one rank or several.

        Args:
            states: Those of the ranks whose part this rank takes over.
        """
        self._parts = {}
        for state in states:
            for name, parts in state.items():
                self._parts.setdefault(name, []).extend(parts.unbind(0))

    def reduce(self, strategy: Strategy) -> dict[str, float]:
        """Return each mean over all ranks; NaN where nothing was counted."""
        device = strategy.root_device
        sums = torch.stack(
            [torch.stack([part.to(device) for part in parts]).sum(0) for parts in self._parts.values()]
        )
        sums = all_sum(strategy, sums)
        return dict(zip(self._parts, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))


class Clock:
    """Seconds spent in each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a block and add it to `phase`."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
