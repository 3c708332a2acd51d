"""The rows that are decoded together, and their cache: rows leave, and others join.

Shapes: B rows, S cached positions, V vocabulary. All rows end at the same column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 64
_WHOLE_ROOM = 16  # which attention reads in vain


class RowCache(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer (B, heads, S, width), with room for more.

    The layer of transformers copies everything for every token. This one copies everything when the room is full.

    Args:
        whole: Whether attention gets the room too, zeros that a mask must hide: its products are slow on CPUs where
            rows and heads do not follow one another without gaps.
    """

    keys: Tensor  # of all positions so far: the front part of the rooms
    values: Tensor

    def __init__(self, whole: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._whole, self._more = whole, _WHOLE_ROOM if whole else _ROOM
        self._rooms: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Append positions and return all; those of a prompt, which come first, without room."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        if not start:
            self.keys, self.values = _alone(key_states), _alone(value_states)
            return self.keys, self.values
        end = start + key_states.shape[-2]
        if self._room < end:
            self._rooms = [
                new.new_empty(*new.shape[:-2], end + self._more, new.shape[-1])
                for new in (key_states, value_states)
            ]
            self._rooms[0][..., :start, :] = self.keys
            self._rooms[1][..., :start, :] = self.values
            for room in self._rooms:
                room[..., end:, :] = 0
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., start:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self._rooms)
        return (self._rooms[0], self._rooms[1]) if self._whole else (self.keys, self.values)

    def columns(self, positions: int) -> int:
        """Return how many columns attention gets when so many positions are cached."""
        if not self._whole:
            return positions
        return self._room if positions <= self._room else positions + self._more

    @property
    def _room(self) -> int:
        return self._rooms[0].shape[-2] if self._rooms else 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.select(indices, 0)

    def select(self, indices: Tensor, first: int) -> None:
        """Keep these rows, from column `first` on."""
        self._rooms = []
        self.keys = self.keys[..., first:, :][indices]
        self.values = self.values[..., first:, :][indices]

    def join(self, others: Sequence[RowCache]) -> None:
        """Add the rows of others, with zeros on the left of the shorter ones."""
        self._rooms = []
        layers = [self, *others]
        width = max(layer.keys.shape[-2] for layer in layers)
        self.keys = torch.cat([_widen(layer.keys, width) for layer in layers])
        self.values = torch.cat([_widen(layer.values, width) for layer in layers])


def _widen(states: Tensor, width: int) -> Tensor:
    return functional.pad(states, (0, 0, width - states.shape[-2], 0))


def _alone(states: Tensor) -> Tensor:
    """Copy what would keep more than itself, as keys do that are cut from one product with queries and values."""
    held = states.untyped_storage().nbytes()
    return states.clone() if held > states.numel() * states.element_size() else states


class RowBatch:
    """Rows that are decoded together.

    Args:
        rows: Their numbers (B).
        cache: With layers of the kind `RowCache`.
        width: Cached positions, S.
        pads_B: Padding of each row, int64.
        seen_BV: Tokens that each row holds, where somebody wants to know.
        done_B: Rows that ended; by default none.
    """

    def __init__(
        self,
        rows: list[int],
        cache: DynamicCache,
        width: int,
        pads_B: Tensor,
        seen_BV: Tensor | None = None,
        done_B: Tensor | None = None,
    ) -> None:
        self.rows, self.cache, self.width, self.pads_B, self.seen_BV = rows, cache, width, pads_B, seen_BV
        self.rows_B = torch.tensor(rows, device=pads_B.device)
        self.done_B = torch.zeros_like(pads_B, dtype=torch.bool) if done_B is None else done_B
        self.padded = bool(pads_B.any())

    @property
    def columns(self) -> int:
        """How many columns attention gets, of which the first `width` count."""
        columns: int = self.cache.layers[0].columns(self.width)
        return columns

    def keep_live(self) -> RowBatch | None:
        """Return the rows that have not ended, without columns that are padding in all of them; None if all ended.

        Uses up this batch and its cache.
        """
        index_K = (~self.done_B).nonzero()[:, 0]
        index = index_K.tolist()
        if len(index) == len(self.rows):
            return self
        if not index:
            return None
        first = int(self.pads_B[index_K].min())
        for layer in self.cache.layers:
            layer.select(index_K, first)
        return RowBatch(
            [self.rows[position] for position in index],
            self.cache,
            self.width - first,
            self.pads_B[index_K] - first,
            None if self.seen_BV is None else self.seen_BV[index_K],
        )

    def join(self, *others: RowBatch) -> RowBatch:
        """Return the rows of all. Uses up all batches and their caches."""
        if not others:
            return self
        batches = [self, *others]
        width = max(batch.width for batch in batches)
        for number, own in enumerate(self.cache.layers):
            own.join([other.cache.layers[number] for other in others])
        seen = [batch.seen_BV for batch in batches if batch.seen_BV is not None]
        return RowBatch(
            [row for batch in batches for row in batch.rows],
            self.cache,
            width,
            torch.cat([batch.pads_B + width - batch.width for batch in batches]),
            torch.cat(seen) if seen else None,
            torch.cat([batch.done_B for batch in batches]),
        )
