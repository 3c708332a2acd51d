"""Checks that passes over padded rows are right for a model and its tokenizer, and how long rows may be.

Refused in one line where they are not: most of it would otherwise be a number that is silently wrong.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel

# Names that configurations give to the most positions that their model can tell apart.
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
# Settings of a configuration that make a forward pass return more, or something else, than logits and cache.
_OUTPUTS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}


def context_length(config: Any) -> int | None:
    """Return the most tokens that prompt and completion may have together.

    Args:
        config: The transformers configuration of a model, nested or not.

    Returns:
        None where nothing limits them: state-space models, and those that bias attention by distance (ALiBi).
    """
    text = config.get_text_config(decoder=True)
    found = [getattr(text, name, None) for name in _CONTEXT if name in dir(text)]
    lengths = [int(length) for length in found if isinstance(length, int) and length > 0]
    return min(lengths, default=None)


def plain_outputs(config: Any) -> None:
    """Let a model return its logits by name, and nothing that costs time or fails beside a cache.

    An auxiliary loss of the routers is no part of our losses: it is said, once, that it is not trained.

    Args:
        config: The transformers configuration of a model; changed in place.
    """
    asked = False
    for one in {id(part): part for part in (config, config.get_text_config(decoder=True))}.values():
        for name, value in _OUTPUTS.items():
            if getattr(one, name, value) != value:
                setattr(one, name, value)
        if getattr(one, "output_router_logits", False):
            one.output_router_logits, asked = False, True
    if asked:
        rank_zero_warn(
            "The model's configuration sets output_router_logits: true, for an auxiliary loss that balances its "
            "experts. No objective here has that loss, so the routers are trained without it; false is set."
        )


def check_vocabulary(tokenizer: Any, config: Any, source: str) -> None:
    """Check that the model has an embedding for each token of its tokenizer.

    Args:
        tokenizer: A transformers tokenizer.
        config: The transformers configuration of the model.
        source: The model, as the user named it.

    Raises:
        ValueError: If a token has none.
    """
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if size is None:
        return
    beyond = sorted((i, text) for text, i in tokenizer.get_vocab().items() if i >= size)
    if beyond:
        number, text = beyond[0]
        raise ValueError(
            f"model={source!r}: the tokenizer has {len(beyond)} tokens without an embedding, {text!r} with id {number} "
            f"first: the model's embeddings end at {size - 1}. Resize them (model.resize_token_embeddings(len(tokenizer"
            "))) and save model and tokenizer together, or take the tokenizer that belongs to the model."
        )


def pad_token(tokenizer: Any) -> int:
    """Return the id that fills unused positions: any will do, for masks say what counts."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(one) for one in candidates if one is not None)


@torch.no_grad()
def check_rows(base: PreTrainedModel, source: str) -> None:
    """Check that a row's logits depend on its own earlier tokens alone: not on later ones, nor on padding.

    A few tokens are run, in a model that is not of the usual kind: one with rotary positions and a cache of keys and
    values. Where it does not compute on its present device, nothing is looked at.

    Args:
        base: Without an adapter.
        source: The model, as the user named it.

    Raises:
        ValueError: If it reads later tokens, or its rows cannot be padded.
    """
    text = base.config.get_text_config(decoder=True)
    known = inspect.signature(base.forward).parameters
    looks_ahead = bool(getattr(text, "use_bidirectional_attention", False))
    usual = getattr(text, "rope_parameters", None) and "position_ids" in known and not base._is_stateful
    if (usual and not looks_ahead) or base.device.type == "meta" or "flash" in text._attn_implementation:
        return
    was_training = base.training
    base.eval()
    ids = torch.arange(1, 9, device=base.device)[None] % text.vocab_size
    alone = base(input_ids=ids[:, :6], use_cache=False).logits[:, :6]
    longer = base(input_ids=ids, use_cache=False).logits[:, :6]
    padded = torch.cat(
        [ids[:, 6:], ids[:, 6:], ids[:, :6], ids[:, :2]], dim=1
    )  # any tokens will do as padding
    mask = torch.zeros_like(padded)
    mask[:, 4:10] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    in_padding = base(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    base.train(was_training)
    rounding = 1e-3 if alone.dtype == torch.float32 else 0.1
    if not _difference(longer, alone) < rounding:
        raise ValueError(
            f"model={source!r}: {type(base).__name__} reads tokens that come later, so it is no causal language model. "
            "Take one that reads from left to right, or set is_decoder: true in its config.json."
        )
    if not _difference(in_padding[:, 4:10], alone) < rounding:
        raise ValueError(
            f"model={source!r}: {type(base).__name__} computes other logits for a row when there is padding beside it, "
            "whatever the mask says, so that results would depend on what stands in a batch. Take another model."
        )


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
