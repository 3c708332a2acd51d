"""RewardWatch: tells the user about rewards that cannot teach what he hopes for."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.grpo.rollout import Scores

_CHECKS = (
    "Look at the rollouts (callback RolloutTable, then `quiver rollouts FILE`): is the answer found where the function "
    "looks for it, does it get the right column of the data, is the task far too hard or far too easy?"
)


class RewardWatch:
    """Watches the rewards of a run on one rank and warns once about each thing.

    Args:
        patience: Steps without a difference after which a reward function counts as constant.
        keeps_signs_only: Whether advantages of two completions are their sign alone, whatever the rewards differ by.
    """

    def __init__(self, patience: int, *, keeps_signs_only: bool) -> None:
        self.patience = patience
        self._may_warn_of_signs = keeps_signs_only
        self._steps: dict[str, int] = {}
        self._values: dict[str, float] = {}

    def observe(self, scores: Scores, group_size: int) -> None:
        """Look at the rewards of a step.

        Args:
            scores: Of B rows.
            group_size: G.
        """
        for name, rewards_B in zip(scores.names, scores.by_function.unbind(1), strict=True):
            self._watch_constant(name, rewards_B[~rewards_B.isnan()])
        if self._may_warn_of_signs and group_size == 2:
            self._watch_signs(scores.total.view(-1, 2))

    def _watch_constant(self, name: str, rewards_N: torch.Tensor) -> None:
        if not len(rewards_N):
            return
        first = self._values.setdefault(name, float(rewards_N[0]))
        self._steps[name] = self._steps.get(name, 0) + 1
        if bool((rewards_N != first).any()):
            self._steps[name] = -(2**62)  # it is not constant, and never will be
        elif self._steps[name] == self.patience:
            rank_zero_warn(
                f"Reward function {name!r} has returned {first:g} for every completion of {self.patience} steps, so "
                f"it teaches nothing. {_CHECKS}"
            )

    def _watch_signs(self, rewards_P2: torch.Tensor) -> None:
        differences_P = (rewards_P2[:, 0] - rewards_P2[:, 1]).abs()
        differences_P = differences_P[differences_P > 1e-6]  # NaN is left out too
        if len(differences_P) and float(differences_P.max() - differences_P.min()) > 1e-6:
            self._may_warn_of_signs = False
            rank_zero_warn(
                "Rewards differ by various amounts, but with two completions a standard deviation is half the "
                "difference itself, so every advantage is its sign: a difference of 0.01 counts as much as one of 1. "
                "Set advantage: rloo (or none) where sizes matter."
            )
