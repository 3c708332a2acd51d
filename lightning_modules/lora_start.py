"""LoRA that starts from the base weights (PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775), over a base that stays.

Both take their start s B0 A0 out of the base weight W and train B and A from there: W - s B0 A0 + s B A. PEFT changes
W itself. Then the model without the adapter is no longer the base model, which a KL reference needs, and files hold B
and A alone, so that a start drawn at random is lost. Deviation: here W stays, and the start is a second, frozen LoRA
whose B is -B0. The layer computes the same. Files hold one plain LoRA of rank 2r, [A; A0] and [B, -B0].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

START = "start"
_PREFIX = f"{START}."
# What changes the product of factors, or has weights of its own in each adapter.
_ALONE = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "target_parameters", "velora_config")


def has_start(config: PeftConfig) -> bool:
    """Return whether an adapter is one of these."""
    start = getattr(config, "init_lora_weights", None)
    return isinstance(start, str) and start.lower().startswith(("pissa", "olora"))


def without_start(config: LoraConfig) -> LoraConfig:
    """Return the configuration of plain LoRA.

    Args:
        config: One that `has_start`.

    Raises:
        ValueError: If an option of it does not go with a start.
    """
    if used := [name for name in _ALONE if getattr(config, name, None)]:
        raise ValueError(
            f"adapter: init_lora_weights={config.init_lora_weights!r} does not go with {', '.join(used)}. "
            "Leave one out."
        )
    plain = copy.deepcopy(config)
    plain.init_lora_weights = True
    return plain


@torch.no_grad()
def add_start(model: PeftModel, config: LoraConfig) -> None:
    """Give a plain LoRA its start.

    Args:
        model: With the LoRA that `without_start` describes.
        config: The configuration before that.

    Raises:
        ValueError: If a layer is no linear one, or smaller than the rank.
    """
    frozen = copy.deepcopy(model.peft_config["default"])
    frozen.lora_dropout, frozen.bias, frozen.inference_mode = 0.0, "none", True
    frozen.modules_to_save = frozen.trainable_token_indices = None
    model.add_adapter(START, frozen)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if "default" not in layer.lora_A:
            raise ValueError(
                f"adapter: init_lora_weights={config.init_lora_weights!r} starts linear layers alone, and {name} is "
                "none. Leave it out of target_modules."
            )
        _start_layer(name, layer, str(config.init_lora_weights).lower())
    model.base_model.set_adapter(["default", START])
    for key, parameter in model.named_parameters():
        if f".{START}." in key:
            parameter.requires_grad_(False)


def _start_layer(name: str, layer: LoraLayer, start: str) -> None:
    weight = layer.get_base_layer().weight
    kept = weight.data.clone()
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    shapes = [factor.shape for factor in factors]
    if start == "olora":
        layer.olora_init("default")
    else:
        layer.pissa_init("default", start)
    weight.data = kept
    if [factor.shape for factor in factors] != shapes:
        raise ValueError(
            f"adapter: r={layer.r['default']} is larger than a side of {name}, {tuple(weight.shape)}, so that "
            f"init_lora_weights={start!r} has no start for it. Lower r, or leave the layer out of target_modules."
        )
    for factor in factors:  # as they were: contiguous, float32
        factor.data = factor.data.float().contiguous()
    layer.lora_A[START].weight.data = factors[0].data.clone()
    layer.lora_B[START].weight.data = -factors[1].data


def start_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Return the tensors of the start, by names that tell them from the trained ones."""
    state = get_peft_model_state_dict(model, adapter_name=START, save_embedding_layers=False)
    return {_PREFIX + name: tensor for name, tensor in state.items()}


def load_start(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Restore what `start_tensors` returned; other tensors are left out."""
    own = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
    set_peft_model_state_dict(model, own, adapter_name=START)


def as_plain_lora(config: LoraConfig, state: Mapping[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return one plain LoRA of twice the rank that changes weights as the trained one and its start do.

    Args:
        config: Of the trained one.
        state: Tensors of both.
    """
    plain = copy.deepcopy(config)
    grows = (
        math.sqrt(2) if config.use_rslora else 2
    )  # so that the scaling alpha / r, or alpha / sqrt(r), stays
    plain.r, plain.lora_alpha = 2 * config.r, grows * config.lora_alpha
    plain.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    plain.alpha_pattern = {name: grows * alpha for name, alpha in config.alpha_pattern.items()}
    tensors = {}
    for name, tensor in state.items():
        if name.startswith(_PREFIX):
            continue
        start = state.get(_PREFIX + name)
        axis = 0 if ".lora_A." in name else 1
        tensors[name] = tensor if start is None else torch.cat([tensor, start.to(tensor)], dim=axis)
    return plain, tensors
