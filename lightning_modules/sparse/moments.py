"""Optimiser moments follow the entries that they belong to."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.sharding import sharded_like, whole


def positions(old: Tensor | None, new: Tensor) -> Tensor:
    """Return where each new entry stood among the old ones.

    Args:
        old: Sorted positions within the weight (K); None for all.
        new: Sorted positions within the weight (L).

    Returns:
        Index into the old ones, -1 for an entry that was not among them (L), int64.
    """
    if old is None:
        return new.long()
    if not len(old):
        return torch.full_like(new, -1, dtype=torch.int64)
    new = new.to(old.dtype)
    found = torch.searchsorted(old, new).clamp(max=len(old) - 1)
    return torch.where(old[found] == new, found, -1)


def taken(vector: Tensor, source: Tensor) -> Tensor:
    """Return the entries of `vector` at `source`, zero where it is -1."""
    if not len(vector):
        return torch.zeros(len(source), dtype=vector.dtype, device=vector.device)
    return torch.where(source < 0, torch.zeros((), dtype=vector.dtype), vector[source.clamp(min=0)])


def carry_moments(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, source: Tensor | None) -> None:
    """Let an optimiser go on with other entries of a weight.

    Args:
        optimizer: Trains `old`.
        old: The values until now (K).
        new: The values from now on (L); may be the same parameter.
        source: What `positions` returned: moments of kept entries follow them, those of new entries are zero.
            None forgets all, the step count included, as at the start of training.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None or source is None:
        return
    optimizer.state[new] = {
        name: sharded_like(taken(whole(moment), source), new)
        if isinstance(moment, Tensor) and moment.shape == old.shape
        else moment
        for name, moment in state.items()
    }
