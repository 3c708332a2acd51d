"""The advantage estimators as YAML takes them: settings around the pure functions of `advantages`.

Shapes: B rows of all ranks, G completions of a prompt in neighbouring rows, K reward functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_modules.grpo.advantages import Scale, group_advantages, normalized_each, opo_advantages
from lightning_modules.ranges import check_number


@dataclass(frozen=True)
class Rewards:
    """What completions are compared by.

    Attributes:
        total: Weighted sum of the rewards, less a KL penalty if there is one; NaN where none applies (B).
        by_function: Reward of each function, NaN where it does not apply (B, K).
        weights: Of the functions (K); None weighs all with 1.
        lengths: Tokens of each completion (B).
        group_size: G.
    """

    total: Tensor
    by_function: Tensor
    weights: Sequence[float] | None
    lengths: Tensor
    group_size: int


class Advantage(ABC):
    """How rewards become advantages."""

    @abstractmethod
    def __call__(self, rewards: Rewards) -> Tensor:
        """Compare the completions of each group.

        Args:
            rewards: Of all ranks.

        Returns:
            (B), 0 in groups that teach nothing.
        """


@dataclass(frozen=True)
class GroupAdvantage(Advantage):
    """Rewards summed, then centred and scaled within the group. See `advantages.group_advantages`.

    Args:
        scale: `std`, `population`, `batch`, `none` (Dr. GRPO), `rloo` or `maxrl`.
        eps: Added to a standard deviation, in units of the reward.
        tolerance: Rewards of a group that differ by no more are equal.
    """

    scale: Scale = "population"
    eps: float = 1e-4
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        _check(eps=self.eps, tolerance=self.tolerance)

    def __call__(self, rewards: Rewards) -> Tensor:
        """Compare the sums."""
        return group_advantages(
            rewards.total, rewards.group_size, scale=self.scale, eps=self.eps, tolerance=self.tolerance
        )


@dataclass(frozen=True)
class OPO(Advantage):
    """The baseline of least variance for on-policy steps, weighted by length. See `advantages.opo_advantages`.

    Args:
        tolerance: Rewards of a group that differ by no more are equal.
    """

    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        _check(tolerance=self.tolerance)

    def __call__(self, rewards: Rewards) -> Tensor:
        """Compare the sums."""
        return opo_advantages(rewards.total, rewards.lengths, rewards.group_size, tolerance=self.tolerance)


@dataclass(frozen=True)
class GDPO(Advantage):
    """Each reward function normalised by itself, then summed. See `advantages.normalized_each`.

    Args:
        eps: Added to a standard deviation, in units of the reward.
        tolerance: Rewards of a group that differ by no more are equal.
    """

    eps: float = 1e-4
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        _check(eps=self.eps, tolerance=self.tolerance)

    def __call__(self, rewards: Rewards) -> Tensor:
        """Compare function by function."""
        weights = rewards.weights or [1.0] * rewards.by_function.shape[1]
        return normalized_each(
            rewards.by_function, weights, rewards.group_size, eps=self.eps, tolerance=self.tolerance
        )


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        check_number(f"advantage.{name}", value, least=0, hint="Rewards are compared by it.")
