"""Rotary embeddings whose frequencies depend on the length of the whole row, made a function of each row alone.

Shapes: B rows, S positions.

Two types of transformers do (`modeling_rope_utils`): `longrope` has one set of frequencies for rows up to the length of
pretraining and another for longer ones, and `dynamic` (NTK) stretches them with each token beyond it. transformers
takes the longest row of a batch for all of them, and `dynamic` keeps what an earlier, longer batch left. What a row
then is depends on its neighbours and its predecessors. A cache holds keys of frequencies that no longer apply once a
row has grown beyond that length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def switching_length(config: Any) -> int | None:
    """Return up to how many tokens a row's rotary frequencies do not depend on its length; None if they never do.

    Args:
        config: The transformers configuration of a model.
    """
    return min((length for _, length in _switches(config)), default=None)


def grows_beyond(config: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> bool:
    """Return whether a row's frequencies may change while its completion is drawn, so that no cache holds.

    Args:
        config: The transformers configuration of a model.
        prompts: Token ids (B).
        max_new_tokens: Limit of the completions.
    """
    return any(
        len(ids) + max_new_tokens > length and not (keeps and len(ids) > length)
        for keeps, length in _switches(config)
        for ids in prompts
    )


def _switches(config: Any) -> list[tuple[bool, int]]:
    """For each rotary embedding that depends on lengths: whether it stays as it is in longer rows, and the length."""
    text = config.get_text_config(decoder=True)
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    found = []
    for one in (given, *given.values()):  # layers of different types have parameters each
        kind = str(one.get("rope_type") or one.get("type")) if isinstance(one, Mapping) else ""
        if "dynamic" in kind:
            found.append((False, int(text.max_position_embeddings)))
        elif kind in ("longrope", "su"):  # the second is an old name
            length = one.get("original_max_position_embeddings")
            found.append((True, int(length or text.original_max_position_embeddings)))
    return found


def see_rows_alone(model: nn.Module) -> None:
    """Let rotary embeddings that depend on the length of a row take each row's own. Others stay as they are.

    Args:
        model: Holds modules as transformers writes them: with `rope_type`, called with the hidden states and the
            position ids (B, S).
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, Mapping) else (kinds,)
        depends = any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)
        if depends and "forward" not in vars(module):
            vars(module)["forward"] = partial(_by_rows, module)


def _by_rows(
    module: Any, x: Tensor, position_ids: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (B, S, width) of each row, by its own length."""

    def whole(positions: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = type(module).forward(module, x, positions, *arguments, **options)
        return found

    layer_type = options.get("layer_type", arguments[0] if arguments else None)
    kind, parameters = module.rope_type, module.config.rope_parameters
    if isinstance(kind, Mapping):
        kind, parameters = kind[layer_type], parameters[layer_type]
    if position_ids.dim() != 2 or not ("dynamic" in kind or kind == "longrope"):
        return whole(position_ids)
    if kind == "longrope":
        # Both sets for all rows: to ask which rows need which would keep the host of a GPU waiting.
        length = int(parameters["original_max_position_embeddings"])
        short = whole(position_ids.clamp(max=length - 1))
        beyond = position_ids.new_full((len(position_ids), 1), length)
        long = [one[:, :-1] for one in whole(torch.cat([position_ids, beyond], dim=1))]
        is_long_B11 = (position_ids.amax(1) >= length)[:, None, None]
        return torch.where(is_long_B11, long[0], short[0]), torch.where(is_long_B11, long[1], short[1])
    lengths = [max(last + 1, module.original_max_seq_len) for last in position_ids.amax(1).tolist()]
    rows_of: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        rows_of.setdefault(length, []).append(row)
    parts = []
    for rows in rows_of.values():
        _forget_longer_rows(module)
        parts.append(whole(position_ids[rows]))
    back = torch.tensor([row for rows in rows_of.values() for row in rows], device=x.device).argsort()
    cos, sin = (torch.cat(list(some))[back] for some in zip(*parts, strict=True))
    return cos, sin


def _forget_longer_rows(module: Any) -> None:
    """Take a `dynamic` embedding back to where it started."""
    for name in [name for name in dir(module) if name.endswith("max_seq_len_cached")]:
        setattr(module, name, module.original_max_seq_len)
    for name, buffer in list(module.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            setattr(module, name.replace("original_inv_freq", "inv_freq"), buffer)
