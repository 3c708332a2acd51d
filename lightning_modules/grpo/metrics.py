"""What a rollout tells before any update."""

from __future__ import annotations

from torch import Tensor

from lightning_modules.grpo.rollout import Rollout, Scores
from lightning_modules.metrics import Means


def add_rollout_means(means: Means, rollout: Rollout, scores: Scores, advantages_B: Tensor) -> None:
    """Add what a rollout tells before any update: rewards, success, dead groups, lengths.

    A group is dead when all its advantages are zero: easy where every completion succeeded, hard otherwise.
    """
    dead_Q = (advantages_B.view(-1, rollout.group_size) == 0).all(1)
    easy_Q = scores.success.view(-1, rollout.group_size).all(1)
    means.add("reward", scores.total)
    for name, rewards_B in zip(scores.names, scores.by_function.unbind(1), strict=True):
        means.add(f"reward/{name}", rewards_B)
    means.add("accuracy", scores.success.float())
    means.add("dead_groups", dead_Q.float())
    means.add("dead_easy", (dead_Q & easy_Q).float())
    means.add("dead_hard", (dead_Q & ~easy_Q).float())
    means.add("completion_length", rollout.lengths.float())
    means.add("truncated", rollout.truncated.float())
