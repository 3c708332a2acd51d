"""What autograd keeps for a backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch


def saved_bytes(call: Callable[[], torch.Tensor]) -> dict[int, int]:
    """Return the bytes of each storage that a call keeps, by where it lies."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _output = call()
    return kept
