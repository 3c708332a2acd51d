"""What an update needs of a rollout: groups of completions in plain numbers, which a checkpoint can hold.

Shapes: G completions of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from datamodules.batches import Prompt
from lightning_modules.distributed import gathered
from lightning_modules.grpo.rollout import Rollout


@dataclass(frozen=True)
class Group:
    """The completions of one prompt.

    Attributes:
        prompt: As the data has it.
        task: Its task.
        prompt_ids: Its token ids.
        token_ids: Token ids of each completion (G).
        logprobs: The sampler's log-probability of each of those tokens, nats (G).
        advantages: (G).
        truncated: Whether the length limit ended a completion (G).
        drawn_at: Optimiser steps that had been made when it was drawn.
    """

    prompt: Prompt
    task: str
    prompt_ids: list[int]
    token_ids: list[list[int]]
    logprobs: list[list[float]]
    advantages: list[float]
    truncated: list[bool]
    drawn_at: int

    def __len__(self) -> int:
        return len(self.advantages)

    @property
    def is_live(self) -> bool:
        """Whether any of its completions is better than another, so that it teaches something."""
        return any(self.advantages)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data, from which `Group(**data)` makes it again."""
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """One completion on its way through the model.

    Attributes:
        prompt: As the data has it.
        task: Its task.
        prompt_ids: Token ids of the prompt.
        token_ids: Token ids of the completion.
        logprobs: The sampler's log-probability of each of those, nats.
        advantage: Compared with its group.
        counts: Whether its tokens count; the others only keep ranks in step.
        on_policy: Whether the policy that drew it is the one that the update starts from.
        number: Its position in the rollout, where that matters.
    """

    prompt: Prompt
    task: str
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    advantage: float
    counts: bool = True
    on_policy: bool = True
    number: int = 0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)


def groups_of(rollout: Rollout, advantages_B: Tensor, drawn_at: int) -> list[Group]:
    """Cut a rollout into its groups.

    Args:
        rollout: B rows.
        advantages_B: Of its rows (B).
        drawn_at: Optimiser steps that had been made when it was drawn.
    """
    G, completions, advantages = rollout.group_size, rollout.completions, advantages_B.tolist()
    return [
        Group(
            prompt=rollout.batch.prompts[first],
            task=rollout.batch.tasks[first],
            prompt_ids=rollout.prompt_ids[first],
            token_ids=completions.token_ids[first : first + G],
            logprobs=completions.logprobs[first : first + G],
            advantages=advantages[first : first + G],
            truncated=[reason == "length" for reason in completions.finish[first : first + G]],
            drawn_at=drawn_at,
        )
        for first in range(0, len(rollout), G)
    ]


def rows_of(groups: Sequence[Group], step: int, counts: Callable[[Group, int], bool]) -> list[Row]:
    """Return the completions of groups as rows.

    Args:
        groups: The groups.
        step: Optimiser steps that have been made.
        counts: Of a group and the number of a completion in it, whether it becomes a row.
    """
    return [
        Row(
            prompt=group.prompt,
            task=group.task,
            prompt_ids=group.prompt_ids,
            token_ids=group.token_ids[i],
            logprobs=group.logprobs[i],
            advantage=group.advantages[i],
            on_policy=group.drawn_at == step,
        )
        for group in groups
        for i in range(len(group))
        if counts(group, i)
    ]


def balanced(
    rows: Sequence[Row], rank: int, bundles: Callable[[Sequence[Row]], list[list[Row]]]
) -> list[Row]:
    """Share the rows of all ranks out anew, so that each has about as many tokens; a collective.

    The largest bundles go first, each to the rank that has the fewest tokens so far. One that is more than half of a
    rank's fair share is divided.

    Args:
        rows: Of this rank.
        rank: Its number.
        bundles: Finds rows that are cheaper together than apart, because their prompt counts once.

    Returns:
        Its new rows.
    """
    parts: list[list[Row]] = gathered(list(rows))
    if len(parts) == 1:
        return parts[0]
    whole = bundles([row for part in parts for row in part])
    limit = sum(map(_tokens, whole)) / len(parts) / 2
    pieces = [piece for bundle in whole for piece in _divided(bundle, limit)]
    tokens = [0] * len(parts)
    mine: list[Row] = []
    for piece in sorted(pieces, key=_tokens, reverse=True):
        lightest = tokens.index(min(tokens))
        tokens[lightest] += _tokens(piece)
        if lightest == rank:
            mine += piece
    return mine


def _tokens(bundle: Sequence[Row]) -> int:
    return len(bundle[0].prompt_ids) + sum(len(row.token_ids) for row in bundle)


def _divided(bundle: list[Row], limit: float) -> list[list[Row]]:
    """Cut rows into as few runs of about one length as stay below a limit, or into single rows."""
    number = 1
    while number < len(bundle) and _tokens(bundle[: -(-len(bundle) // number)]) > limit:
        number += 1
    size = -(-len(bundle) // number)
    return [bundle[first : first + size] for first in range(0, len(bundle), size)]
