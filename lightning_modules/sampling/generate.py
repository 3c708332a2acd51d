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
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_modules.model_checks import context_length, pad_token
from lightning_modules.ranges import check_whole
from lightning_modules.rope import grows_beyond, see_rows_alone
from lightning_modules.sampling.base import (
    Announce,
    Completions,
    FinishReason,
    Sampler,
    Sampling,
)
from lightning_modules.sampling.filters import draw_by, own_uniforms
from lightning_modules.sampling.stops import StopStrings, stop_tokens
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
        self._uniform_TB = own_uniforms(seeds, num_tokens)
        self._token = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn_B = draw_by(scores.float().softmax(-1), self._uniform_TB[self._token])
        self._token += 1
        return torch.full_like(scores, -torch.inf).scatter(1, drawn_B[:, None], 0.0)


class _StopCriterion(StoppingCriteria):  # type: ignore[misc]
    """Ends rows whose text contains a stop string, and remembers after how many tokens."""

    def __init__(self, strings: StopStrings, width: int, num_rows: int) -> None:
        self._strings, self._width = strings, width
        self.lengths: list[int | None] = [None] * num_rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new_BT = input_ids[:, self._width :]
        completed = self._strings.completed(new_BT[:, -self._strings.window :].tolist())
        for row, done in enumerate(completed):
            if done and self.lengths[row] is None:
                self.lengths[row] = new_BT.shape[1]
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)


class GenerateSampler(Sampler):
    """Samples with `transformers`' own `generate`: any model it serves, at its speed.

    Args:
        max_rows: Rows that are decoded together; more are decoded in turn. Bounds memory.
    """

    def __init__(self, max_rows: int = 256) -> None:
        check_whole("max_rows", max_rows)
        self.max_rows = max_rows

    def bind(self, model: nn.Module, tokenizer: Any) -> None:
        """Take model and tokenizer. From here on the model sees each row alone, see `see_rows_alone`."""
        self._model, self._tokenizer = model, tokenizer
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
            ValueError: If a prompt is empty or does not fit the model's context together with its completion.
        """
        check_context(self._model, prompts, sampling.max_new_tokens)
        ends = stop_tokens(self._model, self._tokenizer, sampling)
        with sampling_state(self._model):
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
        pad = pad_token(self._tokenizer)
        width = max(map(len, prompts))
        input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)
        attention_mask = torch.tensor(
            [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device
        )
        recorder = _Recorder()
        stopper = _StopCriterion(StopStrings(self._tokenizer, sampling.stop), width, len(prompts))
        padding_B = torch.tensor([width - len(ids) for ids in prompts])
        processors = [*_warpers(sampling, padding_B), recorder]
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
                eos_token_id=ends or None,
                pad_token_id=pad,
                # What a cache holds may not be what the model would compute of a longer row.
                use_cache=not grows_beyond(self._model.config, prompts, sampling.max_new_tokens),
            ),
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([stopper] if sampling.stop else []),
            # By itself transformers keeps ranks of a sharded model in step, also where each has all of it.
            synced_gpus=not is_whole(self._model),
        )
        recorder.observe(output)
        token_ids, finish = _until_end(output[:, width:].tolist(), ends, stopper.lengths)
        logprobs = [row[: len(ids)] for row, ids in zip(recorder.logprobs().tolist(), token_ids, strict=True)]
        return Completions(
            token_ids=token_ids,
            texts=self._tokenizer.batch_decode(token_ids, skip_special_tokens=True),
            finish=finish,
            logprobs=logprobs,
        )


def core_model(model: nn.Module) -> PreTrainedModel | None:
    """Return the model of transformers inside adapters and wrappers, if there is one."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def check_context(model: nn.Module, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    """Check that prompts hold something and leave room for their completions.

    Args:
        model: A model of transformers, wrapped or not.
        prompts: Token ids per row.
        max_new_tokens: Room that a completion may need.

    Raises:
        ValueError: If a prompt is empty, or longer than the context less `max_new_tokens`.
    """
    core = core_model(model)
    context = None if core is None else context_length(core.config)
    for row, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"prompts[{row}] is empty. Give at least one token.")
        needed = len(ids) + max_new_tokens
        if context is not None and needed > context:
            raise ValueError(
                f"prompts[{row}] has {len(ids)} tokens, and max_new_tokens={max_new_tokens}: {needed} do not fit the "
                f"model's context of {context}. Lower max_new_tokens, or leave out long prompts."
            )


@contextmanager
def sampling_state(model: nn.Module) -> Iterator[None]:
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


def _warpers(sampling: Sampling, padding_B: Tensor) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = []
    if sampling.repetition_penalty != 1:
        # The padding is no token of the prompt: without its length, the padding id would be penalised.
        warpers.append(
            RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty, prompt_ignore_length=padding_B)
        )
    if sampling.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers


def _until_end(
    rows: list[list[int]], ends: list[int], stopped: list[int | None]
) -> tuple[list[list[int]], list[FinishReason]]:
    """Cut each row after its first end token or stop string; the length limit stopped a row without one."""
    cut: list[list[int]] = []
    finish: list[FinishReason] = []
    for row, length in zip(rows, stopped, strict=True):
        end = next((position + 1 for position, token in enumerate(row) if token in ends), None)
        length = min((n for n in (end, length) if n is not None), default=None)
        cut.append(row[:length])
        finish.append("length" if length is None else "stop")
    return cut, finish
