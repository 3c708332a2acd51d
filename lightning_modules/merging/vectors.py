"""Task vectors: what experts change, parameter by parameter, dense or sparse. Torch alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_modules.sparse.delta import SparseDelta, check_indices

# What one expert adds to one parameter; a plain tuple is (indices, values) of the flattened parameter.
Delta = Tensor | SparseDelta | tuple[Tensor, Tensor]
# What one expert adds to each parameter that it changes.
TaskVector = Mapping[str, Delta]


@dataclass(frozen=True)
class Part:
    """What one expert adds to one parameter, flattened.

    Attributes:
        expert: Number of the expert, from 1.
        values: Float32: all entries, or those at `indices` (K).
        indices: Sorted positions (K); None where `values` has all entries.
    """

    expert: int
    values: Tensor
    indices: Tensor | None = None

    def keep(self, chosen: Tensor, factor: float = 1.0) -> Part:
        """Drop entries.

        Args:
            chosen: Which of `values` stay, bool, of the same length.
            factor: By which those that stay are multiplied.

        Returns:
            The rest: a sparse part gets shorter, a dense part gets zeros.
        """
        if self.indices is None:
            return replace(self, values=torch.where(chosen, self.values * factor, 0.0))
        return replace(self, values=self.values[chosen] * factor, indices=self.indices[chosen])

    def within(self, start: int, stop: int) -> tuple[Tensor | slice, Tensor]:
        """Return positions relative to `start`, and values, of the entries from `start` to before `stop`."""
        if self.indices is None:
            return slice(None), self.values[start:stop]
        bounds = torch.tensor([start, stop], dtype=self.indices.dtype)
        first, last = torch.searchsorted(self.indices, bounds).tolist()
        return self.indices[first:last].long() - start, self.values[first:last]


@dataclass(frozen=True)
class Parameter:
    """One parameter, as all experts change it.

    Attributes:
        name: Of the parameter.
        num_experts: All of them, those that leave it alone too.
        size: Number of entries.
        shape: None where only plain (indices, values) tuples were given.
        parts: Of the experts that change it, in their order.
    """

    name: str
    num_experts: int
    size: int
    shape: tuple[int, ...] | None
    parts: list[Part]

    @property
    def is_sparse(self) -> bool:
        """Whether all experts that change it are sparse."""
        return all(part.indices is not None for part in self.parts)

    def dense(self) -> list[Tensor]:
        """Return each part as a tensor of the parameter's shape, float32.

        Raises:
            ValueError: If the shape is not known.
        """
        if self.shape is None:
            raise ValueError(
                f"{self.name}: this method needs the shape of the parameter. Give SparseDelta(indices, "
                "values, shape) in place of (indices, values)."
            )
        return [
            part.values.view(self.shape)
            if part.indices is None
            else SparseDelta(part.indices, part.values, self.shape).dense()
            for part in self.parts
        ]


def parameters(experts: Sequence[TaskVector]) -> Iterator[Parameter]:
    """Collect the experts' changes parameter by parameter, in the order in which they first appear.

    Args:
        experts: At least one task vector.

    Yields:
        Each parameter that any expert changes.

    Raises:
        ValueError: If there is no expert, if shapes of a parameter clash, or if indices are not sorted, not
            unique or out of range.
    """
    if not experts:
        raise ValueError("experts is empty: merging needs at least one task vector.")
    for name in dict.fromkeys(name for expert in experts for name in expert):
        deltas = {number: expert[name] for number, expert in enumerate(experts, 1) if name in expert}
        shape = _common_shape(name, deltas)
        size = _inferred_size(deltas) if shape is None else math.prod(shape)
        parts = [_part(name, number, delta, size) for number, delta in deltas.items()]
        yield Parameter(name, len(experts), size, shape, parts)


def _common_shape(name: str, deltas: Mapping[int, Delta]) -> tuple[int, ...] | None:
    shapes = {number: shape for number, delta in deltas.items() if (shape := _shape(delta)) is not None}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{shape} in expert {number}" for number, shape in shapes.items())
        raise ValueError(f"{name}: shapes clash: {listed}. Merge experts of one base model.")
    return next(iter(shapes.values()), None)


def _shape(delta: Delta) -> tuple[int, ...] | None:
    if isinstance(delta, Tensor):
        return tuple(delta.shape)
    return tuple(delta.shape) if isinstance(delta, SparseDelta) and delta.shape is not None else None


def _inferred_size(deltas: Mapping[int, Delta]) -> int:
    return max((int(delta[0].max()) + 1 for delta in deltas.values() if len(delta[0])), default=0)


def _part(name: str, number: int, delta: Delta, size: int) -> Part:
    if isinstance(delta, Tensor):
        return Part(number, delta.detach().float().flatten())
    indices, values = delta[0], delta[1]
    check_indices(f"{name} in expert {number}", indices, size)
    if values.shape != indices.shape:
        raise ValueError(f"{name} in expert {number}: {len(values)} values for {len(indices)} indices.")
    return Part(number, values.detach().float(), indices)
