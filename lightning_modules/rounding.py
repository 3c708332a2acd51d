"""How much of a change of weights survives where it is written into a type of few digits. Torch alone.

bfloat16 keeps 8 binary digits: next to a weight of 0.1, changes below 0.0002 are rounded away as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

ENOUGH = 0.9
"""Share of a change's norm below which users are warned."""
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Rounding:
    """The part of a change that arrives, as sums over entries, so that those of several weights add up.

    Attributes:
        wanted: Sum of the squared changes.
        kept: Sum of squares of what arrives of each entry's change; more than was wanted does not count.
        lost: Sum of squares of the differences between what arrives and what was wanted.
        changes: Entries that were to change.
        still: Those of them that stay as they are.
    """

    wanted: float = 0.0
    kept: float = 0.0
    lost: float = 0.0
    changes: int = 0
    still: int = 0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            self.wanted + other.wanted,
            self.kept + other.kept,
            self.lost + other.lost,
            self.changes + other.changes,
            self.still + other.still,
        )

    @property
    def share(self) -> float:
        """Norm of what arrives by norm of what was wanted, in [0, 1]; 1 where nothing was wanted."""
        return math.sqrt(self.kept / self.wanted) if self.wanted else 1.0

    @property
    def error(self) -> float:
        """Norm of the difference by norm of what was wanted; 0 where nothing was wanted."""
        return math.sqrt(self.lost / self.wanted) if self.wanted else 0.0

    @property
    def unmoved(self) -> float:
        """Share of the entries that were to change and stay as they are; 0 where none was to change."""
        return self.still / self.changes if self.changes else 0.0

    @property
    def suffices(self) -> bool:
        """Whether at least `ENOUGH` of the norm arrives."""
        return self.share >= ENOUGH


@torch.no_grad()
def rounding(base: Tensor, change: Tensor, dtype: torch.dtype) -> Rounding:
    """Measure what arrives of a change that is written into a type: round(base + change) - round(base).

    The sum is taken in float32, as it is written; differences and squares are taken in float64. An entry counts up
    to what was wanted of it: where a change of 0.6 steps of the type is rounded to a whole step, 0.6 arrive.

    Args:
        base: The weight before, or the entries of it that change, any shape.
        change: What is added, of that shape.
        dtype: What the result is written in.

    Returns:
        The sums.

    >>> half = rounding(torch.tensor([0.0, 1.0]), torch.tensor([1e-4, 1e-4]), torch.bfloat16)
    >>> f"{half.share:.2f} {half.error:.2f} {half.unmoved:.2f}"
    '0.71 0.71 0.50'
    """
    total = Rounding()
    parts = zip(base.flatten().split(_CHUNK), change.flatten().split(_CHUNK), strict=True)
    for before, wanted in parts:
        after = (before.float() + wanted.float()).to(dtype)
        arrives = after.double() - before.to(dtype).double()
        wanted = wanted.double()
        changes = wanted != 0
        squares, kept, lost, changed, still = torch.stack(
            [
                wanted.square().sum(),
                (arrives * wanted.sign()).clamp(min=0).minimum(wanted.abs()).square().sum(),
                (arrives - wanted).square().sum(),
                changes.sum().double(),
                (changes & (arrives == 0)).sum().double(),
            ]
        ).tolist()
        total += Rounding(squares, kept, lost, int(changed), int(still))
    return total


def sum_of(parts: Iterable[Rounding]) -> Rounding:
    """Add up what was measured of several weights."""
    return sum(parts, Rounding())


def name_of(dtype: torch.dtype) -> str:
    """Name a type as configurations do."""
    return str(dtype).removeprefix("torch.")
