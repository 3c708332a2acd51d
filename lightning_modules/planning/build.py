"""Makes the model of a configuration without its weights: tensors of the right shape, and no memory behind them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from lightning_modules.adapters import FullFineTuning, PeftAdapter
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.grpo.module import GRPOModule
from lightning_modules.grpo.policy import switch_dropout_off
from lightning_modules.planning.ranks import Ranks
from lightning_modules.planning.sparse import PlannedSparseAdapter
from lightning_modules.sharding import decoder_layers, shard_model
from lightning_modules.sources import CHOOSING, check_model, written_choice


def read_config(source: str, model_kwargs: Mapping[str, Any] | None = None) -> Any:
    """Read the configuration of a model, and nothing else of it.

    Args:
        source: As in `resolve_model`; a folder needs `config.json` alone.
        model_kwargs: Those that choose the model count.

    Returns:
        A transformers configuration.

    Raises:
        ValueError: If there is none.
    """
    from transformers import AutoConfig

    choice = {"trust_remote_code": False} | {k: v for k, v in (model_kwargs or {}).items() if k in CHOOSING}
    source, written = written_choice(source, choice)
    if "subfolder" not in written:
        choice.pop("subfolder", None)  # it is in the name
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"model={source!r}: the folder has no config.json, which is all that a plan needs of it."
        )
    place = str(folder) if folder.is_dir() else check_model(source)
    try:
        if place.endswith(".gguf"):
            config = AutoConfig.from_pretrained(str(Path(place).parent), gguf_file=Path(place).name)
            if hasattr(config, "quantization_config"):
                del config.quantization_config  # what is trained is dequantised
            return config
        return AutoConfig.from_pretrained(place, **choice)
    except OSError as error:
        raise ValueError(
            f"model={source!r}: its configuration cannot be read. Give a folder with config.json. {error}"
        ) from error


def make_model(module: CausalLMModule, config: Any, ranks: Ranks) -> nn.Module:
    """Give a module its model with adapter, as `configure_model` does, but on the meta device.

    Args:
        module: With an adapter that is not attached yet.
        config: Of the model.
        ranks: Where it runs.

    Returns:
        The base model.

    Raises:
        ValueError: If the model is quantised, or the adapter needs weights or data to be made.
    """
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None) or "quantization_config" in module._model_kwargs:
        raise ValueError(
            f"model={module.source!r} is quantised, which cannot be planned. Plan it in bfloat16."
        )
    if not isinstance(module.adapter, FullFineTuning | PeftAdapter | PlannedSparseAdapter):
        raise ValueError(
            f"adapter={type(module.adapter).__name__} cannot be planned. Plan adapter: null, a peft.PeftConfig or a "
            "SparseAdapter."
        )
    if isinstance(module.adapter, PlannedSparseAdapter) and ranks.strategy == "fsdp2":
        raise ValueError("A sparse adapter cannot be planned under fsdp2. Plan it with --strategy ddp.")
    # FlashAttention needs a GPU to be made; SDPA's fused attention keeps the same tensors.
    attention = "sdpa" if "flash" in module._attn_implementation else module._attn_implementation
    module.adapter.source = module.source
    with torch.device("meta"):
        base: nn.Module = AutoModelForCausalLM.from_config(
            config,
            dtype=module.weights_dtype,
            attn_implementation=attention,
            trust_remote_code=bool(module._model_kwargs.get("trust_remote_code")),
        )
        try:
            model = module.adapter.attach(base)
        except (NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"The adapter of {type(module).__name__} reads base weights where it is made, and a plan has none: "
                f"{error} Plan it with an initialisation that reads none, such as init_lora_weights: true."
            ) from error
    module.model = model
    if module._gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    module.model.train()
    if isinstance(module, GRPOModule):
        switch_dropout_off(module.model)
    return base


def place_model(module: CausalLMModule, base: nn.Module, ranks: Ranks) -> None:
    """Take the tensors of a model on the meta device for some of the CPU, and shard it. Under fake tensors.

    Fake tensors cannot be moved and cast as adapters do, so a model is made without them.

    Args:
        module: With its model.
        base: The base model in it.
        ranks: Where it runs; for `fsdp2` there must be a process group.
    """
    assert module.model is not None
    made: dict[int, torch.Tensor] = {}

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:  # what is shared stays shared
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            made[id(tensor)] = fake
        return made[id(tensor)]

    for part in module.model.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = moved(tensor)  # type: ignore[assignment]
    if ranks.strategy == "fsdp2":
        _shard(base, ranks)


def _shard(base: nn.Module, ranks: Ranks) -> None:
    shape: tuple[int, ...] = (ranks.shards,)
    names: tuple[str, ...] = ("shards",)
    if ranks.replicas > 1:
        shape, names = (ranks.replicas, *shape), ("replicas", *names)
    with unset_fake_temporarily():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    shard_model(
        base,
        mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=ranks.param_dtype, reduce_dtype=ranks.reduce_dtype),
        reshard_after_forward=ranks.reshard_after_forward,
    )


def is_uniform(base: nn.Module, config: Any) -> bool:
    """Return whether all decoder layers are alike, adapters in them included.

    Args:
        base: A model on the meta device.
        config: Its configuration.
    """
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    try:
        layers = decoder_layers(base)
    except ValueError:  # it does not name them
        return False
    facts = [
        [(name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()]
        for layer in layers
    ]
    return (
        len(set(kinds)) < 2
        and len({type(one) for one in layers}) == 1
        and all(one == facts[0] for one in facts)
    )


def shortened(config: Any, layers: int) -> Any:
    """Return the configuration of a model with fewer layers."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return short


def build_optimizer(module: CausalLMModule, ranks: Ranks) -> Optimizer:
    """Make the module's optimiser.

    Raises:
        ValueError: If it has none, or several.
    """
    configured = module.configure_optimizers()
    optimizer = configured.get("optimizer") if isinstance(configured, dict) else configured
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"{type(module).__name__} trains without an optimiser of torch, which cannot be planned."
        )
    for group in optimizer.param_groups:
        # torch's default on GPUs: faster, but temporary copies of all parameters.
        if ranks.on_gpu and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer
