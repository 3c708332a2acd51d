"""Which weights are trained: exact budgets over elements, rows, columns or blocks. Torch alone.

A unit is what is chosen as a whole: an element, a row, a column or a block of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.ranges import check_number

Structure = Literal["element", "row", "column", "block"]


def select(scores: Tensor, density: float, structure: Structure = "element", block: int = 16) -> Tensor:
    """Choose the units of one weight with the highest scores.

    The budget is exact: floor(density x units), at least 1. A unit's score is the sum over its elements
    (arXiv 2507.07140 does so for blocks). Blocks at the right and lower edge are smaller where a side is no
    multiple of `block`; they compete with the sum of what they have. Equal scores, zeros too, are taken in
    the order of position.

    Args:
        scores: One score for each element (out, in); element structure takes any shape.
        density: Share of the units, in (0, 1].
        structure: What a unit is.
        block: Side of a square block.

    Returns:
        Positions in the flattened weight, sorted, int64.

    Raises:
        ValueError: If density or block is out of range, a score is NaN, or the shape does not fit.

    >>> select(torch.tensor([[3.0, 1.0], [2.0, 0.0]]), 0.5)
    tensor([0, 2])
    """
    check_density(density)
    units = check_scores(unit_sums(scores.float(), structure, block))
    chosen = torch.zeros(units.numel(), dtype=torch.bool, device=units.device)
    chosen[top(units.flatten(), budget(density, units.numel()))] = True
    return elements(chosen.view(units.shape), scores.shape, structure, block)


def select_across(
    scores: Mapping[str, Tensor], density: float, structure: Structure = "element", block: int = 16
) -> dict[str, Tensor]:
    """Choose the units with the highest scores over several weights, under one budget.

    Units are ranked by their mean score, so that a long row has no advantage over a short one, and taken as
    long as their elements fit into floor(density x all elements); at least one is taken.

    Args:
        scores: Scores of each weight.
        density: Share of all elements, in (0, 1].
        structure: What a unit is.
        block: Side of a square block.

    Returns:
        Sorted positions within each weight, int64; none for a weight that got nothing.

    Raises:
        ValueError: As `select`, naming the weight.
    """
    check_density(density)
    sums = {
        name: check_scores(unit_sums(one.float(), structure, block), name) for name, one in scores.items()
    }
    limit = budget(density, sum(one.numel() for one in scores.values()))
    if structure == "element":
        ranked = torch.cat([one.flatten() for one in sums.values()])
        chosen = torch.zeros(len(ranked), dtype=torch.bool, device=ranked.device)
        chosen[top(ranked, limit)] = True
        return _elements_of_each(chosen, sums, scores, structure, block)
    sizes = {
        name: unit_sums(torch.ones_like(one, dtype=torch.float32), structure, block).flatten()
        for name, one in scores.items()
    }
    flat_sizes = torch.cat(list(sizes.values()))
    means = torch.cat([one.flatten() for one in sums.values()]) / flat_sizes
    order = means.argsort(descending=True, stable=True)
    fits = flat_sizes[order].long().cumsum(0) <= limit
    count = max(1, int(fits.sum()))
    chosen = torch.zeros(len(means), dtype=torch.bool, device=means.device)
    chosen[order[:count]] = True
    return _elements_of_each(chosen, sums, scores, structure, block)


def _elements_of_each(
    chosen: Tensor, sums: Mapping[str, Tensor], scores: Mapping[str, Tensor], structure: Structure, block: int
) -> dict[str, Tensor]:
    parts = torch.split(chosen, [one.numel() for one in sums.values()])
    return {
        name: elements(part.view(sums[name].shape), scores[name].shape, structure, block)
        for part, name in zip(parts, scores, strict=True)
    }


def replace(
    indices: Tensor,
    magnitudes: Tensor,
    scores: Tensor,
    share: float,
    structure: Structure = "element",
    block: int = 16,
) -> Tensor:
    """Drop the weakest of the chosen units and grow as many new ones (RigL, arXiv 1911.11134, Alg. 1).

    Deviation: units that were just dropped cannot grow at once, where RigL lets them.

    Args:
        indices: The present choice, sorted positions.
        magnitudes: Size of what was learned, for each element; the smallest sums are dropped.
        scores: Grows the highest among the units that were not chosen, those just dropped excluded.
        share: Of the present units, rounded down, that is replaced; fewer where fewer are left to grow.
        structure: What a unit is.
        block: Side of a square block.

    Returns:
        The new choice, sorted positions, as many units as before.
    """
    present = torch.zeros(scores.numel(), dtype=torch.float32, device=scores.device)
    present[indices.long()] = 1
    chosen = (unit_sums(present.view(scores.shape), structure, block) > 0).flatten()
    growing = check_scores(unit_sums(scores.float(), structure, block))
    count = min(math.floor(round(share * int(chosen.sum()), 6)), int((~chosen).sum()))
    if count > 0:
        sizes = unit_sums(magnitudes, structure, block).flatten()
        held, free = chosen.nonzero().flatten(), (~chosen).nonzero().flatten()
        chosen[held[top(-sizes[held], count)]] = False
        chosen[free[top(growing.flatten()[free], count)]] = True
    return elements(chosen.view(growing.shape), scores.shape, structure, block)


def count_units(indices: Tensor, shape: torch.Size, structure: Structure, block: int) -> tuple[int, int]:
    """Return how many units sorted positions belong to, and how many there are."""
    present = torch.zeros(shape.numel(), device=indices.device)
    present[indices.long()] = 1
    units = unit_sums(present.view(shape), structure, block)
    return int(units.count_nonzero()), units.numel()


def check_density(density: float) -> None:
    """Check a share.

    Raises:
        ValueError: If it is not in (0, 1].
    """
    check_number("density", density, above=0, most=1, hint="0.05 is usual.")


def check_scores(scores: Tensor, name: str = "scores") -> Tensor:
    """Return scores as float32.

    Raises:
        ValueError: If one is NaN, as the sum of a unit that holds both infinities is.
    """
    scores = scores.float()
    if missing := int(scores.isnan().sum()):
        raise ValueError(
            f"{name}: {missing} of {scores.numel()} scores are NaN, so there is no order to choose by. Look "
            "at loss and gradients of the batches that were scored."
        )
    return scores


def budget(density: float, count: int) -> int:
    """Return floor(density x count), at least 1; 0.29 x 100 is 29 here, not 28.999."""
    return max(1, math.floor(round(density * count, 6)))


def top(scores: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` highest of a vector, ties in the order of position."""
    threshold = scores.topk(count, sorted=False).values.min()  # kthvalue is not deterministic on GPUs
    above = (scores > threshold).nonzero().flatten()
    level = (scores == threshold).nonzero().flatten()
    return torch.cat([above, level[: count - len(above)]])


def unit_sums(scores: Tensor, structure: Structure, block: int) -> Tensor:
    """Sum scores over each unit.

    Args:
        scores: (out, in), or any shape for `element`.
        structure: What a unit is.
        block: Side of a block.

    Returns:
        `element`: as given; `row` (out); `column` (in); `block` (ceil(out / block), ceil(in / block)).

    Raises:
        ValueError: If the block is below 1, or the scores are no matrix where one is needed.
    """
    if structure == "element":
        return scores
    if scores.dim() != 2:
        raise ValueError(
            f"structure={structure!r} needs a matrix, got scores of shape {tuple(scores.shape)}."
        )
    if structure in ("row", "column"):
        return scores.sum(1 if structure == "row" else 0)
    if structure != "block":
        raise ValueError(f"structure={structure!r}: must be element, row, column or block.")
    if block < 1:
        raise ValueError(f"block={block}: must be at least 1.")
    rows, columns = scores.shape
    padded = torch.nn.functional.pad(scores, (0, -columns % block, 0, -rows % block))
    return padded.view(-(-rows // block), block, -(-columns // block), block).sum((1, 3))


def elements(chosen: Tensor, shape: torch.Size, structure: Structure, block: int) -> Tensor:
    """Return the sorted flat positions of the elements of chosen units.

    Args:
        chosen: One bool for each unit, shaped as `unit_sums` returns it.
        shape: Of the weight.
        structure: What a unit is.
        block: Side of a block.

    Returns:
        int64 (K).
    """
    if structure == "row":
        chosen = chosen[:, None].expand(shape)
    elif structure == "column":
        chosen = chosen[None, :].expand(shape)
    elif structure == "block":
        chosen = chosen.repeat_interleave(block, 0)[: shape[0]].repeat_interleave(block, 1)[:, : shape[1]]
    return chosen.flatten().nonzero().flatten()
