"""Which attention a model of transformers uses on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_modules.blocked_attention import blocked_attention, single_query_attention

_MARK = "_quiver_blocks"


def prefer_blocks(model: PreTrainedModel) -> None:
    """Let `blocked_attention` do for a model what it does faster of transformers' `sdpa`; see `_attend` for what.

    The name of the model's attention stays: models look at it, and config files and pickles have it. Our function takes
    the place of `sdpa` in transformers, and hands on what comes from layers of other models.
    """
    AttentionInterface.register("sdpa", _attend)
    for module in model.modules():
        if hasattr(module, "is_causal"):  # as the attention layers of transformers have it
            setattr(module, _MARK, True)


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
    B, H, T, width = query.shape
    causal = attention_mask is None and (
        getattr(module, "is_causal", True) if is_causal is None else is_causal
    )
    if not (
        hasattr(module, _MARK)
        and query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and len(key) == B
        and H % key.shape[1] == 0
        and dropout == 0
        and not torch.is_autocast_enabled("cpu")
        and (attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.dim() == 4))
        and not (T > 1 and causal and key.shape[2] != T)  # torch means other positions
        and all(options.get(name) is None for name in ("position_bias", "softcap", "cache"))
    ):
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return output
    scale = width**-0.5 if scaling is None else scaling
    if T == 1:
        return single_query_attention(query, key, value, scale, attention_mask).transpose(1, 2), None
    return blocked_attention(query, key, value, scale, attention_mask, causal=causal).transpose(1, 2), None
