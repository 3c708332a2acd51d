"""Says how many trained weights of half precision stand still, because their updates are rounded away."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.ranks import sum_over_ranks
from lightning_modules.rounding import name_of
from lightning_modules.sharding import local

NEGLIGIBLE = 0.1
"""Share of trained weights that stand still below which nothing is said."""
_SAMPLE = 1 << 16  # entries of each parameter, which is enough for a share


def watch_half_precision(optimizer: Optimizer) -> None:
    """Warn after an optimiser's first step if weights with a gradient have not moved; the same on every rank.

    A weight in bfloat16 that is trained itself, without a copy in float32, loses every update that is smaller than
    half a step of its type: about 1/500 of the weight. Measured on up to 65,536 entries of each parameter.

    Args:
        optimizer: With its parameters. Nothing is done where none of them is of half precision.
    """
    halves = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.dtype in (torch.bfloat16, torch.float16)
    ]
    if not halves:
        return
    before: list[tuple[nn.Parameter, Tensor, Tensor]] = []
    is_over = False

    def keep(*_: Any) -> None:
        if is_over:
            return
        before.clear()  # of a step that was not made
        before.extend(
            (parameter, _sample(parameter).clone(), _sample(parameter.grad) != 0)
            for parameter in halves
            if parameter.grad is not None
        )

    def compare(*_: Any) -> None:
        nonlocal is_over
        if is_over:
            return
        counts = torch.zeros(2, dtype=torch.float64, device=local(halves[0]).device)
        for parameter, old, pulled in before:
            counts[0] += pulled.sum()
            counts[1] += (pulled & (_sample(parameter) == old)).sum()
        before.clear()
        pulled, still = sum_over_ranks(counts).tolist()
        if not pulled:
            return
        is_over = True
        if still / pulled < NEGLIGIBLE:
            return
        names = " and ".join(sorted({name_of(parameter.dtype) for parameter in halves}))
        rank_zero_warn(
            f"Weights of {names} are trained themselves. Measured at the first update: {still / pulled:.0%} of those "
            "with a gradient have not moved, because their update is smaller than the type can hold. Set model.dtype: "
            "float32 (with trainer.precision: bf16-mixed to compute in bfloat16), or train an adapter."
        )

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(compare)


def _sample(tensor: Tensor) -> Tensor:
    """Return evenly spaced entries of what this rank holds."""
    flat = local(tensor.detach()).flatten()
    return flat[:: max(1, len(flat) // _SAMPLE)]
