"""The policy losses as YAML takes them: settings around the pure functions of `losses`.

A subclass of `PolicyLoss` is a new one: it turns log-probabilities and advantages into a loss per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.grpo.losses import Level, cispo, clip_fractions, clipped_surrogate, gmpo, sapo
from lightning_modules.ranges import check_number, check_numbers


class PolicyLoss(ABC):
    """How the policy is pushed towards completions of positive advantage.

    Attributes:
        of_sequences: Whether a completion has one loss, which stands at each of its tokens. Such a loss is averaged
            over completions, not over tokens.
    """

    of_sequences: bool = False

    @abstractmethod
    def __call__(
        self, logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_B: Tensor, mask_BT: Tensor
    ) -> Tensor:
        """Return the loss of each token (B, T); arguments as those of `losses.clipped_surrogate`."""

    def clipped(
        self, logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_B: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return which tokens are clipped below and above, for the log: two bool tensors (B, T)."""
        none_BT = torch.zeros_like(mask_BT, dtype=torch.bool)
        return none_BT, none_BT


@dataclass(frozen=True)
class ClippedSurrogate(PolicyLoss):
    """PPO's clipped objective: GRPO, and DAPO with `clip: [0.2, 0.28]`. See `losses.clipped_surrogate`.

    Args:
        clip: How far the probability ratio may fall below and rise above 1.
        level: Ratio of tokens, or of whole sequences (GSPO, whose clip is about 3e-4).
        ceiling: Upper bound of the ratio where the advantage is negative (dual clip, TRL's delta), at least 1.
    """

    clip: tuple[float, float] = (0.2, 0.2)
    level: Level = "token"
    ceiling: float | None = None

    def __post_init__(self) -> None:
        _check_clip(self.clip)
        check_number(
            "ceiling",
            self.ceiling,
            least=1,
            none=True,
            hint="Below the ratio of an unchanged policy even an on-policy step would be cut; 3 is usual.",
        )

    @property
    def of_sequences(self) -> bool:  # type: ignore[override]
        """Whether the ratio is one of sequences."""
        return self.level == "sequence"

    def __call__(
        self, logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_B: Tensor, mask_BT: Tensor
    ) -> Tensor:
        """Return the loss of each token (B, T)."""
        return clipped_surrogate(
            logprobs_BT,
            old_logprobs_BT,
            advantages_B,
            mask_BT,
            clip=self.clip,
            level=self.level,
            ceiling=self.ceiling,
        )

    def clipped(
        self, logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_B: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return which tokens have no gradient because of the clip."""
        return clip_fractions(
            logprobs_BT, old_logprobs_BT, advantages_B, mask_BT, clip=self.clip, level=self.level
        )


@dataclass(frozen=True)
class CISPO(PolicyLoss):
    """A REINFORCE loss under a clipped importance weight, so that no token loses its gradient. See `losses.cispo`.

    Args:
        clip: How far the weight may fall below and rise above 1; [1, 4] bounds it by 0 and 5.
    """

    clip: tuple[float, float] = (1.0, 4.0)

    def __post_init__(self) -> None:
        _check_clip(self.clip)

    def __call__(
        self, logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_B: Tensor, mask_BT: Tensor
    ) -> Tensor:
        """Return the loss of each token (B, T)."""
        return cispo(logprobs_BT, old_logprobs_BT, advantages_B, mask_BT, clip=self.clip)

    def clipped(
        self, logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_B: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return which tokens have a bounded weight."""
        mask_BT = mask_BT.bool()
        ratio_BT = torch.where(mask_BT, logprobs_BT - old_logprobs_BT, 0.0).exp()
        return ratio_BT < 1 - self.clip[0], ratio_BT > 1 + self.clip[1]


@dataclass(frozen=True)
class SAPO(PolicyLoss):
    """A soft gate in place of the clip. See `losses.sapo`.

    Args:
        temperature: Sharpness of the gate for positive and for negative advantages.
    """

    temperature: tuple[float, float] = (1.0, 1.05)

    def __post_init__(self) -> None:
        check_numbers("temperature", self.temperature, length=2, above=0, hint="[1.0, 1.05] is the paper's.")

    def __call__(
        self, logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_B: Tensor, mask_BT: Tensor
    ) -> Tensor:
        """Return the loss of each token (B, T)."""
        return sapo(logprobs_BT, old_logprobs_BT, advantages_B, mask_BT, temperature=self.temperature)


@dataclass(frozen=True)
class GMPO(PolicyLoss):
    """The geometric mean of token ratios, clipped in log space. See `losses.gmpo`.

    Args:
        clip: How far a token's log-ratio may fall below and rise above 0, nats.
    """

    clip: tuple[float, float] = (0.4, 0.4)
    of_sequences = True

    def __post_init__(self) -> None:
        _check_clip(self.clip)

    def __call__(
        self, logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_B: Tensor, mask_BT: Tensor
    ) -> Tensor:
        """Return the loss of each token (B, T)."""
        return gmpo(logprobs_BT, old_logprobs_BT, advantages_B, mask_BT, clip=self.clip)


def _check_clip(clip: tuple[float, float]) -> None:
    check_numbers(
        "clip", clip, length=2, least=0, infinite=True, hint="[0.2, 0.2] allows ratios from 0.8 to 1.2."
    )
