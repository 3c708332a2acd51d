"""Weights for tokens that another policy sampled than the one in training believes.

The engine that samples and the model that trains give slightly different log-probabilities for the same
weights (kernels, precision), and sampled completions may be some updates old. Multiply the per-token policy
loss, not the KL term, by the weights.

With delta = old - sampler per token, the weight of a token is exp of

- `token`: its own delta.
- `sequence`: the sum of delta over the row's tokens, the exact ratio of the completion. **It grows with the
  length:** a mean of 0.012 nats, common for another engine, makes 1.2 nats over 100 tokens, a weight of 3.3;
  a cap or bound of a few units then cuts off the long completions, whatever their quality. TRL masks
  sequences above 3 by default.
- `geometric`: the mean of delta over the row's tokens, which does not grow with the length. Bounds must be
  close to 1.

Deviations: exponents are clamped to +-20 nats (`MAX_LOG_RATIO`). A NaN at a token that counts stays NaN, so
that it shows; TRL takes the weight 1 there.

Shapes: B completions, T completion tokens; `mask_BT` is 1 on tokens that count. What stands elsewhere is
never read. Log-probabilities are in nats. Sampling with top-p, top-k or min-p renormalises the sampler's
log-probabilities and so biases every weight: compare those of the full distribution.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_modules.grpo.kl import MAX_LOG_RATIO

CorrectionLevel: TypeAlias = Literal["token", "sequence", "geometric"]
"""What a weight compares: single tokens, whole completions, or completions per token."""


@torch.no_grad()
def truncated_importance(
    old_logprobs_BT: Tensor,
    sampler_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    cap: float = 2.0,
    level: CorrectionLevel = "token",
) -> Tensor:
    """Compute min(weight, cap): truncated importance sampling, which keeps every token.

    F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025); TRL's
    `token_truncate` and `sequence_truncate`.

    Args:
        old_logprobs_BT: Under the policy in training when the completions were made, nats (B, T).
        sampler_logprobs_BT: As the sampler reported them, nats (B, T).
        mask_BT: 1 or True on tokens that count (B, T).
        cap: Upper bound of the weight, at least 1.
        level: See above; mind that a sum over a sequence grows with its length.

    Returns:
        Weights without gradient (B, T), 0 at masked positions.

    Raises:
        ValueError: For a cap below 1, an unknown level, or shapes that do not fit.

    >>> old, sampler = torch.tensor([[0.5, 0.9]]).log(), torch.tensor([[0.4, 0.3]]).log()
    >>> truncated_importance(old, sampler, torch.ones(1, 2))
    tensor([[1.2500, 2.0000]])
    """
    if not cap >= 1:
        raise ValueError(f"cap={cap} must be at least 1, the weight where both policies agree; 2 is usual")
    weights_BT, mask_BT = _weights(old_logprobs_BT, sampler_logprobs_BT, mask_BT, level)
    return torch.where(mask_BT, weights_BT.clamp(max=cap), 0.0)


@torch.no_grad()
def masked_importance(
    old_logprobs_BT: Tensor,
    sampler_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    bounds: tuple[float, float] = (0.5, 5.0),
    level: CorrectionLevel = "token",
) -> Tensor:
    """Compute the weight where it lies within the bounds, else 0: drop what disagrees too much.

    IcePop (Ring-1T, arXiv 2510.18855) at the level of tokens, with its bounds as defaults; TRL's `token_mask`
    and `sequence_mask`.

    Args:
        old_logprobs_BT: As in `truncated_importance`.
        sampler_logprobs_BT: As in `truncated_importance`.
        mask_BT: As in `truncated_importance`.
        bounds: Lowest and highest weight that is kept, on both sides of 1.
        level: See above; mind that a sum over a sequence grows with its length, so that bounds drop the
            long completions first.

    Returns:
        Weights without gradient (B, T), 0 at masked positions.

    Raises:
        ValueError: For bounds that exclude 1, an unknown level, or shapes that do not fit.

    >>> old, sampler = torch.tensor([[0.5, 0.6]]).log(), torch.tensor([[0.4, 0.1]]).log()
    >>> masked_importance(old, sampler, torch.ones(1, 2))
    tensor([[1.2500, 0.0000]])
    """
    low, high = bounds
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"bounds={tuple(bounds)} must enclose 1, the weight where both policies agree")
    weights_BT, mask_BT = _weights(old_logprobs_BT, sampler_logprobs_BT, mask_BT, level)
    outside_BT = (weights_BT < low) | (weights_BT > high)
    return torch.where(mask_BT & ~outside_BT, weights_BT, 0.0)


@torch.no_grad()
def off_policy_rows(
    logprobs_BT: Tensor,
    sampler_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    threshold: float,
) -> Tensor:
    """Find bad completions that the policy has moved away from: A < 0 and mean(sampler - logprobs) > threshold.

    The off-policy sequence mask of DeepSeek-V3.2 (arXiv 2512.02556); TRL's `off_policy_mask_threshold`. Leave
    the loss of these rows out. The mean over the row's tokens does not grow with the length.

    Args:
        logprobs_BT: Under the policy in training now, nats (B, T).
        sampler_logprobs_BT: As the sampler reported them, nats (B, T).
        advantages_B: One advantage per completion (B).
        mask_BT: 1 or True on tokens that count (B, T).
        threshold: Nats per token, positive; TRL suggests 0.5.

    Returns:
        bool (B). False for rows without any token that counts.

    Raises:
        ValueError: For a threshold that is not positive, or shapes that do not fit.

    >>> new, sampler = torch.tensor([[-3.0], [-3.0]]), torch.tensor([[-1.0], [-1.0]])
    >>> off_policy_rows(new, sampler, torch.tensor([1.0, -1.0]), torch.ones(2, 1), threshold=0.5)
    tensor([False,  True])
    """
    if not threshold > 0:
        raise ValueError(f"threshold={threshold} must be positive, in nats per token; 0.5 is usual")
    if advantages_B.shape != logprobs_BT.shape[:1]:
        raise ValueError(
            f"advantages_B has the shape {tuple(advantages_B.shape)}: expected {tuple(logprobs_BT.shape[:1])}, "
            "one per completion"
        )
    delta_BT, mask_BT = _delta(sampler_logprobs_BT, logprobs_BT, mask_BT)
    return (advantages_B < 0) & (delta_BT.sum(1) / mask_BT.sum(1).clamp(min=1) > threshold)


def _delta(logprobs_BT: Tensor, minus_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Check the shapes; return the difference (0 where masked) and the mask as bool, both (B, T)."""
    shapes = [tuple(tensor.shape) for tensor in (logprobs_BT, minus_BT, mask_BT)]
    if len(set(shapes)) > 1 or logprobs_BT.ndim != 2:
        raise ValueError(
            f"both log-probabilities and mask_BT must share one shape (B, T); got {', '.join(map(str, shapes))}"
        )
    mask_BT = mask_BT.bool()
    return torch.where(mask_BT, logprobs_BT - minus_BT, 0.0), mask_BT


def _weights(
    old_logprobs_BT: Tensor, sampler_logprobs_BT: Tensor, mask_BT: Tensor, level: CorrectionLevel
) -> tuple[Tensor, Tensor]:
    """Return the weights before any bound, and the mask as bool, both (B, T)."""
    delta_BT, mask_BT = _delta(old_logprobs_BT, sampler_logprobs_BT, mask_BT)
    if level in ("sequence", "geometric"):
        summed_B1 = delta_BT.sum(1, keepdim=True)
        if level == "geometric":
            summed_B1 = summed_B1 / mask_BT.sum(1, keepdim=True).clamp(min=1)
        delta_BT = summed_B1.expand_as(mask_BT)
    elif level != "token":
        raise ValueError(f"level={level!r} is unknown: use token, sequence or geometric")
    return delta_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), mask_BT
