"""GenerateSampler: the `generate` of transformers behind the Sampler seam."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_modules.sampling.base import Announce, Completions, FinishReason, Sampler, Sampling
from lightning_modules.sharding import is_whole


class _Recorder(LogitsProcessor):  # type: ignore[misc]
    """Keeps the log-probability of each drawn token without keeping any step's distribution.

    It stands last among the processors, so it sees what is drawn from; the token drawn there arrives with
    the next call.
    """

    def __init__(self) -> None:
        self._distribution_BV: Tensor | None = None
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.observe(input_ids)
        self._distribution_BV = scores.float().log_softmax(-1)
        return scores

    def observe(self, input_ids: Tensor) -> None:
        """Look up the newest column of `input_ids` (B, S) in the distribution that it was drawn from."""
        if self._distribution_BV is not None:
            self._columns.append(self._distribution_BV.gather(1, input_ids[:, -1:]))
            self._distribution_BV = None

    def logprobs(self) -> Tensor:
        """Return (B, T)."""
        return torch.cat(self._columns, dim=1)


class _SeededDraw(LogitsProcessor):  # type: ignore[misc]
    """Draws a token of each row by the row's own random numbers, and leaves only it to choose.

    One uniform number a token, looked up in the cumulated distribution: a row's draws do not depend on the others.
    """

    def __init__(self, seeds: Sequence[int], num_tokens: int) -> None:
        draws = [torch.rand(num_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
        self._uniform_TB = torch.stack(draws, dim=1).double()
        self._token = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulated_BV = scores.float().softmax(-1).cumsum(-1, dtype=torch.float64)
        target_B1 = self._uniform_TB[self._token, :, None].to(scores.device) * cumulated_BV[:, -1:]
        self._token += 1
        drawn_B1 = torch.searchsorted(cumulated_BV, target_B1, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn_B1, 0.0)


class GenerateSampler(Sampler):
    """Samples with `transformers`' own `generate`: any model it serves, at its speed.

    Args:
        max_rows: Rows that are decoded together; more are decoded in turn. Bounds memory.
    """

    def __init__(self, max_rows: int = 256) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: must be at least 1.")
        self.max_rows = max_rows

    def bind(self, model: nn.Module, tokenizer: Any) -> None:
        """Take model and tokenizer."""
        self._model, self._tokenizer = model, tokenizer

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        announce: Announce | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Completions:
        """Draw one completion per row with the model in evaluation mode."""
        ends = self._end_tokens()
        with _sampling_state(self._model):
            parts = []
            for start in range(0, len(prompts), self.max_rows):
                rows = range(start, min(start + self.max_rows, len(prompts)))
                if announce is not None:
                    announce(rows)
                own = None if seeds is None else [seeds[row] for row in rows]
                parts.append(self._decode([prompts[row] for row in rows], sampling, ends, own))
        return Completions(
            token_ids=[row for part in parts for row in part.token_ids],
            texts=[text for part in parts for text in part.texts],
            finish=[reason for part in parts for reason in part.finish],
            logprobs=[row for part in parts for row in part.logprobs],
        )

    def _decode(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        ends: list[int],
        seeds: Sequence[int] | None,
    ) -> Completions:
        device = next(self._model.parameters()).device
        pad = self._tokenizer.pad_token_id
        pad = ends[0] if pad is None else pad
        width = max(map(len, prompts))
        input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)
        attention_mask = torch.tensor(
            [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device
        )
        recorder = _Recorder()
        processors = [*_warpers(sampling), recorder]
        if seeds is not None and sampling.temperature > 0:
            processors.append(_SeededDraw(seeds, sampling.max_new_tokens))
        draws_itself = seeds is None and sampling.temperature > 0
        output = self._model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=attention_mask,
            # Neutral settings: the processors below are the whole of the sampling distribution.
            generation_config=GenerationConfig(
                do_sample=draws_itself,
                max_new_tokens=sampling.max_new_tokens,
                temperature=1.0,
                top_k=0 if draws_itself else None,  # when sampling, None would become 50
                top_p=1.0,
                eos_token_id=ends,
                pad_token_id=pad,
            ),
            logits_processor=LogitsProcessorList(processors),
            # By itself transformers keeps ranks of a sharded model in step, also where each has all of it.
            synced_gpus=not is_whole(self._model),
        )
        recorder.observe(output)
        token_ids, finish = _until_end(output[:, width:].tolist(), ends)
        logprobs = [row[: len(ids)] for row, ids in zip(recorder.logprobs().tolist(), token_ids, strict=True)]
        return Completions(
            token_ids=token_ids,
            texts=self._tokenizer.batch_decode(token_ids, skip_special_tokens=True),
            finish=finish,
            logprobs=logprobs,
        )

    def _end_tokens(self) -> list[int]:
        """The ids that end a completion: the tokenizer's, and those of the model's generation config."""
        configured = self._model.generation_config.eos_token_id  # type: ignore[union-attr]
        more = configured if isinstance(configured, list) else [configured]
        return sorted({i for i in (self._tokenizer.eos_token_id, *more) if i is not None})


@contextmanager
def _sampling_state(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without the generation settings that it came with.

    `generate` fills in whatever a caller leaves open (`top_k`, `repetition_penalty`, ...) from those, and
    then the tokens are drawn from another distribution than the recorded one.
    """
    modes = {module: module.training for module in model.modules()}
    settings: dict[nn.Module, Any] = {module: vars(module).get("generation_config") for module in modes}
    model.eval()  # no dropout, and gradient checkpointing would switch the cache off
    try:
        for module, config in settings.items():
            if config is not None:
                module.generation_config = GenerationConfig()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
            if settings[module] is not None:
                module.generation_config = settings[module]


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = []
    if sampling.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers


def _until_end(rows: list[list[int]], ends: list[int]) -> tuple[list[list[int]], list[FinishReason]]:
    """Cut each row after its first end token; a row without one was stopped by the length limit."""
    cut: list[list[int]] = []
    finish: list[FinishReason] = []
    for row in rows:
        end = next((position for position, token in enumerate(row) if token in ends), None)
        cut.append(row if end is None else row[: end + 1])
        finish.append("length" if end is None else "stop")
    return cut, finish
