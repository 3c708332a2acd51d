"""What one rollout holds, and what it is drawn with.

Shapes: B rows = prompts x G, the G completions of a prompt in neighbouring rows; K reward functions.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from datamodules.batches import Prompt, TextBatch
from lightning_modules.sampling.base import Completions


@dataclass(frozen=True)
class Rollout:
    """One batch of prompts with G completions each.

    Attributes:
        batch: The rows' texts and columns, each prompt G times (B).
        prompt_ids: Token ids of each prompt (B).
        completions: What the sampler returned (B).
        group_size: G.
        extra: Columns that reward functions added with `log_extra`, for the rollout table (B each).

    Raises:
        ValueError: If a completion is missing or empty, or has not one log-probability for each token.
    """

    batch: TextBatch
    prompt_ids: list[list[int]]
    completions: Completions
    group_size: int
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens, logprobs = self.completions.token_ids, self.completions.logprobs
        if not len(self.prompt_ids) == len(tokens) == len(logprobs):
            raise ValueError(
                f"The sampler returned {len(tokens)} completions and {len(logprobs)} lists of log-probabilities for "
                f"{len(self.prompt_ids)} rows. It must return one of each per row, in their order."
            )
        for row, (ids, values) in enumerate(zip(tokens, logprobs, strict=True)):
            if not ids or len(ids) != len(values):
                raise ValueError(
                    f"The sampler returned {len(ids)} tokens and {len(values)} log-probabilities for row {row} "
                    f"({str(self.batch.prompts[row])[:60]!r}). It must return at least one token, the end token "
                    "included, and a log-probability of each. The run can go on from its last checkpoint."
                )

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def lengths(self) -> Tensor:
        """Completion tokens per row, int64 (B)."""
        return torch.tensor([len(ids) for ids in self.completions.token_ids])

    @property
    def truncated(self) -> Tensor:
        """Whether the length limit ended the completion, bool (B)."""
        return torch.tensor([reason == "length" for reason in self.completions.finish])

    def add_extra(self, name: str, values: Sequence[Any]) -> None:
        """Keep a column for the rollout table (TRL's `log_extra`).

        Raises:
            ValueError: If there is not one value per row.
        """
        if not hasattr(values, "__len__"):
            raise ValueError(
                f"log_extra({name!r}) got {values!r:.60}, which is no list. Give one value per row."
            )
        if len(values) != len(self):
            raise ValueError(
                f"log_extra({name!r}) got {len(values)} values for {len(self)} rows. Give one each."
            )
        self.extra[str(name)] = list(values)

    def completions_for_rewards(self) -> list[Prompt]:
        """Return completions in the form of their prompts: strings, or one assistant message each."""
        return [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(self.batch.prompts, self.completions.texts, strict=True)
        ]


@dataclass(frozen=True)
class Scores:
    """Rewards of one rollout.

    Attributes:
        by_function: Reward of each function, NaN where it is not applicable (B, K).
        total: Their weighted sum, NaN where no function is applicable (B).
        success: 1 where the first function's reward reaches `Scoring.success`, else 0; NaN where that
            function does not apply (B).
        names: Name of each function (K).
    """

    by_function: Tensor
    total: Tensor
    success: Tensor
    names: list[str]


def repeat_rows(batch: TextBatch, times: int) -> TextBatch:
    """Repeat each row of a batch `times` times, copies next to each other."""
    return batch.take(row for row in range(len(batch)) for _ in range(times))


def row_seeds(
    run: int, step: int, uids: Sequence[int], num_generations: int, before: Sequence[int] = ()
) -> list[int]:
    """Derive a seed for each completion from what names it.

    Args:
        run: Seed of the run.
        step: Number of the rollout in the run.
        uids: Of the prompts.
        num_generations: Completions per prompt.
        before: Of the prompts that ranks before this one have in the same step, where prompts may come twice.

    Returns:
        (prompts x num_generations), each below 2^63; different ones for a prompt that comes twice.
    """
    seen: Counter[int] = Counter(before)
    seeds = []
    for uid in uids:
        for number in range(num_generations):
            name = f"{run}:{step}:{uid}:{seen[uid]}:{number}"
            seeds.append(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1)
        seen[uid] += 1
    return seeds
