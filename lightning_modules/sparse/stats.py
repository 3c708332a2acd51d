"""What is trained of each weight, and how much of it other experts change too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.sparse.storage import SparseFolder
from lightning_modules.sparse.weight import SparseWeight


@dataclass(frozen=True)
class WeightStats:
    """Counts of one weight.

    Attributes:
        name: Parameter name.
        trained: |A|.
        size: N.
        experts: (|A and B|, |B|) of each expert that changes this weight.
    """

    name: str
    trained: int
    size: int
    experts: dict[str, tuple[int, int]]


def trained_entries(weight: SparseWeight) -> Tensor | None:
    """Return sorted positions of the entries that are trained now; None for all.

    None are trained before the first choice of a schedule without dense phase: what has indices then only holds
    the place of those to come.
    """
    indices = weight.indices
    return indices[:0] if weight.idle and indices is not None else indices


def shared_count(first: Tensor | None, second: Tensor | None, size: int) -> int:
    """Count the positions that are in both of two choices.

    Args:
        first: Sorted unique positions (A), on any device; None for all.
        second: Likewise (B).
        size: Number of all positions, N.

    Returns:
        |A and B|, in O(min(A, B) log max(A, B)).
    """
    if first is None or second is None:
        other = second if first is None else first
        return size if other is None else len(other)
    few, many = sorted((first, second.to(first)), key=len)
    if not len(few):
        return 0
    places = torch.searchsorted(many, few).clamp_(max=len(many) - 1)
    return int((many[places] == few).sum())


def measure(weights: Sequence[SparseWeight], experts: Mapping[str, SparseFolder]) -> list[WeightStats]:
    """Count the trained entries of each weight, and those that experts train too."""
    stats = []
    for weight in weights:
        mine, size = trained_entries(weight), weight.shape.numel()
        shared = {}
        for label, folder in experts.items():
            if weight.name in folder.names:
                theirs = folder.delta(weight.name).indices
                shared[label] = (shared_count(mine, theirs, size), len(theirs))
        stats.append(WeightStats(weight.name, size if mine is None else len(mine), size, shared))
    return stats


def overlap(stats: Sequence[WeightStats], label: str) -> tuple[float, float]:
    """Compare the run's choice with an expert's, over the weights that both change.

    Args:
        stats: Of each weight.
        label: Name of the expert.

    Returns:
        |A and B| / |A|, and its expectation for random choices of the same size in each weight,
        sum(|A| |B| / N) / sum(|A|). Both are 0 where A is empty.
    """
    both = [one for one in stats if label in one.experts]
    trained = sum(one.trained for one in both)
    found = sum(one.experts[label][0] for one in both)
    by_chance = sum(one.trained * one.experts[label][1] / one.size for one in both)
    return share_of(found, trained), share_of(by_chance, trained)


def table(stats: Sequence[WeightStats], experts: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows: weight, trained, size, density, and the overlap with each expert or None."""
    columns = ["weight", "trained", "size", "density", *(f"overlap/{label}" for label in experts)]
    rows: list[list[Any]] = []
    for one in stats:
        shares = [
            one.experts[label][0] / one.trained if label in one.experts and one.trained else None
            for label in experts
        ]
        rows.append([one.name, one.trained, one.size, share_of(one.trained, one.size), *shares])
    return columns, rows


def layer_densities(stats: Sequence[WeightStats]) -> list[float]:
    """Return the share of trained entries in each layer."""
    counts: dict[Any, tuple[int, int]] = {}
    for one in stats:
        layer = place_of(one.name)[0]
        trained, size = counts.get(layer, (0, 0))
        counts[layer] = (trained + one.trained, size + one.size)
    return [share_of(*count) for count in counts.values()]


def share_of(part: float, whole: float) -> float:
    """Return part / whole, 0 of nothing."""
    return part / whole if whole else 0.0


def place_of(name: str) -> tuple[tuple[str, int] | None, str]:
    """Tell where a parameter stands.

    Args:
        name: Of the parameter.

    Returns:
        Its layer, as what stands before the first number and that number, None without one; and the kind of
        its module.
    """
    parts = name.split(".")[:-1]
    for i, part in enumerate(parts):
        if part.isdecimal():
            rest = ["*" if later.isdecimal() else later for later in parts[i + 1 :]]
            return (".".join(parts[:i]), int(part)), ".".join(rest) or "weight"
    return None, ".".join(parts)
