"""Runs one step without data or memory, phase by phase, under the memory tracker.

Shapes: b rows of a pass, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.grpo.losses import aggregate
from lightning_modules.grpo.module import GRPOModule
from lightning_modules.grpo.policy import collate, forward_policy, reference_logprobs
from lightning_modules.headless import can_chunk, chunked_logprobs
from lightning_modules.logprobs import completion_logits, token_logprobs
from lightning_modules.microbatches import PaddedRows
from lightning_modules.planning.filled import filled_rows
from lightning_modules.planning.ranks import Ranks
from lightning_modules.planning.shapes import StepShape
from lightning_modules.planning.tracker import Kind, PlainTracker, ShardedTracker, logits_and_caches
from lightning_modules.sharding import unsharded

Tracker = PlainTracker | ShardedTracker


@dataclass(frozen=True)
class Phase:
    """The moment of a part of a step at which most memory is taken up.

    Attributes:
        name: The part.
        kinds: Bytes on the device of a rank by what they are used for.
        host: Bytes in the memory of its host.
    """

    name: str
    kinds: dict[Kind, int]
    host: int = 0

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return sum(self.kinds.values())

    def without(self, elsewhere: Collection[Kind]) -> Phase:
        """Count some kinds to the host."""
        host = sum(self.kinds[kind] for kind in elsewhere)
        return Phase(self.name, self.kinds | dict.fromkeys(elsewhere, 0), self.host + host)


def track(
    module: CausalLMModule, base: nn.Module, optimizer: Optimizer, shape: StepShape, ranks: Ranks
) -> list[Phase]:
    """Find the peaks of a step that is not the first: optimiser moments are there. Under fake tensors.

    Args:
        module: With its model.
        base: The base model in it.
        optimizer: Of the module.
        shape: The step.
        ranks: Where it runs.

    Returns:
        `prefill` and `decode`, for modules that generate, then `backward`, with the forward pass before it, and
        `step`, of the optimiser.
    """
    assert module.model is not None
    sharded = ranks.strategy == "fsdp2"
    tracker: Tracker = ShardedTracker(base, optimizer) if sharded else PlainTracker(module.model, optimizer)
    if ranks.cpu_offload:
        tracker.elsewhere = frozenset({Kind.WEIGHTS, Kind.GRADIENTS, Kind.MOMENTS})
    vocabulary = module.text_config.vocab_size
    tracker.classify = logits_and_caches(vocabulary)
    peaks: dict[str, dict[Kind, int]] = {}
    with tracker, _autocast(ranks):
        # torch's tracker of sharded models wants to be told of each new pass.
        base.register_forward_pre_hook(lambda *_: tracker.reset_mod_stats(), prepend=True)
        peaks |= _update(module, optimizer, shape, tracker)
        if isinstance(module, GRPOModule):
            rows = min(shape.rows, getattr(module.sampler, "max_rows", shape.rows))
            tracker.classify = logits_and_caches(vocabulary, _cache_shapes(module.text_config, rows, shape))
            with unsharded(base) if ranks.whole_for_generation else nullcontext():
                peaks = _generate(module.model, rows, shape, tracker) | peaks
    return [
        Phase(name, _with_buckets(kinds, module.model, ranks)).without(tracker.elsewhere)
        for name, kinds in peaks.items()
    ]


def grow(few: Sequence[Phase], more: Sequence[Phase]) -> bool:
    """Return whether no kind of memory shrinks with depth, as one does where a peak moves to another moment."""
    return all(
        other.kinds[kind] >= size
        for one, other in zip(few, more, strict=True)
        for kind, size in one.kinds.items()
    )


def extended(few: Sequence[Phase], more: Sequence[Phase], layers: tuple[int, int, int]) -> list[Phase]:
    """Extend the phases of two short models to a deep one, of which all layers are alike.

    Every kind of memory grows by the same amount with each layer: at the moment at which one phase has its peak, layers
    are all ahead, all done, or one is at work.

    Args:
        few: Phases of the shorter model.
        more: Those of the longer one.
        layers: How many layers have the shorter, the longer and the deep model.
    """
    short, longer, deep = layers

    def extend(a: int, b: int) -> int:
        return a + (b - a) * (deep - short) // (longer - short)

    return [
        Phase(
            one.name,
            {kind: extend(one.kinds[kind], other.kinds[kind]) for kind in one.kinds},
            extend(one.host, other.host),
        )
        for one, other in zip(few, more, strict=True)
    ]


def _autocast(ranks: Ranks) -> AbstractContextManager[Any]:
    return nullcontext() if ranks.autocast is None else torch.autocast("cpu", ranks.autocast)


def _with_buckets(kinds: dict[Kind, int], model: nn.Module, ranks: Ranks) -> dict[Kind, int]:
    """Add the buffers in which DDP sends gradients; they are there from the start to the end of a run."""
    if ranks.strategy != "ddp":
        return kinds
    buckets = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return kinds | {Kind.EXCHANGE: buckets - (kinds[Kind.GRADIENTS] if ranks.bucket_view else 0)}


def _update(
    module: CausalLMModule, optimizer: Optimizer, shape: StepShape, tracker: Tracker
) -> dict[str, dict[Kind, int]]:
    """Make one optimiser update from a micro-batch; return the peaks of its two parts."""
    trained = [p for p in module.parameters() if p.requires_grad]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    # Makes the moments. What torch does once, to find out how sharded tensors add up, does not count either.
    tracker.add_gradients(trained)
    step()
    if shape.passes == 1:  # a second micro-batch would meet the gradients of the first one
        optimizer.zero_grad()
    tracker.forget_peak()
    loss = _grpo_loss(module, shape) if isinstance(module, GRPOModule) else _sft_loss(module, shape)
    loss.backward()  # type: ignore[no-untyped-call]
    backward = tracker.by_kind("peak")
    tracker.forget_peak()
    step()
    peaks = {"backward": backward, "step": tracker.by_kind("peak")}
    optimizer.zero_grad()
    return peaks


def _rows(shape: StepShape) -> tuple[Tensor, Tensor]:
    input_ids = torch.zeros(shape.rows_per_pass, shape.width, dtype=torch.long)
    return input_ids, torch.ones_like(input_ids)


def _sft_loss(module: CausalLMModule, shape: StepShape) -> Tensor:
    """What `SFTModule.training_step` computes of a micro-batch."""
    T = shape.completion_tokens
    input_ids, attention_mask = _rows(shape)
    everything = torch.arange(shape.rows_per_pass * T)
    rows = PaddedRows(input_ids, attention_mask, attention_mask[:, -T:].float(), everything)
    if can_chunk(module, tries=False) is None:
        logprobs_BT, _ = chunked_logprobs(module, rows, temperature=1.0)
    else:
        logits_BTV = completion_logits(module, input_ids, attention_mask, T, temperature=1.0)
        logprobs_BT = token_logprobs(logits_BTV, input_ids[:, -T:])
    return -(logprobs_BT * rows.completion_mask).sum(1).sum()


def _grpo_loss(module: GRPOModule, shape: StepShape) -> Tensor:
    """What `GRPOModule` computes of a micro-batch, by its own loss."""
    rows = filled_rows(module, shape.prompts, shape.group_size, shape.prompt_tokens, shape.completion_tokens)
    assert module.passes is not None
    micro_batch = collate(rows, module.passes, lambda _: None, pad_token_id=0, device=torch.device("cpu"))
    temperature, objective = module.sampling.temperature, module.objective
    if module.kl.in_loss:
        with module.kl.policy.context(module):
            micro_batch.ref_logprobs = reference_logprobs(module, micro_batch, temperature=temperature)
    tokens = forward_policy(
        module, micro_batch, temperature=temperature, entropy_gradient=objective.entropy_coef != 0
    )
    return aggregate(module.loss(tokens), tokens.mask, over=objective.over, denominator=1.0)


def _cache_shapes(config: Any, rows: int, shape: StepShape) -> set[tuple[int, ...]]:
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        raise ValueError(
            f"A model of the type {config.model_type} keeps no keys and values, so what it draws cannot be planned."
        )
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    lengths = (shape.prompt_tokens, shape.width - 1, shape.width)
    return {(rows, kv_heads, length, head_dim) for length in lengths}


@torch.no_grad()
def _generate(model: nn.Module, rows: int, shape: StepShape, tracker: Tracker) -> dict[str, dict[Kind, int]]:
    """Return the peaks of the moments at which `generate` may need most: first and last token."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    tracker.forget_peak()
    read = _forward(model, rows, shape.prompt_tokens, None)
    _draw(read.logits)
    prefill = tracker.by_kind("peak")
    cache = read.past_key_values
    del read
    _lengthen(cache, shape.completion_tokens - 2)
    tracker.forget_peak()
    _draw(_forward(model, rows, 1, cache).logits)
    decode = tracker.by_kind("peak")
    for module, training in modes.items():
        module.training = training
    return {"prefill": prefill, "decode": decode}


def _forward(model: Callable[..., Any], rows: int, length: int, cache: Any) -> Any:
    seen = 0 if cache is None else cache.get_seq_length()
    return model(
        input_ids=torch.zeros(rows, length, dtype=torch.long),
        attention_mask=torch.ones(rows, seen + length, dtype=torch.long),
        position_ids=torch.arange(seen, seen + length)[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )


def _lengthen(cache: Any, tokens: int) -> None:
    """Make a cache as long as it is before the last token."""
    if tokens < 1:
        return
    for number, layer in enumerate(cache.layers):
        keys, values = (
            one.new_empty(*one.shape[:2], tokens, one.shape[3]) for one in (layer.keys, layer.values)
        )
        cache.update(keys, values, number)


def _draw(logits_B1V: Tensor) -> None:
    """The copies that drawing a token makes: float32 scores, the recorded distribution, and probabilities."""
    scores_BV = logits_B1V[:, -1].to(torch.float32, copy=True)
    recorded_BV = scores_BV.log_softmax(-1)
    probabilities_BV = scores_BV.softmax(-1)
    del recorded_BV, probabilities_BV
