"""What one call of the native sampler draws: prompts read once, a token for each row of a batch at a time.

Shapes: N rows of the call, B rows decoded now, D distinct prompts, S cached positions, T `max_new_tokens`, V
vocabulary. Cached rows end at the same column, so a row with less text has padding on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lightning_modules.microbatches import sent
from lightning_modules.sampling.base import Completions, FinishReason, Sampling
from lightning_modules.sampling.batch import RowBatch, RowCache
from lightning_modules.sampling.filters import draw_by, own_uniforms, sampling_scores
from lightning_modules.sampling.generate import core_model
from lightning_modules.sampling.stops import StopStrings

# Prompt tokens read in a pass. What a layer makes of them takes memory, and should stay in the cache of a CPU.
_PREFILL = 2**14
_PREFILL_CPU = 2**11


class Decoding:
    """What one call of `generate` has drawn so far, and how it draws.

    Columns beyond a row's length hold what was drawn while it waited to leave.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None,
        ends: list[int],
    ) -> None:
        self._model, self._prompts, self._sampling = model, prompts, sampling
        core = core_model(model)
        assert core is not None
        device = next(model.parameters()).device
        attends = core.config._attn_implementation if core._supports_attention_backend else ""
        self._takes_mask = attends in ("sdpa", "eager")
        self._whole_rooms = self._takes_mask and device.type == "cpu"
        half = core.dtype in (torch.bfloat16, torch.float16)
        self._mask_dtype = torch.bool if attends == "sdpa" and half else core.dtype
        self.limit = sampling.max_new_tokens
        self.tokens_at_once = _PREFILL_CPU if device.type == "cpu" else _PREFILL
        self.widths = [len(ids) for ids in prompts]
        self._ends = torch.tensor(ends, dtype=torch.long, device=device)
        shape = (len(prompts), self.limit + 1)
        self._token_NT = torch.zeros(shape, dtype=torch.long, device=device)
        self._logprob_NT = torch.zeros(shape, device=device)
        self._length_N = torch.zeros(len(prompts), dtype=torch.long, device=device)
        self._width_N = torch.tensor(self.widths, dtype=torch.long, device=device)
        self._stopped_N = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self._strings = StopStrings(tokenizer, sampling.stop)
        self._uniform_TN: Tensor | None = None
        if seeds and sampling.temperature > 0:
            self._uniform_TN = own_uniforms(seeds, self.limit).to(device)

    def prefill(self, shares: Sequence[list[int]]) -> RowBatch:
        """Read prompts, and draw the first token of their rows.

        Args:
            shares: The rows of each distinct prompt (D) that are drawn now, B in all.
        """
        leaders = [of_prompt[0] for of_prompt in shares]
        rows = [row for of_prompt in shares for row in of_prompt]
        members = [number for number, of_prompt in enumerate(shares) for _ in of_prompt]
        device = self._token_NT.device
        width = max(self.widths[row] for row in leaders)
        padded = [[0] * (width - self.widths[row]) + self._prompts[row] for row in leaders]
        ids_DS = torch.tensor(padded, device=device)
        pads_D = width - self._width_N[torch.tensor(leaders, device=device)]
        columns_S = torch.arange(width, device=device)
        cache = DynamicCache()
        cache.layer_class_to_replicate = partial(RowCache, whole=self._whole_rooms)
        logits_DV = self._forward(
            ids_DS,
            (columns_S >= pads_D[:, None]).long() if bool(pads_D.any()) else None,
            (columns_S - pads_D[:, None]).clamp(min=0),
            cache,
        )
        members_B = torch.tensor(members, device=device)
        if len(leaders) < len(rows):
            cache.batch_select_indices(members_B)
        seen_BV = None
        if self._sampling.repetition_penalty != 1:
            seen_DV = torch.zeros_like(logits_DV, dtype=torch.bool)
            for seen_V, row in zip(seen_DV, leaders, strict=True):
                seen_V[torch.tensor(self._prompts[row], device=device)] = True
            seen_BV = seen_DV[members_B]
        batch = RowBatch(rows, cache, width, pads_D[members_B], seen_BV)
        self._draw(batch, logits_DV[members_B])
        return batch

    def step(self, batch: RowBatch) -> None:
        """Draw the next token of each row of a batch."""
        rows_B = batch.rows_B
        length_B = self._length_N[rows_B]
        batch.width += 1
        logits_BV = self._forward(
            self._token_NT[rows_B, length_B - 1][:, None],
            self._mask_of(batch),
            (self._width_N[rows_B] + length_B - 1)[:, None],
            batch.cache,
        )
        self._draw(batch, logits_BV)

    def _mask_of(self, batch: RowBatch) -> Tensor | None:
        """Return the mask of single tokens over cached columns; None if none is needed.

        Where the model's attention takes masks as they are (B, 1, 1, columns), making one here saves making it in
        each layer; in float32 of the type that is added to scores, which torch would make of others in each layer. On
        CPUs it also hides the cache's room, and keeps torch from an implementation of grouped-query attention that is
        several times slower, which it takes in float32 if there is no mask.
        """
        if not batch.padded and not self._whole_rooms:
            return None
        columns_S = torch.arange(batch.columns, device=batch.pads_B.device)
        seen_BS = (columns_S >= batch.pads_B[:, None]) & (columns_S < batch.width)
        if not self._takes_mask:
            return seen_BS.long()
        seen_B11S = seen_BS[:, None, None]
        if self._mask_dtype == torch.bool:
            return seen_B11S
        return torch.zeros_like(seen_B11S, dtype=self._mask_dtype).masked_fill_(~seen_B11S, -torch.inf)

    def _forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: DynamicCache
    ) -> Tensor:
        output = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: Tensor = output.logits[:, -1].float()
        return logits_BV

    def _draw(self, batch: RowBatch, logits_BV: Tensor) -> None:
        """Draw a token of each row, and end rows. What ended rows draw is written behind their last token."""
        rows_B = batch.rows_B
        length_B = self._length_N[rows_B]
        scores_BV = sampling_scores(logits_BV, self._sampling, batch.seen_BV)
        probabilities_BV = scores_BV.softmax(-1)
        if self._sampling.temperature == 0:
            token_B = scores_BV.argmax(-1)
        elif self._uniform_TN is not None:
            token_B = draw_by(probabilities_BV, self._uniform_TN[length_B.clamp(max=self.limit - 1), rows_B])
        else:  # torch.multinomial takes a random number for each token of the vocabulary
            uniform_B = torch.rand(len(rows_B), dtype=torch.float64, device=rows_B.device)
            token_B = draw_by(probabilities_BV, uniform_B)
        self._token_NT[rows_B, length_B] = token_B
        self._logprob_NT[rows_B, length_B] = probabilities_BV.gather(1, token_B[:, None])[:, 0].log()
        if batch.seen_BV is not None:
            batch.seen_BV.scatter_(1, token_B[:, None], True)
        live_B = ~batch.done_B
        length_B = length_B + live_B
        self._length_N[rows_B] = length_B
        stopped_B = torch.isin(token_B, self._ends)
        if self._sampling.stop:
            stopped_B |= self._completed(rows_B, length_B)
        self._stopped_N[rows_B] |= stopped_B & live_B
        batch.done_B |= stopped_B | (length_B == self.limit)

    def _completed(self, rows_B: Tensor, length_B: Tensor) -> Tensor:
        """Return whether the newest token of each row completes a stop string. One copy to the host for all rows."""
        window = self._strings.window
        back_W = torch.arange(-window, 0, device=rows_B.device)
        columns_BW = (length_B[:, None] + back_W).clamp(min=0)
        found_BW = torch.cat([length_B[:, None], self._token_NT[rows_B[:, None], columns_BW]], dim=1)
        tails = [ids[max(0, window - length) :] for length, *ids in found_BW.tolist()]
        return sent(torch.tensor(self._strings.completed(tails)), length_B.device)

    def completions(self, tokenizer: Any) -> Completions:
        """Return what was drawn.

        Raises:
            ValueError: If a log-probability is not a number.
        """
        lengths = self._length_N.tolist()
        token_ids = [ids[:n] for ids, n in zip(self._token_NT.tolist(), lengths, strict=True)]
        logprobs = [values[:n] for values, n in zip(self._logprob_NT.tolist(), lengths, strict=True)]
        for row, values in enumerate(logprobs):
            if any(value != value for value in values):
                raise ValueError(
                    f"The model's logits for prompts[{row}] are not finite, so nothing can be drawn from them. Look "
                    "for weights that are not finite, or use another precision than float16."
                )
        finish: list[FinishReason] = ["stop" if stopped else "length" for stopped in self._stopped_N.tolist()]
        texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True) if token_ids else []
        return Completions(token_ids=token_ids, texts=texts, finish=finish, logprobs=logprobs)
