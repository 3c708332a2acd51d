"""From a module, its data and its ranks to a plan."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from lightning_modules.adapters import Adapter
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.grpo.module import GRPOModule
from lightning_modules.grpo.passes import best_passes
from lightning_modules.planning.build import (
    build_optimizer,
    is_uniform,
    make_model,
    place_model,
    read_config,
    shortened,
)
from lightning_modules.planning.communication import Traffic, data_parallel, sharded
from lightning_modules.planning.filled import filled_rows
from lightning_modules.planning.gpus import Gpu
from lightning_modules.planning.phases import Phase, extended, grow, track
from lightning_modules.planning.ranks import Ranks
from lightning_modules.planning.report import RunPlan
from lightning_modules.planning.shapes import StepShape
from lightning_modules.planning.sparse import PlannedSparseAdapter
from lightning_modules.planning.tracker import fake_ranks, fake_tensors
from lightning_modules.ranges import check_whole
from lightning_modules.sft import SFTModule
from lightning_modules.sharding import decoder_layers
from lightning_modules.sparse.adapter import SparseAdapter

_NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

# Layers of two short models that stand for a deep one. Fewer than three are gathered and freed unlike many.
_SHORT = (3, 5)


def plan_run(
    module: Any, data: Any, ranks: Ranks, gpu: Gpu, *, prompt_tokens: int, answer_tokens: int
) -> RunPlan:
    """Plan a run.

    Args:
        module: Fresh from its constructor; it is used up.
        data: The DataModule.
        ranks: Where the run takes place.
        gpu: What its peak is compared with.
        prompt_tokens: Length of a prompt.
        answer_tokens: Length of an answer; completions that are drawn have that of `sampling.max_new_tokens`.

    Raises:
        ValueError: If the module is none of ours, or something in it needs weights or values.
    """
    check_whole("prompt_tokens", prompt_tokens)
    check_whole("answer_tokens", answer_tokens)
    if not isinstance(module, GRPOModule | SFTModule):
        raise ValueError(
            f"model={type(module).__name__} cannot be planned: its step is not known. Plan SFTModule, GRPOModule, "
            "or a class derived from them."
        )
    config = read_config(module.source, module._model_kwargs)
    adapters = _stages(module.adapter)
    if isinstance(module, GRPOModule):
        _make(module, adapters[""], config, ranks)
        module.passes, _ = best_passes(module, tries=False)
    shape = step_shape(module, data, prompt_tokens, answer_tokens)
    group = fake_ranks(ranks.devices) if ranks.strategy == "fsdp2" else nullcontext()
    with group:
        try:
            phases = [
                replace(phase, name=prefix + phase.name)
                for prefix, adapter in adapters.items()
                for phase in _phases(module, adapter, config, shape, ranks)
                if not (prefix and phase.name in ("prefill", "decode"))
            ]
        except _NEEDS_VALUES as error:
            raise ValueError(
                f"{type(module).__name__} looks at the values of tensors, and a plan has none: {error} Plan the "
                "class that it is derived from, or another adapter."
            ) from error
    base = _make(module, adapters[""], config, ranks)
    assert module.model is not None
    parameters = list(module.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    entries = trained if isinstance(module.adapter, PlannedSparseAdapter) else 0  # they are base weights too
    return RunPlan(
        module=type(module).__name__,
        model=module.source,
        trained=trained,
        frozen=sum(p.numel() for p in parameters) - trained - entries,
        ranks=ranks,
        shape=shape,
        generates=isinstance(module, GRPOModule),
        phases=phases,
        traffic=traffic(module, base, shape, ranks),
        gpu=gpu,
    )


def _stages(adapter: Adapter) -> dict[str, Adapter]:
    """Return what is planned in place of an adapter, by what is put before the names of phases."""
    if not isinstance(adapter, SparseAdapter):
        return {"": adapter}
    stages: dict[str, Adapter] = {}
    if adapter.schedule.dense or adapter.schedule.batches:
        stages["choosing "] = PlannedSparseAdapter(adapter, choosing=True)
    return stages | {"": PlannedSparseAdapter(adapter, choosing=False)}


def _make(module: CausalLMModule, adapter: Adapter, config: Any, ranks: Ranks) -> nn.Module:
    module.adapter = copy.deepcopy(adapter)
    return make_model(module, config, ranks)


def _phases(
    module: CausalLMModule, adapter: Adapter, config: Any, shape: StepShape, ranks: Ranks
) -> list[Phase]:
    """Track a step; where all layers are alike, of two short models, and extend them."""
    base = _make(module, adapter, config, ranks)
    context = module.context_length
    if context is not None and shape.width > context:
        raise ValueError(
            f"prompt_tokens={shape.prompt_tokens} and {shape.completion_tokens} more do not fit the "
            f"{context} tokens of the model. Set --prompt_tokens lower."
        )
    few, more = _SHORT
    deep = int(config.get_text_config().num_hidden_layers)
    if deep <= few + more or not is_uniform(base, config):
        return _track(module, base, shape, ranks)
    short, longer = (
        _track(module, _make(module, adapter, shortened(config, layers), ranks), shape, ranks)
        for layers in (few, more)
    )
    if not grow(short, longer):
        return _track(module, _make(module, adapter, config, ranks), shape, ranks)
    return extended(short, longer, (few, more, deep))


def _track(module: CausalLMModule, base: nn.Module, shape: StepShape, ranks: Ranks) -> list[Phase]:
    with fake_tensors():
        place_model(module, base, ranks)
        return track(module, base, build_optimizer(module, ranks), shape, ranks)


def step_shape(
    module: GRPOModule | SFTModule, data: Any, prompt_tokens: int, answer_tokens: int
) -> StepShape:
    """Divide a step into rows and forward passes.

    Raises:
        ValueError: If a length is not positive, or the data does not say how many rows a step has.
    """
    prompts = getattr(data, "batch_size", None)
    if not isinstance(prompts, int):
        raise ValueError(
            f"data={type(data).__name__} has no batch_size, so the size of a step is not known. Use a DataModule with "
            "batch_size, such as JsonlDataModule."
        )
    group_size, completion, updates = 1, answer_tokens, 1
    if isinstance(module, GRPOModule):
        group_size, updates = module.num_generations, module.updates_per_rollout
        completion = module.sampling.max_new_tokens
    return StepShape(
        prompts=prompts,
        group_size=group_size,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion,
        rows_per_pass=len(filled_rows(module, prompts, group_size, prompt_tokens, completion)),
        updates=updates,
    )


def traffic(module: CausalLMModule, base: nn.Module, shape: StepShape, ranks: Ranks) -> Traffic:
    """Count what a rank sends in a step."""
    assert module.model is not None
    if ranks.strategy == "single":
        return Traffic()
    if ranks.strategy == "ddp":
        gradients = _size(module.model, None, trained=True)
        return data_parallel(gradients, ranks=ranks.devices, updates=shape.updates)
    layers = sum(_size(layer, ranks.param_dtype) for layer in decoder_layers(base))
    grpo = isinstance(module, GRPOModule)
    reads = shape.passes if isinstance(module, GRPOModule) and module.kl.in_loss else 0
    drawn = 1 if ranks.whole_for_generation else shape.completion_tokens
    return sharded(
        layers,
        _size(base, ranks.param_dtype) - layers,
        _size(base, ranks.reduce_dtype or ranks.param_dtype, trained=True),
        shards=ranks.shards,
        replicas=ranks.replicas,
        passes=shape.passes * shape.updates,
        reads=reads,
        gathers_again=ranks.reshard_after_forward is not False,
        generation_gathers=drawn if grpo else 0,
    )


def _size(model: nn.Module, dtype: torch.dtype | None, *, trained: bool = False) -> int:
    """Bytes of all parameters, shards of all ranks together, in a precision or their own."""
    return sum(
        p.numel() * (dtype or p.dtype).itemsize for p in model.parameters() if p.requires_grad or not trained
    )
