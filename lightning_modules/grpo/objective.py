"""What the loss of an update has besides policy term and KL term: which tokens count, and how much."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_modules.grpo.correction import masked_importance, truncated_importance
from lightning_modules.ranges import check_number, check_numbers


class Correction(ABC):
    """How the policy loss is weighted where the sampler's probabilities differ from the trainer's."""

    @abstractmethod
    def __call__(self, old_logprobs_BT: Tensor, sampler_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the weight of each token (B, T); arguments as those of `correction.truncated_importance`."""


@dataclass(frozen=True)
class TruncatedImportance(Correction):
    """The importance weight, cut at a cap (TIS). See `correction.truncated_importance`.

    Args:
        cap: Largest weight.
        level: Weight of a token, of its sequence, or the sequence's geometric mean.
    """

    cap: float = 2.0
    level: Literal["token", "sequence", "geometric"] = "token"

    def __post_init__(self) -> None:
        check_number(
            "cap",
            self.cap,
            least=1,
            infinite=True,
            hint="1 is the weight of equal probabilities, 2 is usual.",
        )

    def __call__(self, old_logprobs_BT: Tensor, sampler_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the weight of each token (B, T)."""
        return truncated_importance(
            old_logprobs_BT, sampler_logprobs_BT, mask_BT, cap=self.cap, level=self.level
        )


@dataclass(frozen=True)
class MaskedImportance(Correction):
    """The importance weight where it lies within bounds, else 0 (MIS). See `correction.masked_importance`.

    Args:
        bounds: Smallest and largest weight that counts.
        level: Weight of a token, of its sequence, or the sequence's geometric mean.
    """

    bounds: tuple[float, float] = (0.5, 5.0)
    level: Literal["token", "sequence", "geometric"] = "token"

    def __post_init__(self) -> None:
        check_numbers("bounds", self.bounds, length=2, least=0, infinite=True)
        if not self.bounds[0] <= 1 <= self.bounds[1]:
            raise ValueError(
                f"bounds={tuple(self.bounds)} must enclose 1, the weight of equal probabilities. (0.5, 5) is usual."
            )

    def __call__(self, old_logprobs_BT: Tensor, sampler_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the weight of each token (B, T)."""
        return masked_importance(
            old_logprobs_BT, sampler_logprobs_BT, mask_BT, bounds=self.bounds, level=self.level
        )


@dataclass(frozen=True)
class Objective:
    """Which tokens count, and how much.

    Args:
        over: What the loss averages over: `tokens` (DAPO), `sequences` (GRPO), or a `constant` (rows x
            max_new_tokens, Dr. GRPO). The denominator is always that of the whole update over all ranks.
        dead_groups: Whether groups without any advantage stay in the denominator (`keep`, as in TRL and verl) or
            leave the objective (`renormalize`). They reach no forward pass, except for a KL term or an entropy bonus
            of `keep`. With resampling others take their place, so they are never in it.
        mask_truncated: Whether completions that the length limit ended leave the objective (DAPO's overlong
            filtering, arXiv 2503.14476, section 3.4).
        entropy_coef: Weight of an entropy bonus: coef x entropy is subtracted from the loss of each token.
        top_entropy: Share of the tokens, those of the highest entropy, whose policy loss counts (arXiv 2506.01939,
            equation 5, with 0.2); 1 is all. Entropy is that of the policy before the first update of the rollout, at
            the cost of a forward pass, and the threshold is one of all rows over all ranks, where the paper has one
            of a micro-batch. The denominator stays that of all tokens, as in the paper.
        correction: Weights of the policy loss where sampler and trainer differ; None for none.
        off_policy_threshold: Leave out completions of negative advantage whose mean log-ratio of sampler to policy
            is above this, nats (DeepSeek-V3.2, arXiv 2512.02556, equation 9); None for none.
        max_sampler_gap: Stop before an update where sampler and trainer disagree by more than this on average, nats per
            token that was drawn in this step. Other kernels and bfloat16 make a few hundredths, another temperature or
            adapter tenths. None does not look; nor is it looked where top_p and its like cut the sampler's
            distribution.
    """

    over: Literal["tokens", "sequences", "constant"] = "tokens"
    dead_groups: Literal["keep", "renormalize"] = "keep"
    mask_truncated: bool = False
    entropy_coef: float = 0.0
    top_entropy: float = 1.0
    correction: Correction | None = None
    off_policy_threshold: float | None = None
    max_sampler_gap: float | None = 0.2

    def __post_init__(self) -> None:
        check_number(
            "objective.entropy_coef",
            self.entropy_coef,
            least=0,
            hint="It weighs a bonus: below 0 entropy would be punished.",
        )
        check_number(
            "objective.top_entropy",
            self.top_entropy,
            above=0,
            most=1,
            hint="It is the share of tokens that is kept: 0.2 is the paper's, 1 keeps all.",
        )
        check_number(
            "objective.off_policy_threshold",
            self.off_policy_threshold,
            above=0,
            none=True,
            hint="In nats; null is no limit.",
        )
        check_number(
            "objective.max_sampler_gap",
            self.max_sampler_gap,
            above=0,
            none=True,
            hint="In nats; null does not look.",
        )
