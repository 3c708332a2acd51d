"""Which attention a model of transformers on a CPU uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_modules.blocked_attention import blocked_attention

BLOCKS = "quiver_blocks"

_HALF = (torch.bfloat16, torch.float16)


def prefer_blocks(model: PreTrainedModel) -> None:
    """Let a half-precision model that uses transformers' `sdpa` use `blocked_attention` where that is faster.

    That is on CPUs, where several queries are read, in training and in prompts. All else is left to `sdpa`.
    """
    if (
        model.dtype in _HALF
        and model._supports_attention_backend
        and model.config._attn_implementation == "sdpa"
    ):
        AttentionInterface.register(BLOCKS, _attend)
        AttentionMaskInterface.register(BLOCKS, sdpa_mask)
        model.set_attn_implementation(BLOCKS)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    T, S = query.shape[2], key.shape[2]
    causal = attention_mask is None and (
        getattr(module, "is_causal", True) if is_causal is None else is_causal
    )
    if (
        T == 1  # reads each key once; torch is as fast
        or query.device.type != "cpu"
        or query.dtype not in _HALF
        or dropout > 0
        or torch.is_autocast_enabled("cpu")
        or (attention_mask is not None and attention_mask.dtype != torch.bool)
        or (causal and T != S)
        or any(options.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    ):
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return output
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril() if causal else attention_mask
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return blocked_attention(query, key, value, mask, scale).transpose(1, 2), None
