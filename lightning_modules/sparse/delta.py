"""SparseDelta: the change of one weight, where it is not zero."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SparseDelta(NamedTuple):
    """A change of K entries of one weight.

    Attributes:
        indices: Positions in the flattened weight, sorted and unique, int32 or int64 (K).
        values: What is added there, float32 (K).
        shape: Shape of the weight; None where only element-wise work is done.
    """

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...] | None = None

    def dense(self) -> Tensor:
        """Return the change as a tensor of the weight's shape, zero elsewhere.

        Raises:
            ValueError: If the shape is not known.
        """
        if self.shape is None:
            raise ValueError(
                "This sparse delta has no shape. Give it one: SparseDelta(indices, values, shape)."
            )
        dense = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        write_entries(dense, self.indices, self.values)
        return dense


def write_entries(weight: Tensor, indices: Tensor, entries: Tensor) -> None:
    """Overwrite entries of a weight in place; deterministic, which `put_` is not, and as fast.

    Args:
        weight: Contiguous, any shape; its memory is written.
        indices: Positions in the flattened weight, unique (K).
        entries: What is written there, of the weight's type (K).
    """
    weight.view(-1).index_copy_(0, indices.long(), entries)


def check_indices(name: str, indices: Tensor, size: int) -> None:
    """Check positions within a flattened weight.

    Args:
        name: Of the weight, for messages.
        indices: int32 or int64 (K).
        size: Number of entries of the weight.

    Raises:
        ValueError: If they are no integer vector, not sorted, not unique, or out of range.
    """
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        raise ValueError(
            f"{name}: indices are {indices.dtype} of {indices.dim()} dimensions, not one of int32."
        )
    if not len(indices):
        return
    if not bool((indices[1:] > indices[:-1]).all()):
        at = int((indices[1:] <= indices[:-1]).nonzero()[0]) + 1
        raise ValueError(f"{name}: indices must be sorted without repetition, but number {at} is not larger.")
    if int(indices[0]) < 0 or int(indices[-1]) >= size:
        raise ValueError(
            f"{name}: indices reach from {int(indices[0])} to {int(indices[-1])}, but the weight has {size} "
            "entries."
        )
