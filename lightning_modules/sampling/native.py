"""NativeSampler: each prompt is read once, its rows are decoded together, and rows that ended leave.

Shapes: B rows decoded now, D distinct prompts.
"""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lightning_modules.ranges import check_whole
from lightning_modules.rope import grows_beyond, see_rows_alone
from lightning_modules.sampling.base import Announce, Completions, Sampler, Sampling
from lightning_modules.sampling.batch import RowBatch
from lightning_modules.sampling.decoding import Decoding
from lightning_modules.sampling.generate import (
    GenerateSampler,
    check_context,
    core_model,
    sampling_state,
)
from lightning_modules.sampling.packed import packed_weights
from lightning_modules.sampling.stops import stop_tokens
from lightning_modules.sharding import is_whole

# Rows leave when at least one in so many has ended: leaving copies the cache of those that stay, about what one
# step with a concatenated cache costs.
_SHARE = 8
_NEEDED = ("attention_mask", "position_ids", "past_key_values", "logits_to_keep")


class NativeSampler(Sampler):
    """Samples with a decoding loop of its own, which does for G completions of a prompt what they share only once.

    Prompts are sorted by length. It draws what `GenerateSampler` draws, and hands over to it what it cannot serve:
    models whose cache is more than keys and values of all positions, and sharded ones, whose ranks must stay in step.

    Args:
        max_rows: Rows that are decoded together; others wait until rows have ended. A prompt whose rows do not fit
            together is read again for the later ones.
        max_tokens: Limit of the cache: rows x (longest prompt among them + `max_new_tokens`). None sets none.
        pack_weights: Whether a half-precision model on a CPU is drawn from by copies of its linear layers' weights,
            which is faster and needs their memory once more. See `packed_weights`.
    """

    def __init__(self, max_rows: int = 256, max_tokens: int | None = None, pack_weights: bool = True) -> None:
        check_whole("max_rows", max_rows)
        check_whole("max_tokens", max_tokens, least=2, none=True, hint="A prompt and a token must fit.")
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.pack_weights = pack_weights
        self._warned = False

    def bind(self, model: nn.Module, tokenizer: Any) -> None:
        """Take model and tokenizer."""
        self._model, self._tokenizer = model, tokenizer
        self._unserved = _why_unserved(model)
        see_rows_alone(model)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        announce: Announce | None = None,
        seeds: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
    ) -> Completions:
        """Draw one completion per row with the model in evaluation mode.

        Raises:
            ValueError: If a prompt is empty or does not fit the model's context or `max_tokens` together with
                its completion, or the model's logits are not finite.
        """
        self._check(prompts, sampling)
        reason = self._unserved
        if reason is None and not is_whole(self._model):
            reason = "its weights are divided over ranks, which must take the same number of steps"
        if reason is None and grows_beyond(self._model.config, prompts, sampling.max_new_tokens):
            reason = "its rotary embedding changes with the length of a row, so that no cache can be kept"
        if reason is not None:
            return self._fall_back(reason, prompts, sampling, announce, seeds)
        ends = stop_tokens(self._model, self._tokenizer, sampling)
        with sampling_state(self._model), self._weights():
            run = Decoding(self._model, self._tokenizer, prompts, sampling, seeds, ends)
            # Longest first: what needs most memory comes first, and what comes later fits its width.
            waiting = deque(sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), prompts[row])))
            batch: RowBatch | None = None
            while waiting or batch:
                fresh = self._admit(batch, waiting, run)
                read = []
                for shares in _passes(_share(fresh, prompts, groups), run.widths, run.tokens_at_once):
                    if announce is not None:
                        announce([rows[0] for rows in shares])
                    read.append(run.prefill(shares))
                if read:
                    first, *rest = read
                    batch = batch.join(*read) if batch else first.join(*rest)
                assert batch is not None
                if announce is not None:
                    announce(batch.rows)
                while not self._pays(batch):
                    run.step(batch)
                batch = batch.keep_live()
        return run.completions(self._tokenizer)

    def _weights(self) -> AbstractContextManager[None]:
        return packed_weights(self._model) if self.pack_weights else nullcontext()

    def _admit(self, batch: RowBatch | None, waiting: deque[int], run: Decoding) -> list[int]:
        """Take the rows from `waiting` that fit beside those of `batch`."""
        rows = list(batch.rows) if batch else []
        held, longest = len(rows), max((run.widths[row] for row in rows), default=0)
        while waiting and len(rows) < self.max_rows:
            longest = max(longest, run.widths[waiting[0]])
            if self.max_tokens and (len(rows) + 1) * (longest + run.limit) > self.max_tokens:
                break
            rows.append(waiting.popleft())
        return rows[held:]

    def _pays(self, batch: RowBatch) -> bool:
        """Return whether rows that ended should leave now: they are many, or their columns exceed the limit."""
        ended, rows = int(batch.done_B.sum()), len(batch.rows)
        full = self.max_tokens is not None and rows * (batch.width + 1) > self.max_tokens
        return ended * _SHARE >= rows or (ended > 0 and full)

    def _check(self, prompts: Sequence[list[int]], sampling: Sampling) -> None:
        check_context(self._model, prompts, sampling.max_new_tokens)
        for row, ids in enumerate(prompts):
            needed = len(ids) + sampling.max_new_tokens
            if self.max_tokens is not None and needed > self.max_tokens:
                raise ValueError(
                    f"prompts[{row}] has {len(ids)} tokens, and max_new_tokens={sampling.max_new_tokens}: {needed} "
                    f"for one row, over max_tokens={self.max_tokens}. Raise max_tokens to at least {needed}."
                )

    def _fall_back(
        self,
        reason: str,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        announce: Announce | None,
        seeds: Sequence[int] | None,
    ) -> Completions:
        if not self._warned:
            self._warned = True
            name = type(core_model(self._model) or self._model).__name__
            warnings.warn(f"NativeSampler leaves {name} to GenerateSampler: {reason}.", stacklevel=3)
        rows = self.max_rows
        if self.max_tokens is not None and prompts:
            rows = min(rows, self.max_tokens // (max(map(len, prompts)) + sampling.max_new_tokens))
        other = GenerateSampler(rows)
        other.bind(self._model, self._tokenizer)
        return other.generate(prompts, sampling, announce, seeds)


def _share(
    rows: Iterable[int], prompts: Sequence[list[int]], groups: Sequence[int] | None
) -> list[list[int]]:
    """Divide rows by their prompts."""
    rows_of: dict[tuple[int | None, tuple[int, ...]], list[int]] = {}
    for row in rows:
        key = (None if groups is None else groups[row], tuple(prompts[row]))
        rows_of.setdefault(key, []).append(row)
    return list(rows_of.values())


def _passes(shares: Sequence[list[int]], widths: Sequence[int], max_tokens: int) -> list[list[list[int]]]:
    """Divide prompts, the longest of which comes first, so that those of a pass are few tokens."""
    passes: list[list[list[int]]] = []
    for rows in shares:
        if passes and (len(passes[-1]) + 1) * widths[passes[-1][0][0]] <= max_tokens:
            passes[-1].append(rows)
        else:
            passes.append([rows])
    return passes


def _why_unserved(model: nn.Module) -> str | None:
    """Return what keeps the decoding loop from a model, or None."""
    core = core_model(model)
    if core is None:
        return "it is no model of transformers"
    if core.config.is_encoder_decoder:
        return "it has an encoder"
    known = inspect.signature(core.forward).parameters
    if missing := [name for name in _NEEDED if name not in known]:
        return f"its forward pass does not take {', '.join(missing)}"
    if not core._supports_default_dynamic_cache():
        return "its cache is of a kind of its own"
    layers = DynamicCache(config=core.config).layers
    if kinds := sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}):
        return f"its cache has layers of the kind {', '.join(kinds)}"
    return None
