"""The loop behind every method that merges entry by entry. Torch alone.

E counts the experts that change a parameter, U the entries that are worked on: where all of these experts are
sparse, those that any of them touches, and the result is sparse; else all. An expert touches an entry of a
sparse delta by naming it, and one of a dense delta by changing it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_modules.merging.vectors import Delta, Parameter, Part, TaskVector, parameters
from lightning_modules.sparse.delta import SparseDelta

# Entries of a parameter that are worked on at a time: few enough to stay in a processor's cache.
CHUNK = 1 << 17

# (values_EU, touched_EU) -> merged_U
Combine = Callable[[Tensor, Tensor], Tensor]
# What one expert does to its own part first.
Prepare = Callable[[Parameter, Part], Part]


def unprepared(_: Parameter, part: Part) -> Part:
    """Return a part as it is."""
    return part


def merge_entries(
    experts: Sequence[TaskVector], combine: Combine, prepare: Prepare = unprepared
) -> dict[str, Delta]:
    """Prepare each expert's part of a parameter by itself, then combine them entry by entry.

    Args:
        experts: Task vectors.
        combine: Turns float32 values, 0 where an expert does not touch an entry, and what is touched, bool,
            both (E, U), into merged values (U).
        prepare: Drops entries of one expert.

    Returns:
        The merged task vector: float32 tensors, and sparse deltas without zeros.
    """
    return {parameter.name: _merged(parameter, combine, prepare) for parameter in parameters(experts)}


def _merged(parameter: Parameter, combine: Combine, prepare: Prepare) -> Delta:
    parts = [prepare(parameter, part) for part in parameter.parts]
    spans = [(start, min(start + CHUNK, parameter.size)) for start in range(0, max(1, parameter.size), CHUNK)]
    if not parameter.is_sparse:
        assert parameter.shape is not None
        return torch.cat([_dense_span(parts, *span, combine) for span in spans]).view(parameter.shape)
    results = [_sparse_span(parts, *span, combine) for span in spans]
    indices = torch.cat([indices for indices, _ in results])
    if parameter.size < 2**31:
        indices = indices.int()
    return SparseDelta(indices, torch.cat([values for _, values in results]), parameter.shape)


def _dense_span(parts: Sequence[Part], start: int, stop: int, combine: Combine) -> Tensor:
    """Merge all entries from start to before stop."""
    values_EU = torch.zeros(len(parts), stop - start)
    touched_EU = torch.zeros(len(parts), stop - start, dtype=torch.bool)
    for row, part in enumerate(parts):
        at, values = part.within(start, stop)
        values_EU[row, at] = values
        touched_EU[row, at] = values != 0 if part.indices is None else torch.ones((), dtype=torch.bool)
    return combine(values_EU, touched_EU)


def _sparse_span(parts: Sequence[Part], start: int, stop: int, combine: Combine) -> tuple[Tensor, Tensor]:
    """Merge the touched entries from start to before stop; return positions and values."""
    pieces = [part.within(start, stop) for part in parts]
    any_touches = torch.zeros(stop - start, dtype=torch.bool)
    for at, _ in pieces:
        any_touches[at] = True
    positions_U = any_touches.nonzero().flatten()
    column_of = any_touches.cumsum(0, dtype=torch.int32) - 1
    values_EU = torch.zeros(len(parts), len(positions_U))
    touched_EU = torch.zeros(len(parts), len(positions_U), dtype=torch.bool)
    for row, (at, values) in enumerate(pieces):
        columns = column_of[at].long()
        values_EU[row, columns] = values
        touched_EU[row, columns] = True
    merged_U = combine(values_EU, touched_EU)
    left = merged_U != 0  # an entry where nothing is left needs no place in the result
    return positions_U[left] + start, merged_U[left]
