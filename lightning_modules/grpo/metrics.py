"""What a rollout tells before any update."""

from __future__ import annotations

from torch import Tensor

from lightning_modules.grpo.rollout import Rollout, Scores
from lightning_modules.metrics import Means


def add_rollout_means(means: Means, rollout: Rollout, scores: Scores, advantages_B: Tensor) -> None:
    """Add what a rollout tells before any update: rewards, success, dead groups, lengths.

    A group is dead when all its advantages are zero: easy where every completion succeeded, else hard.
    Groups without any reward are dead, but neither easy nor hard.
    """
    G = rollout.group_size
    success_QG = scores.success.view(-1, G)
    dead_Q = (advantages_B.view(-1, G) == 0).all(1)
    rewarded_Q = (~scores.total.view(-1, G).isnan()).any(1)
    easy_Q = ((success_QG == 1) | success_QG.isnan()).all(1) & (success_QG == 1).any(1)
    means.add("reward", scores.total)
    for name, rewards_B in zip(scores.names, scores.by_function.unbind(1), strict=True):
        means.add(f"reward/{name}", rewards_B)
    means.add("accuracy", scores.success)
    means.add("dead_groups", dead_Q.float())
    means.add("dead_easy", (dead_Q & easy_Q).float())
    means.add("dead_hard", (dead_Q & rewarded_Q & ~easy_Q).float())
    means.add("completion_length", rollout.lengths.float())
    means.add("truncated", rollout.truncated.float())
