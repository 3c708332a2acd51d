"""Loaders that shard rows over ranks, resume in the middle of an epoch, and leave the global RNG alone.

They are plain iterables, not `torch.utils.data.DataLoader`s: Lightning would rebuild a DataLoader around a
`DistributedSampler`, whose padding repeats validation rows and whose position is not saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from datamodules.batches import TextBatch


class TextLoader(ABC):
    """An iterable over the batches of one rank.

    Args:
        collate: Turns row indices into a batch.
        num_rows: N, rows of one epoch over all ranks.
        batch_size: b, prompts per rank and step.
        rank: r, this process among the data-parallel processes.
        world_size: W, number of data-parallel processes.
    """

    def __init__(
        self,
        collate: Callable[[Sequence[int]], TextBatch],
        num_rows: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self._collate = collate

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches of one pass on this rank."""

    @abstractmethod
    def __iter__(self) -> Iterator[TextBatch]:
        """Return one pass of `len(self)` batches."""


class TrainLoader(TextLoader):
    """An endless stream of epochs, cut into passes of `len(self)` batches.

    Step s of an epoch takes positions [s*b*W, (s+1)*b*W) of the epoch's order; rank r gets the r-th
    contiguous block of b. No row is dropped and every rank gets equally many full batches: the last global
    batch is filled up with the first rows of the same order, so less than one global batch of rows is seen
    twice in an epoch.

    `iter()` goes on where the last pass stopped, it does not start over. So a run that stops anywhere and
    resumes sees what an uninterrupted run sees, `limit_train_batches` still visits every row, and after a
    resume under another world size (when Lightning's batch counter no longer divides the epoch in the same
    way) the rest of the epoch follows, without a gap or a repetition. Each such pass may span two epochs.

    The state is the same on all ranks: rows consumed by all of them together. A batch counts as consumed
    when it is handed out.

    Args:
        collate: Turns row indices into a batch.
        num_rows: N, rows of one epoch over all ranks.
        batch_size: b, prompts per rank and step.
        rank: r, this process among the data-parallel processes.
        world_size: W, number of data-parallel processes.
        order: Gives the row indices of an epoch, (N,) int64; must depend on the epoch number alone.

    Raises:
        ValueError: One global batch needs more rows than there are.
    """

    def __init__(
        self,
        collate: Callable[[Sequence[int]], TextBatch],
        num_rows: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        order: Callable[[int], torch.Tensor],
    ) -> None:
        super().__init__(collate, num_rows, batch_size, rank, world_size)
        if batch_size * world_size > num_rows:
            raise ValueError(
                f"batch_size={batch_size} on {world_size} rank(s) takes {batch_size * world_size} rows a "
                f"step, but an epoch has only {num_rows}: lower batch_size to at most "
                f"{num_rows // world_size}, use fewer ranks, or add data"
            )
        self._order = order
        self._epoch = 0
        self._position = 0
        self._cached_order: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        """Return ceil(N / (b*W)), also after a resume: Lightning counts the batches already seen itself."""
        return -(-self.num_rows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[TextBatch]:
        """Return the next `len(self)` batches of the stream; nothing happens before the first `next()`."""
        for _ in range(len(self)):
            yield self._next_batch()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, equal on all ranks."""
        return {"epoch": self._epoch, "position": self._position, "num_rows": self.num_rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position; batch size and world size may differ from those of the saving run.

        Raises:
            ValueError: The state belongs to a data set of another size, in which positions mean other rows.
        """
        if state_dict["num_rows"] != self.num_rows:
            raise ValueError(
                f"the checkpoint was made with {state_dict['num_rows']} training rows an epoch, this run has "
                f"{self.num_rows}; resume with the same data, or start anew from the checkpoint's weights"
            )
        self._epoch = state_dict["epoch"]
        self._position = state_dict["position"]

    def _next_batch(self) -> TextBatch:
        if self._cached_order is None or self._cached_order[0] != self._epoch:
            self._cached_order = (self._epoch, self._order(self._epoch))
        positions = torch.arange(self.batch_size) + self._position + self.rank * self.batch_size
        batch = self._collate(self._cached_order[1][positions % self.num_rows].tolist())
        self._position += self.batch_size * self.world_size
        if self._position >= self.num_rows:
            self._epoch += 1
            self._position = 0
        return batch


class EvalLoader(TextLoader):
    """Each row exactly once over all ranks, in order, from the start at every `iter()`.

    Rank r takes rows r, r + W, r + 2W, ... and splits them evenly into ceil(ceil(N / W) / b) batches of at
    most b rows. So all ranks have the same number of batches, which collective calls inside a validation
    step need, except that with b = 1, or with fewer rows than ranks, some ranks have one batch less. A rank
    without any batch makes Lightning raise: validate on at least W rows.
    """

    def __len__(self) -> int:
        """Return the number of batches of this rank; 0 if it has no row."""
        longest_share = -(-self.num_rows // self.world_size)
        return min(-(-longest_share // self.batch_size), len(self._share()))

    def __iter__(self) -> Iterator[TextBatch]:
        """Return all batches of this rank."""
        share = self._share()
        num_batches = len(self)
        for index in range(num_batches):
            first, end = (len(share) * edge // num_batches for edge in (index, index + 1))
            yield self._collate(share[first:end])

    def _share(self) -> range:
        return range(self.rank, self.num_rows, self.world_size)
