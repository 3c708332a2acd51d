"""Rows that share a prompt go through the model with one pass over the prompt, gradients included.

Shapes: b rows, u distinct prompts, P prompt tokens, T completion tokens, H hidden units.

The prompts run first, once each, with a cache. Its keys and values are handed to the rows, through which autograd goes,
and the completions run on top. A row's log-probabilities depend on its own prompt and completion alone, so they and
their gradients are those of whole rows, to rounding: what changes is that u P + b T tokens are computed instead of
b (P + T), and fewer where completions of different lengths run in passes of their own. Dropout, if it is on, is the
same in the prompt of all rows of a prompt; whole rows draw it row by row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lightning_modules.headless import base_of, can_chunk, evaluating, few_tokens, scored, without_head
from lightning_modules.microbatches import completion_passes, positions, sent
from lightning_modules.rope import switching_length
from lightning_modules.sharding import sharded_modules

# Tokens of padding for which completions get a further pass; a GPU is through with them before a pass has started.
_SPARED = 2**11
_SPARED_CPU = 2**7

Announce = Callable[[Sequence[int]], None]


@dataclass(frozen=True)
class SharedRows:
    """Rows for `shared_logprobs`.

    Attributes:
        prompt_ids: Distinct prompts, padded on the left (u, P).
        prompt_mask: 1 on their tokens (u, P).
        completion_ids: Completions, padded on the right (b, T).
        completion_mask: 1 on their tokens (b, T).
        lengths: How many those are (b).
        prompt_of_row: Which prompt a row has (b).
        rows_of_prompt: Which rows have a prompt (u).
        order: The same one after the other, where the tensors are (b).
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    lengths: list[int]
    prompt_of_row: Tensor
    rows_of_prompt: list[list[int]]
    order: Tensor

    def part(self, members: Sequence[int]) -> SharedRows:
        """Return some rows, with all prompts; padding that none of them needs is left out."""
        index = sent(torch.tensor(members), self.prompt_of_row.device)
        place = {row: number for number, row in enumerate(members)}
        lengths = [self.lengths[row] for row in members]
        rows_of_prompt = [[place[row] for row in rows if row in place] for rows in self.rows_of_prompt]
        return SharedRows(
            prompt_ids=self.prompt_ids,
            prompt_mask=self.prompt_mask,
            completion_ids=self.completion_ids[index, : max(lengths)],
            completion_mask=self.completion_mask[index, : max(lengths)],
            lengths=lengths,
            prompt_of_row=self.prompt_of_row[index],
            rows_of_prompt=rows_of_prompt,
            order=sent(_joined(rows_of_prompt), index.device),
        )


def share_prompts(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    *,
    pad_token_id: int,
    device: torch.device,
    kinds: Sequence[Hashable] | None = None,
) -> SharedRows:
    """Find the distinct prompts of rows, and pad.

    Args:
        prompts: Token ids, at least one each (b).
        completions: Token ids, at least one each (b).
        pad_token_id: Filler; masked everywhere.
        device: Where the tensors go.
        kinds: What else must be equal for two rows to share a prompt, such as a task that the adapter routes by (b).

    Raises:
        ValueError: If there are no rows, or a prompt or completion is empty.
    """
    if not prompts or not all(prompts) or not all(completions):
        raise ValueError(
            "prompts, completions: each needs rows with at least one token. Leave empty rows out."
        )
    rows_of: dict[Hashable, list[int]] = {}
    for row, key in enumerate(prompt_keys(prompts, kinds)):
        rows_of.setdefault(key, []).append(row)
    rows_of_prompt = list(rows_of.values())
    prompt_of_row = torch.empty(len(prompts), dtype=torch.long)
    for number, rows in enumerate(rows_of_prompt):
        prompt_of_row[rows] = number
    prompt_ids, prompt_mask = _padded([prompts[rows[0]] for rows in rows_of_prompt], pad_token_id, left=True)
    completion_ids, completion_mask = _padded(completions, pad_token_id, left=False)
    return SharedRows(
        prompt_ids=sent(prompt_ids, device),
        prompt_mask=sent(prompt_mask, device),
        completion_ids=sent(completion_ids, device),
        completion_mask=sent(completion_mask, device),
        lengths=[len(ids) for ids in completions],
        prompt_of_row=sent(prompt_of_row, device),
        rows_of_prompt=rows_of_prompt,
        order=sent(_joined(rows_of_prompt), device),
    )


def prompt_keys(prompts: Sequence[list[int]], kinds: Sequence[Hashable] | None = None) -> list[Hashable]:
    """Return what rows must have in common to share a prompt.

    Args:
        prompts: Token ids (b).
        kinds: As in `share_prompts` (b).
    """
    return list(zip(map(tuple, prompts), kinds or [None] * len(prompts), strict=True))


def plan_shared_micro_batches(
    keys: Sequence[Hashable], lengths: Sequence[tuple[int, int]], max_tokens: int
) -> list[list[int]]:
    """Group rows so that those of a prompt stay together, and a prompt counts once.

    A prompt whose rows do not fit together is divided, and counts in each part.

    Args:
        keys: What rows have in common that share a prompt (n), from `prompt_keys`.
        lengths: Tokens of each row's prompt and completion (n).
        max_tokens: Upper limit of prompts x longest prompt + rows x longest completion. A single longer row forms a
            group of its own.

    Returns:
        Positions in `lengths`, grouped; longest rows first, so that a memory overflow shows at once.

    >>> plan_shared_micro_batches(["a", "b", "a"], [(8, 2), (4, 2), (8, 1)], max_tokens=12)
    [[0, 2], [1]]
    """
    rows_of: dict[Hashable, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: (-sum(lengths[row]), row)):
        rows_of.setdefault(keys[row], []).append(row)

    def fits(rows: Sequence[int]) -> bool:
        prompt = max(lengths[row][0] for row in rows)
        completion = max(lengths[row][1] for row in rows)
        return len({keys[row] for row in rows}) * prompt + len(rows) * completion <= max_tokens

    groups: list[list[int]] = []
    for rows in rows_of.values():
        if groups and fits([*groups[-1], *rows]):
            groups[-1] += rows
            continue
        groups.append([])  # never opened for a part of a prompt that fits as a whole
        for row in rows:
            if groups[-1] and not fits([*groups[-1], row]):
                groups.append([])
            groups[-1].append(row)
    return groups


def shared_logprobs(
    model: nn.Module,
    rows: SharedRows,
    *,
    temperature: float,
    entropy_gradient: bool = False,
    announce: Announce | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies of completions, each prompt forwarded once. See `can_share`.

    A pass over prompts, and those of `completion_passes` over completions; one if the model is sharded, whatever the
    lengths, so that ranks stay in step.

    Args:
        model: What is to be called: a causal language model, or a module around it whose hooks matter.
        rows: From `share_prompts`.
        temperature: Divides the logits; 0 (greedy) leaves them as they are.
        entropy_gradient: Whether the entropy carries a gradient.
        announce: Called before each pass with the rows that it is about, for adapters that treat rows differently:
            first with one row of each prompt, then with those of each pass. All are announced when this returns.

    Returns:
        Nats, float32, 0 on padding (b, T) each.
    """
    if announce is not None:
        announce([members[0] for members in rows.rows_of_prompt])
    last_u1H, cache = _prompt_pass(model, rows.prompt_ids, rows.prompt_mask)
    everyone = list(range(len(rows.lengths)))
    spared = _SPARED_CPU if rows.completion_ids.device.type == "cpu" else _SPARED
    passes = [everyone] if sharded_modules(model) else completion_passes(rows.lengths, spared)
    found = []
    for members in passes:
        if announce is not None:
            announce(members)
        part = rows if members == everyone else rows.part(members)
        hidden_bTH = _completion_pass(
            model,
            _hand_out_cache(cache, part, keep=members is not passes[-1]),
            part.prompt_mask[part.prompt_of_row],
            part.completion_ids,
            part.completion_mask,
        )
        predictors_bTH = torch.cat([_hand_out(last_u1H, part), hidden_bTH], dim=1)
        scored_N = sent(positions(part.lengths, part.completion_ids.shape[1]), predictors_bTH.device)
        found.append(
            scored(model, predictors_bTH, part.completion_ids, scored_N, temperature, entropy_gradient)
        )
    if len(found) == 1:
        return found[0]
    if announce is not None:
        announce(everyone)
    logprobs, entropies = zip(*found, strict=True)
    T = rows.completion_ids.shape[1]
    return _gathered(logprobs, passes, T), _gathered(entropies, passes, T)


def _gathered(parts_bT: Sequence[Tensor], passes: Sequence[list[int]], T: int) -> Tensor:
    """Put what passes found into the order of their rows, with zeros on padding."""
    joined_bT = torch.cat([nn.functional.pad(part, (0, T - part.shape[1])) for part in parts_bT])
    return joined_bT[sent(_joined(passes).argsort(), joined_bT.device)]


# ---------------------------------------------------------------------- what cannot


def can_share(model: nn.Module, *, tries: bool = True) -> str | None:
    """Return why `shared_logprobs` would be wrong or impossible for a model; None if it would not.

    Besides what is known of caches, a few tokens are run in both ways and compared: a collective under sharding. An
    adapter that routes rows must have heard of one row. A router that looks beyond single tokens and what is announced
    of rows would see the halves of a row apart; that is not found out.

    Args:
        model: What is to be called.
        tries: Whether tokens are run; without, only what is known of the model's parts is looked at.
    """
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing computes layers again, without a cache"
    if reason := can_chunk(model, tries=tries):
        return reason
    base = base_of(model)
    assert base is not None
    if switching_length(base.config) is not None:
        return "its rotary embedding depends on the length of the whole row"
    layers = DynamicCache(config=base.config).layers
    if (reason := _forgets(layers)) or not tries:
        return reason
    ids, ones = few_tokens(base)
    with evaluating(model):
        whole = without_head(model, ids, ones).logits[:, 2:-1].float()
        last, cache = _prompt_pass(model, ids[:, :3], ones[:, :3])
        if type(cache) is not DynamicCache:
            return f"its cache is a {type(cache).__name__}, not keys and values of its layers"
        if reason := _forgets(cache.layers):
            return reason
        rest = _completion_pass(model, cache, ones[:, :3], ids[:, 3:], ones[:, 3:])
    difference = float((torch.cat([last, rest], dim=1).float() - whole).norm() / whole.norm())
    if not difference < 0.1:  # bfloat16 gives 0.01; a wrong mask or position about 1
        return f"its hidden states differ by {difference:.0%} when they come after a cached prompt"
    return None


def _forgets(layers: Sequence[Any]) -> str | None:
    others = sorted({type(layer).__name__ for layer in layers} - {DynamicLayer.__name__})
    return f"its cache has a {others[0]}, which does not keep every token" if others else None


# ---------------------------------------------------------------------- passes


def _prompt_pass(model: nn.Module, ids_uP: Tensor, mask_uP: Tensor) -> tuple[Tensor, Any]:
    """Return the hidden states at the last token of prompts (u, 1, H), and their cache."""
    out = without_head(model, ids_uP, mask_uP, logits_to_keep=1, use_cache=True)
    return out.logits, out.past_key_values


def _completion_pass(
    model: nn.Module, cache: Any, prompt_mask_bP: Tensor, ids_bT: Tensor, mask_bT: Tensor
) -> Tensor:
    """Return the hidden states after all completion tokens but the last (b, T-1, H)."""
    # The last token predicts nothing. A single one is run all the same: ranks of a sharded model stay in step.
    fed = max(1, ids_bT.shape[1] - 1)
    mask = torch.cat([prompt_mask_bP, mask_bT[:, :fed]], dim=1)
    hidden: Tensor = without_head(model, ids_bT[:, :fed], mask, cache=cache, use_cache=True).logits
    return hidden[:, : ids_bT.shape[1] - 1]


class _HandOut(torch.autograd.Function):
    """Gives rows what their prompt has. Gradients of rows are added up in float32 and in a fixed order.

    The rows of each prompt come by one index on the device: one for each prompt would be a copy that the host waits
    for, in each layer.
    """

    @staticmethod
    def forward(
        ctx: Any, of_prompts: Tensor, prompt_of_row: Tensor, order: Tensor, counts: list[int]
    ) -> Tensor:
        ctx.order, ctx.counts = order, counts
        return of_prompts.index_select(0, prompt_of_row)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        parts = gradient.index_select(0, ctx.order).split(ctx.counts)
        return torch.stack([part.sum(0) for part in parts]), None, None, None


def _hand_out_cache(cache: Any, rows: SharedRows, *, keep: bool) -> Any:
    """Return a cache for rows; that of the prompts is used up unless it is kept."""
    handed = cache
    if keep:
        handed = copy.copy(cache)
        handed.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in handed.layers:
        layer.keys, layer.values = (_hand_out(one, rows) for one in (layer.keys, layer.values))
    return handed


def _hand_out(of_prompts: Tensor, rows: SharedRows) -> Tensor:
    counts = [len(members) for members in rows.rows_of_prompt]
    handed: Tensor = _HandOut.apply(of_prompts, rows.prompt_of_row, rows.order, counts)  # type: ignore[no-untyped-call]
    return handed


def _joined(lists: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([one for members in lists for one in members])


def _padded(rows: Sequence[list[int]], pad_token_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, span] = torch.tensor(row)
        mask[i, span] = 1
    return ids, mask
