"""How the rows of an update go through the model: whole, with the LM head in chunks, or with one pass per prompt.

All three give the same log-probabilities and gradients, to rounding; they differ in time and memory.
Shapes: b rows, T completion tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from lightning_modules.grpo.groups import Row
from lightning_modules.head import CHUNK
from lightning_modules.headless import can_chunk, chunked_logprobs
from lightning_modules.logprobs import whole_logprobs
from lightning_modules.microbatches import PaddedRows, pad_rows, plan_micro_batches
from lightning_modules.prefix import (
    Announce,
    SharedRows,
    can_share,
    plan_shared_micro_batches,
    prompt_keys,
    share_prompts,
    shared_logprobs,
)
from lightning_modules.rope import see_rows_alone

Inputs = TypeVar("Inputs", PaddedRows, SharedRows)


class Passes(ABC, Generic[Inputs]):
    """A way through the model."""

    @abstractmethod
    def bundles(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Return rows that are cheaper together than apart."""

    @abstractmethod
    def plan(self, rows: Sequence[Row], max_tokens: int) -> list[list[int]]:
        """Group rows into micro-batches.

        Args:
            rows: Of a rank.
            max_tokens: Limit of the tokens of a pass, padding included; a single longer row forms a group of its own.

        Returns:
            Positions in `rows`.
        """

    def max_logits(self, max_tokens: int, vocab_size: int) -> int:
        """Return how many logits a pass holds at most.

        Args:
            max_tokens: Of a micro-batch.
            vocab_size: Width of the logits.
        """
        return min(CHUNK, max_tokens * vocab_size)

    @abstractmethod
    def pad(self, rows: Sequence[Row], *, pad_token_id: int, device: torch.device) -> Inputs:
        """Return a micro-batch as tensors.

        Args:
            rows: b.
            pad_token_id: Filler; masked everywhere.
            device: Where the tensors go.
        """

    @abstractmethod
    def logprobs(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        temperature: float,
        announce: Announce,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies of the completions.

        Args:
            model: The policy.
            inputs: From `pad`.
            temperature: Of the sampling; 0 (greedy) leaves logits as they are.
            announce: Called before each pass with the rows that it is about.
            entropy_gradient: Whether the entropy carries a gradient.

        Returns:
            Nats, float32 (b, T) each; what stands on padding does not count.
        """


class PaddedPasses(Passes[PaddedRows]):
    """Every row with its prompt."""

    def bundles(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Return each row alone."""
        return [[row] for row in rows]

    def plan(self, rows: Sequence[Row], max_tokens: int) -> list[list[int]]:
        """Group rows by length."""
        return plan_micro_batches([len(row) for row in rows], max_tokens)

    def pad(self, rows: Sequence[Row], *, pad_token_id: int, device: torch.device) -> PaddedRows:
        """Pad rows to their own longest prompt and completion."""
        return pad_rows(
            [row.prompt_ids for row in rows],
            [row.token_ids for row in rows],
            pad_token_id=pad_token_id,
            device=device,
        )

    def logprobs(
        self,
        model: nn.Module,
        inputs: PaddedRows,
        *,
        temperature: float,
        announce: Announce,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run one pass."""
        announce(range(len(inputs.input_ids)))
        return self._run(model, inputs, temperature=temperature, entropy_gradient=entropy_gradient)

    @staticmethod
    @abstractmethod
    def _run(
        model: nn.Module, rows: PaddedRows, *, temperature: float, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies (b, T) each."""


class WholePasses(PaddedPasses):
    """Every row with its prompt, and the logits of all its completion tokens: serves any causal language model."""

    _run = staticmethod(whole_logprobs)

    def max_logits(self, max_tokens: int, vocab_size: int) -> int:
        """Return those of all tokens."""
        return max_tokens * vocab_size


class ChunkedPasses(PaddedPasses):
    """Every row with its prompt; the logits of a few tokens at a time. See `can_chunk`."""

    _run = staticmethod(chunked_logprobs)


class SharedPasses(Passes[SharedRows]):
    """Each distinct prompt once, then the completions on top of it, and the head in chunks. See `can_share`."""

    def bundles(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Return the rows of each prompt."""
        found: dict[Hashable, list[Row]] = {}
        for key, row in zip(_keys(rows), rows, strict=True):
            found.setdefault(key, []).append(row)
        return list(found.values())

    def plan(self, rows: Sequence[Row], max_tokens: int) -> list[list[int]]:
        """Keep the rows of a prompt together, which counts once."""
        lengths = [(len(row.prompt_ids), len(row.token_ids)) for row in rows]
        return plan_shared_micro_batches(_keys(rows), lengths, max_tokens)

    def pad(self, rows: Sequence[Row], *, pad_token_id: int, device: torch.device) -> SharedRows:
        """Pad prompts and completions, each to their own longest."""
        return share_prompts(
            [row.prompt_ids for row in rows],
            [row.token_ids for row in rows],
            pad_token_id=pad_token_id,
            device=device,
            kinds=_kinds(rows),
        )

    def logprobs(
        self,
        model: nn.Module,
        inputs: SharedRows,
        *,
        temperature: float,
        announce: Announce,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run a pass over the prompts, then the completions."""
        return shared_logprobs(
            model, inputs, temperature=temperature, entropy_gradient=entropy_gradient, announce=announce
        )


def best_passes(
    model: nn.Module, *, tries: bool = True
) -> tuple[Passes[PaddedRows] | Passes[SharedRows], str | None]:
    """Return the cheapest way that serves a model, and why it is not a cheaper one.

    Tries a few tokens: a collective under sharding. An adapter that routes rows must have heard of one row. From here
    on the model sees each row alone, as all ways take for granted; see `see_rows_alone`.

    Args:
        model: The policy.
        tries: Whether tokens are run; without, only what is known of the model's parts is looked at.
    """
    see_rows_alone(model)
    unshared = can_share(model, tries=tries)
    if unshared is None:
        return SharedPasses(), None
    unchunked = can_chunk(model, tries=tries)
    if unchunked is None:
        return ChunkedPasses(), f"The update reads a prompt once for each of its completions: {unshared}."
    return WholePasses(), f"The update keeps all logits of its completions: {unchunked}."


def _keys(rows: Sequence[Row]) -> list[Hashable]:
    return prompt_keys([row.prompt_ids for row in rows], _kinds(rows))


def _kinds(rows: Sequence[Row]) -> list[Hashable]:
    """What an adapter may route by besides token ids."""
    return [(row.task, str(row.prompt)) for row in rows]
