"""What ranks tell each other, with torch alone."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def several_ranks() -> bool:
    """Return whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    """Return whether this is the process that writes files for all."""
    return not several_ranks() or dist.get_rank() == 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place; a collective."""
    if several_ranks():
        dist.all_reduce(values)
    return values


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average a tensor over all ranks, in place; a collective."""
    return sum_over_ranks(values).div_(dist.get_world_size()) if several_ranks() else values


def from_rank_zero(values: Tensor) -> Tensor:
    """Overwrite a tensor with that of rank 0, in place; a collective."""
    if several_ranks():
        dist.broadcast(values, 0)
    return values
