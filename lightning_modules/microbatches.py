"""How rows of different lengths are grouped and padded for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def plan_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group rows of similar length so that a padded group stays within a token budget.

    Args:
        lengths: Prompt plus completion tokens per row.
        max_tokens: Upper limit of rows x longest row. A single longer row forms a group of its own.

    Returns:
        Positions in `lengths`, grouped; longest rows first, so that a memory overflow shows at once.

    >>> plan_micro_batches([4, 2, 4, 2], max_tokens=8)
    [[0, 2], [1, 3]]
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def within_width(rows: Sequence[int], lengths: Sequence[tuple[int, int]], limit: int) -> list[list[int]]:
    """Divide rows so that the longest prompt and the longest completion of a group fit a width together.

    Some models (MPT, GPT-Neo) compute nothing wider than their context, padding included.

    Args:
        rows: A group.
        lengths: Tokens of each row's prompt and completion, by its number.
        limit: The width; each row alone fits it.

    Returns:
        Groups, of the rows in their order.

    >>> within_width([0, 1, 2], [(8, 1), (1, 8), (7, 2)], limit=10)
    [[0, 2], [1]]
    """
    groups: list[list[int]] = []
    for row in rows:
        for group in groups:
            together = [*group, row]
            prompt, completion = (max(lengths[one][part] for one in together) for part in (0, 1))
            if prompt + completion <= limit:
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def completion_passes(lengths: Sequence[int], spared: int) -> list[list[int]]:
    """Divide completions where each part, padded to its own longest, spares enough of a pass.

    Args:
        lengths: Tokens of each completion (b).
        spared: Tokens of padding that make a further pass worth it.

    Returns:
        Rows of each pass; in their order if they are all in one, otherwise the longest first.

    >>> completion_passes([9, 2, 10, 1], spared=10)
    [[2, 0], [1, 3]]
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))

    def divide(rows: list[int]) -> list[list[int]]:
        longest = lengths[rows[0]]
        most, at = max(((longest - lengths[row]) * (len(rows) - i), i) for i, row in enumerate(rows))
        return divide(rows[:at]) + divide(rows[at:]) if at and most >= spared else [rows]

    passes = divide(order)
    return passes if len(passes) > 1 else [sorted(order)]


def pad_pairs(
    prompts: Sequence[list[int]], completions: Sequence[list[int]], *, pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad prompts on the left and completions on the right, so that all completions start in one column.

    Args:
        prompts: Token ids (b rows).
        completions: Token ids (b rows).
        pad_token_id: Filler; masked everywhere.
        device: Where the tensors go.

    Returns:
        Token ids (b, P+T), attention mask (b, P+T) int64, and completion mask (b, T) float32.
    """
    P, T = max(map(len, prompts)), max(map(len, completions))
    input_ids = torch.full((len(prompts), P + T), pad_token_id)
    attention_mask = torch.zeros(len(prompts), P + T, dtype=torch.long)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        span = slice(P - len(prompt), P + len(completion))
        input_ids[i, span] = torch.tensor(prompt + completion)
        attention_mask[i, span] = 1
    mask = attention_mask[:, P:].float()
    return sent(input_ids, device), sent(attention_mask, device), sent(mask, device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a tensor of the host to a device, without waiting until that is through with what it has to do.

    Args:
        tensor: On the CPU, not to be changed afterwards.
        device: Where it goes.
    """
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class PaddedRows:
    """Rows that go through the model with their prompts.

    Attributes:
        input_ids: Prompts padded on the left, completions on the right (b, P+T).
        attention_mask: 1 on real tokens (b, P+T).
        completion_mask: 1 on completion tokens (b, T).
        scored: Their positions in the flat (b T).
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    scored: Tensor


def pad_rows(
    prompts: Sequence[list[int]], completions: Sequence[list[int]], *, pad_token_id: int, device: torch.device
) -> PaddedRows:
    """Pad as `pad_pairs` does.

    Args:
        prompts: Token ids (b rows).
        completions: Token ids (b rows).
        pad_token_id: Filler; masked everywhere.
        device: Where the tensors go.
    """
    ids, attention_mask, mask = pad_pairs(
        prompts, completions, pad_token_id=pad_token_id, device=torch.device("cpu")
    )
    scored = positions([len(ids) for ids in completions], mask.shape[1])
    return PaddedRows(*(sent(one, device) for one in (ids, attention_mask, mask, scored)))


def positions(lengths: Sequence[int], width: int) -> Tensor:
    """Return where the tokens of completions, padded on the right to a width, stand in the flat (b width).

    By their lengths: a device that looks for them in a mask would keep its host waiting.

    Args:
        lengths: Tokens of each completion (b).
        width: That of the padded rows.

    >>> positions([1, 2], 3)
    tensor([0, 3, 4])
    """
    return torch.tensor([i * width + t for i, length in enumerate(lengths) for t in range(length)])
