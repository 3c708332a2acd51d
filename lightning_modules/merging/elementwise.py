"""Merging entry by entry: averages, task arithmetic, TIES, DARE, Breadcrumbs, Consensus. Torch alone.

E counts the experts that change a parameter, U the entries that are worked on (entries.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.merging.entries import merge_entries
from lightning_modules.merging.vectors import Delta, Parameter, Part, TaskVector
from lightning_modules.ranges import check_number, check_whole
from lightning_modules.sparse.masks import top as highest


def average(experts: Sequence[TaskVector]) -> dict[str, Delta]:
    """Average: sum / N. Model soups (arXiv 2203.05482), without their choice of experts.

    Args:
        experts: Task vectors. An expert that lacks a parameter counts as zeros.

    Returns:
        The merged task vector.

    >>> average([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 1.0])}])
    {'w': tensor([2.0000, 0.5000])}
    """
    count = len(experts)
    return merge_entries(experts, lambda values_EU, _: values_EU.sum(0) / count)


def overlap_average(experts: Sequence[TaskVector]) -> dict[str, Delta]:
    """Average over the experts that touch an entry (arXiv 2507.07140, section "Merge").

    merged = sum_i delta_i / max(1, F), F the number of experts that touch the entry, so an entry that one
    expert alone changes keeps its full value. Deviation: a zero that a sparse expert names counts as touched;
    the authors' code counts non-zero values.

    Args:
        experts: Task vectors.

    Returns:
        The merged task vector.

    >>> overlap_average([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 1.0])}])
    {'w': tensor([2., 1.])}
    """
    return merge_entries(
        experts, lambda values_EU, touched_EU: values_EU.sum(0) / _count(touched_EU).clamp(min=1)
    )


def sign_consistent_average(experts: Sequence[TaskVector]) -> dict[str, Delta]:
    """Average over the experts that agree with the sign of the sum (variant in the code of arXiv 2507.07140).

    TIES without trimming. A sum of exactly 0 elects plus, as PEFT has it.

    Args:
        experts: Task vectors.

    Returns:
        The merged task vector.

    >>> sign_consistent_average([{"w": torch.tensor([1.0, -1.0])}, {"w": torch.tensor([3.0, 4.0])}])
    {'w': tensor([2., 4.])}
    """
    return merge_entries(experts, lambda values_EU, _: _agreeing_mean(values_EU))


def task_arithmetic(experts: Sequence[TaskVector], *, scale: float = 0.4) -> dict[str, Delta]:
    """Task arithmetic (arXiv 2212.04089): scale x sum.

    Args:
        experts: Task vectors.
        scale: The paper's scaling coefficient, which it chooses on validation data.

    Returns:
        The merged task vector.

    >>> task_arithmetic([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 1.0])}], scale=0.5)
    {'w': tensor([2.0000, 0.5000])}
    """
    check_number("scale", scale)
    return merge_entries(experts, lambda values_EU, _: scale * values_EU.sum(0))


def ties(experts: Sequence[TaskVector], *, density: float = 0.2, scale: float = 1.0) -> dict[str, Delta]:
    """TIES (arXiv 2306.01708): trim, elect a sign, average what agrees.

    Each expert keeps its int(density x entries) largest magnitudes of a parameter, earlier positions first
    among equal ones. The sign of an entry is that of the sum of what was kept; merged = scale x mean of the
    kept values of that sign. Deviations: the paper trims over the whole model, this over each parameter, as
    PEFT does, so that a parameter of small changes keeps as many entries as one of large ones and the norm is at
    most that of the paper's trimming; a sum of exactly 0 elects plus, as in PEFT, where the authors take the
    majority sign of all.

    Args:
        experts: Task vectors. A sparse expert with fewer entries than the budget keeps all of them.
        density: Share of all entries of a parameter that is kept, in (0, 1].
        scale: Of the merged vector, lambda in the paper.

    Returns:
        The merged task vector.

    Raises:
        ValueError: If density is out of range.

    >>> ties([{"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([4.0, -2.0])}], density=0.5)
    {'w': tensor([4., 3.])}
    """
    check_number("density", density, above=0, most=1, hint="0.2 is usual.")
    check_number("scale", scale)

    def trim(parameter: Parameter, part: Part) -> Part:
        return part.keep(_largest(part.values.abs(), int(density * parameter.size)))

    return merge_entries(experts, lambda values_EU, _: scale * _agreeing_mean(values_EU), trim)


def dare(
    experts: Sequence[TaskVector], *, density: float = 0.1, scale: float = 0.4, seed: int = 0
) -> dict[str, Delta]:
    """DARE (arXiv 2311.03099) with task arithmetic: drop at random, rescale, add.

    merged = scale x sum_i m_i delta_i / density, each m_i being 1 with probability `density` and else 0. The
    draw depends on the seed, the name of the parameter and the number of the expert alone. A sparse expert
    draws for its own entries only: another draw than that of its dense form, of the same distribution.

    Args:
        experts: Task vectors.
        density: Probability that an entry stays, in (0, 1]; the paper's 1 - p.
        scale: As in task arithmetic.
        seed: Of the draw.

    Returns:
        The merged task vector.

    Raises:
        ValueError: If density is out of range.
    """
    check_number("density", density, above=0, most=1, hint="0.1 is usual.")
    check_number("scale", scale)
    check_whole("seed", seed, least=0)

    def drop(parameter: Parameter, part: Part) -> Part:
        if density == 1:
            return part
        generator = _generator(seed, parameter.name, part.expert)
        drawn = torch.bernoulli(torch.full(part.values.shape, density), generator=generator)
        return part.keep(drawn.bool(), 1 / density)

    return merge_entries(experts, lambda values_EU, _: scale * values_EU.sum(0), drop)


def breadcrumbs(
    experts: Sequence[TaskVector], *, bottom: float = 0.9, top: float = 0.01, scale: float = 0.4
) -> dict[str, Delta]:
    """Model Breadcrumbs (arXiv 2312.06795): cut both tails of each expert, add the middle.

    Of each parameter an expert loses its int(bottom x entries) smallest and its int(top x entries) largest
    magnitudes; among equal ones the earlier position counts as the larger. merged = scale x sum of the rest.
    In the paper's terms bottom is beta and top is 1 - gamma. No deviation; the code of arXiv 2507.07140 cuts
    the smallest 10% and no outliers.

    Args:
        experts: Task vectors. The entries that a sparse expert does not name count among its smallest.
        bottom: Share of all entries of a parameter, in [0, 1).
        top: Share of all entries of a parameter, in [0, 1); `bottom` and `top` stay below 1 together.
        scale: As in task arithmetic.

    Returns:
        The merged task vector.

    Raises:
        ValueError: If a share is out of range.

    >>> breadcrumbs([{"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}], bottom=0.5, top=0.25, scale=1.0)
    {'w': tensor([0., 0., 3., 0.])}
    """
    check_number("scale", scale)
    check_number("bottom", bottom, least=0, below=1)
    check_number("top", top, least=0, below=1)
    if not bottom + top < 1:
        raise ValueError(
            f"bottom={bottom}, top={top}: must be below 1 together, as 0.9 and 0.01 are. Lower one."
        )

    def cut(parameter: Parameter, part: Part) -> Part:
        size = parameter.size
        magnitudes = part.values.abs()
        outliers = _largest(magnitudes, int(top * size))
        return part.keep(_largest(magnitudes, size - int(bottom * size)) & ~outliers)

    return merge_entries(experts, lambda values_EU, _: scale * values_EU.sum(0), cut)


def consensus(
    experts: Sequence[TaskVector], *, scale: float = 0.4, lam: float = 0.4, agree: int = 2
) -> dict[str, Delta]:
    """Consensus merging with TALL masks (arXiv 2405.07813): keep what several experts use.

    Expert i uses an entry if |delta_i| >= lam x |sum - delta_i|; merged = scale x sum where at least `agree`
    experts use it, else 0. Deviation: one lam for all experts; the paper chooses each on validation data.

    Args:
        experts: Task vectors. With fewer than `agree` experts nothing is left.
        scale: As in task arithmetic.
        lam: Above 0; the larger, the fewer entries an expert uses.
        agree: How many experts must use an entry; 2 drops what one alone uses.

    Returns:
        The merged task vector.

    Raises:
        ValueError: If lam is not above 0, or agree is below 1.

    >>> consensus([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 1.0])}], scale=1.0, lam=0.2)
    {'w': tensor([4., 0.])}
    """
    check_number("scale", scale)
    check_number("lam", lam, above=0, hint="0.4 is usual.")
    check_whole("agree", agree, hint="2 drops what one expert alone uses.")

    def combine(values_EU: Tensor, _: Tensor) -> Tensor:
        sum_U = values_EU.sum(0)
        uses_EU = values_EU.abs() >= lam * (sum_U - values_EU).abs()
        return torch.where(_count(uses_EU) >= agree, scale * sum_U, 0.0)

    return merge_entries(experts, combine)


# ---------------------------------------------------------------- what they share


def _agreeing_mean(values_EU: Tensor) -> Tensor:
    """Mean over the experts whose value has the sign of the sum; 0 where there is none."""
    agrees_EU = torch.where(values_EU.sum(0) >= 0, values_EU > 0, values_EU < 0)
    return (values_EU * agrees_EU).sum(0) / _count(agrees_EU).clamp(min=1)


def _count(chosen_EU: Tensor) -> Tensor:
    """How many experts chose an entry (U), int32. Bytes sum 30 times as fast as bools, in groups that fit."""
    groups = torch.split(chosen_EU.view(torch.uint8), 255)
    return torch.stack([group.sum(0, dtype=torch.uint8).int() for group in groups]).sum(0)


def _largest(magnitudes: Tensor, count: int) -> Tensor:
    """Which entries are the `count` largest, bool; earlier positions first among equal ones."""
    chosen = torch.full(magnitudes.shape, count >= len(magnitudes))
    if 0 < count < len(magnitudes):
        chosen[highest(magnitudes, count)] = True
    return chosen


def _generator(seed: int, name: str, expert: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{expert}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
