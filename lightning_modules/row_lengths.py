"""Rows that do not fit the model's context: found before the first step, and refused or left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.batches import TextBatch

_AT_ONCE = 256
# Rows of which even this many bytes for each byte of text, and those more, are fewer than the limit fit untokenised: no
# token has less than a byte, and chat templates add little.
_BYTES, _TEMPLATE = 2, 4096


class RowSource(Protocol):
    """A DataModule whose rows can be measured before training."""

    def num_rows(self, split: Any) -> int:
        """Return the number of rows of a split."""

    def collate(self, split: Any, indices: Sequence[int]) -> TextBatch:
        """Return some rows."""

    def row_name(self, split: Any, index: int) -> str:
        """Return where a row is."""

    def leave_out(self, split: Any, rows: Sequence[int]) -> None:
        """Give these rows to nobody."""


def check_lengths(
    data: RowSource,
    split: str,
    needed: Callable[[TextBatch], Sequence[tuple[int, int]]],
    limit: int,
    *,
    room: int,
    drops: bool,
) -> None:
    """Find the rows of a split that do not fit the context.

    Args:
        data: The rows.
        split: Of it.
        needed: Returns tokens of the prompt, and of what comes after it, for each row of a batch.
        limit: Of both together.
        room: The most tokens that may be drawn after a prompt.
        drops: Whether such rows are left out and counted; else the first is refused.

    Raises:
        ValueError: If a row is too long, or all are.
    """
    too_long = []
    number = data.num_rows(split)
    for start in range(0, number, _AT_ONCE):
        indices = range(start, min(start + _AT_ONCE, number))
        batch = data.collate(split, indices)
        doubtful = [i for i in range(len(batch)) if not _is_short(batch, i, limit - room)]
        if not doubtful:
            continue
        for i, (prompt, rest) in zip(doubtful, needed(batch.take(doubtful)), strict=True):
            if prompt + rest <= limit:
                continue
            if not drops:
                raise ValueError(
                    f"{data.row_name(split, indices[i])}: its prompt has {prompt} tokens and its completion up to "
                    f"{rest}: {prompt + rest} together, over the {limit} of the model's context. Shorten the row, "
                    "lower max_new_tokens, or leave such rows out with overlong_rows: drop."
                )
            too_long.append(indices[i])
    if too_long:
        if len(too_long) == number:
            raise ValueError(
                f"All {number} rows of the {split} split are longer than the model's context of {limit}."
            )
        rank_zero_warn(
            f"{len(too_long)} of {number} rows of the {split} split are left out: they do not fit the model's context "
            f"of {limit} tokens. The first is {data.row_name(split, too_long[0])}."
        )
        data.leave_out(split, too_long)


def _is_short(batch: TextBatch, row: int, limit: int) -> bool:
    texts = [batch.answers[row], *batch.choices[row]]
    size = _bytes(batch.prompts[row]) + max(map(_bytes, texts))
    return _BYTES * size + _TEMPLATE <= limit


def _bytes(value: object) -> int:
    return len(str(value).encode(errors="replace"))
