"""What several processes need to agree on: random states, sums, and when gradients are exchanged."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, Strategy
from torch import Tensor


def rng_state() -> dict[str, Any]:
    """Return the state of every random generator of this process, as data that a safe load accepts."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype("int64")), position, has_gauss, cached),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    version, internal, gauss = state["python"]
    name, keys, position, has_gauss, cached = state["numpy"]
    torch.set_rng_state(state["torch"].cpu())
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def gathered(mine: Any) -> list[Any]:
    """Collect an object from every rank.

    Args:
        mine: This rank's; must be picklable.

    Returns:
        One entry per rank. On several ranks this is a collective: all of them must call it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts


def all_sum(strategy: Strategy, values: Tensor) -> Tensor:
    """Sum a tensor over all ranks.

    Args:
        strategy: The Trainer's strategy.
        values: Any shape; the same on every rank.

    Returns:
        The sum, equal on every rank.
    """
    total = strategy.reduce(values.to(strategy.root_device), reduce_op="sum")
    assert isinstance(total, Tensor)
    return total


def gradient_exchange(strategy: Strategy, *, enabled: bool) -> AbstractContextManager[Any]:
    """Return a context whose backward passes exchange gradients between ranks, or only add them up locally.

    Ranks may run different numbers of backward passes as long as each exchanges exactly once per update.
    """
    if enabled or not isinstance(strategy, ParallelStrategy):
        return nullcontext()
    return strategy.block_backward_sync()


def largest(strategy: Strategy, number: int) -> int:
    """Return the largest number of all ranks; a collective."""
    found = strategy.reduce(torch.tensor(number, device=strategy.root_device), reduce_op="max")
    return int(found)


def rewrap(strategy: Strategy) -> None:
    """Let DDP exchange the gradients of the parameters there are now; it knows those of its start alone."""
    if isinstance(strategy, DDPStrategy):
        assert strategy.lightning_module is not None
        strategy.model = strategy._setup_model(strategy.lightning_module)
