"""Per-token losses of the policy and how they become one number.

Shapes: B completions, T completion tokens; `mask_BT` is 1 on tokens that count. What stands at masked
positions (padding, tool output) is never read: it may be infinite or NaN without reaching a value or a
gradient. Log-probabilities are in nats, of the temperature-scaled logits that the tokens were sampled from.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_modules.grpo.aggregation import aggregate as aggregate
from lightning_modules.grpo.kl import MAX_LOG_RATIO as MAX_LOG_RATIO
from lightning_modules.grpo.kl import kl_estimate as kl_estimate

__all__ = [
    "MAX_LOG_RATIO",
    "Level",
    "aggregate",
    "cispo",
    "clip_fractions",
    "clipped_surrogate",
    "gmpo",
    "kl_estimate",
    "sapo",
]

Level: TypeAlias = Literal["token", "sequence"]
"""What the importance ratio compares: single tokens (PPO, GRPO) or whole completions (GSPO)."""


def clipped_surrogate(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    level: Level = "token",
    ceiling: float | None = None,
) -> Tensor:
    """Compute -min(ratio A, clip(ratio, 1 - low, 1 + high) A) per token.

    PPO's clipped objective (arXiv 1707.06347, equation 7) as GRPO uses it (arXiv 2402.03300, equation 3).
    DAPO (arXiv 2503.14476, section 3.1) is `clip=(0.2, 0.28)`.

    At `level="sequence"` it is GSPO (arXiv 2507.18071, equations 5 to 7): the ratio is
    s = exp(mean over the row's tokens of (logprobs - old)). Each token carries
    stopgrad(s) exp(logprobs - stopgrad(logprobs)), which has the value s; averaged over the row's tokens
    (`aggregate(over="sequences")`) value and gradient are those of the paper. The paper's clip is of the
    order of 3e-4.

    With `ceiling` the unclipped branch uses min(ratio, ceiling), which bounds the loss of a bad token that
    became much more likely (A < 0, ratio far above 1): the dual clip of arXiv 1912.09729 (equation 5, c = 3)
    and TRL's `delta`. A ceiling below 1 + high also lowers the upper clip of good tokens.

    On-policy, pass `logprobs_BT.detach()` as the old ones: the ratio is then exactly 1 and the gradient is
    that of the plain policy gradient, -A grad logprobs.

    Deviation: log-ratios are clamped (`MAX_LOG_RATIO`).

    Args:
        logprobs_BT: Log-probabilities under the policy in training, nats (B, T).
        old_logprobs_BT: Under the policy that made the completions, without gradient, nats (B, T).
        advantages_B: One advantage per completion (B).
        mask_BT: 1 or True on tokens that count (B, T).
        clip: How far the ratio may fall below and rise above 1.
        level: Ratio of tokens or of sequences.
        ceiling: Upper bound of the ratio in the unclipped branch, at least 1; None for none.

    Returns:
        Loss to minimise (B, T), 0 at masked positions.

    Raises:
        ValueError: For a negative clip, a ceiling below 1, an unknown level, or shapes that do not fit.

    >>> new, old = torch.tensor([[1.5, 0.5]]).log(), torch.zeros(1, 2)
    >>> clipped_surrogate(new, old, torch.tensor([1.0]), torch.ones(1, 2))
    tensor([[-1.2000, -0.5000]])
    """
    if ceiling is not None and not ceiling >= 1:
        raise ValueError(
            f"ceiling={ceiling} must be at least 1, the on-policy ratio; 3 is usual, None turns it off"
        )
    ratio_BT, mask_BT = _ratio(logprobs_BT, old_logprobs_BT, advantages_B, mask_BT, clip, level)
    advantages_B1 = advantages_B[:, None]
    unclipped_BT = (ratio_BT if ceiling is None else ratio_BT.clamp(max=ceiling)) * advantages_B1
    clipped_BT = ratio_BT.clamp(1 - clip[0], 1 + clip[1]) * advantages_B1
    return torch.where(mask_BT, -torch.minimum(unclipped_BT, clipped_BT), 0.0)


@torch.no_grad()
def clip_fractions(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    level: Level = "token",
) -> tuple[Tensor, Tensor]:
    """Find the tokens whose gradient `clipped_surrogate` cuts off.

    Masks rather than fractions: sum them over the micro-batches and divide by the tokens of the step, since
    the fractions of micro-batches of different size do not average.

    Args:
        logprobs_BT: As in `clipped_surrogate`.
        old_logprobs_BT: As in `clipped_surrogate`.
        advantages_B: As in `clipped_surrogate`.
        mask_BT: As in `clipped_surrogate`.
        clip: As in `clipped_surrogate`.
        level: As in `clipped_surrogate`.

    Returns:
        Two bool tensors (B, T): A < 0 and ratio < 1 - low; A > 0 and ratio > 1 + high. False where masked.

    Raises:
        ValueError: As `clipped_surrogate`.

    >>> new, old = torch.tensor([[1.5, 0.5]]).log(), torch.zeros(1, 2)
    >>> clip_fractions(new, old, torch.tensor([1.0]), torch.ones(1, 2))
    (tensor([[False, False]]), tensor([[ True, False]]))
    """
    ratio_BT, mask_BT = _ratio(logprobs_BT, old_logprobs_BT, advantages_B, mask_BT, clip, level)
    advantages_B1 = advantages_B[:, None]
    low_BT = mask_BT & (advantages_B1 < 0) & (ratio_BT < 1 - clip[0])
    high_BT = mask_BT & (advantages_B1 > 0) & (ratio_BT > 1 + clip[1])
    return low_BT, high_BT


def cispo(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    clip: tuple[float, float] = (1.0, 4.0),
) -> Tensor:
    """Compute -stopgrad(clip(ratio, 1 - low, 1 + high)) A logprob per token.

    CISPO (MiniMax-M1, arXiv 2506.13585): the clip bounds the weight of a token and never takes its gradient
    away. With `tokens` in `aggregate` it is the paper's objective. The defaults let ratios go from 0 to 5.

    Both bounds are distances from 1, as everywhere here. TRL's `epsilon_high` is the bound itself,
    min(ratio, epsilon_high): 5 there is `clip=(1.0, 4.0)` here, and its default 0.2 scales all gradients by
    0.2, while here no clip touches the gradient at ratio 1.

    Args:
        logprobs_BT: As in `clipped_surrogate`.
        old_logprobs_BT: As in `clipped_surrogate`.
        advantages_B: As in `clipped_surrogate`.
        mask_BT: As in `clipped_surrogate`.
        clip: How far the ratio may fall below and rise above 1; a lower one of 1 or more is no bound.

    Returns:
        Loss to minimise (B, T), 0 at masked positions. Only its gradient has a meaning.

    Raises:
        ValueError: For a negative clip, or shapes that do not fit.

    >>> new, old = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.5, 0.05]]).log()
    >>> cispo(new, old, torch.tensor([1.0]), torch.ones(1, 2)) / new  # -weight A
    tensor([[-1., -5.]])
    """
    ratio_BT, mask_BT = _ratio(logprobs_BT, old_logprobs_BT, advantages_B, mask_BT, clip, "token")
    weight_BT = ratio_BT.detach().clamp(1 - clip[0], 1 + clip[1])
    return -weight_BT * advantages_B[:, None] * torch.where(mask_BT, logprobs_BT, 0.0)


def sapo(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    temperature: tuple[float, float] = (1.0, 1.05),
) -> Tensor:
    """Compute -A sigmoid(tau (ratio - 1)) 4 / tau per token: a soft trust region instead of a clip.

    SAPO (arXiv 2511.20347). The gradient is that of the plain policy gradient at ratio 1 and fades out on
    both sides; tau is higher, so the region narrower, for bad completions. The paper averages with
    `sequences` in `aggregate`.

    Args:
        logprobs_BT: As in `clipped_surrogate`.
        old_logprobs_BT: As in `clipped_surrogate`.
        advantages_B: As in `clipped_surrogate`.
        mask_BT: As in `clipped_surrogate`.
        temperature: tau where A > 0, and elsewhere; positive.

    Returns:
        Loss to minimise (B, T), 0 at masked positions.

    Raises:
        ValueError: For a temperature that is not positive, or shapes that do not fit.

    >>> sapo(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([1.0]), torch.ones(1, 1))
    tensor([[-2.]])
    """
    if not all(tau > 0 for tau in temperature):
        raise ValueError(f"temperature={tuple(temperature)} must be positive: (1.0, 1.05) is the paper's")
    ratio_BT, mask_BT = _ratio(logprobs_BT, old_logprobs_BT, advantages_B, mask_BT, (0.0, 0.0), "token")
    tau_B1 = torch.where(advantages_B > 0, temperature[0], temperature[1]).to(ratio_BT)[:, None]
    gate_BT = torch.sigmoid(tau_B1 * (ratio_BT - 1)) * 4 / tau_B1
    return torch.where(mask_BT, -advantages_B[:, None] * gate_BT, 0.0)


def gmpo(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    clip: tuple[float, float] = (0.4, 0.4),
) -> Tensor:
    """Compute -A times the geometric mean of the row's clipped ratios, the same at each of its tokens.

    GMPO (arXiv 2507.20673): with x = logprobs - old, the row's value is -A exp(mean over tokens of c), where
    c = min(x, high) if A > 0, else max(x, -low). Averaged over the row's tokens
    (`aggregate(over="sequences")`) value and gradient are those of the paper.

    Deviation: log-ratios are clamped (`MAX_LOG_RATIO`) before they are clipped.

    Args:
        logprobs_BT: As in `clipped_surrogate`.
        old_logprobs_BT: As in `clipped_surrogate`.
        advantages_B: As in `clipped_surrogate`.
        mask_BT: As in `clipped_surrogate`.
        clip: How far the log-ratio of a token may fall below and rise above 0, nats.

    Returns:
        Loss to minimise (B, T), 0 at masked positions.

    Raises:
        ValueError: For a negative clip, or shapes that do not fit.

    >>> new, old = torch.tensor([[4.0, 0.25]]).log(), torch.zeros(1, 2)
    >>> gmpo(new, old, torch.tensor([1.0]), torch.ones(1, 2), clip=(9.0, 9.0))
    tensor([[-1., -1.]])
    """
    log_ratio_BT, mask_BT = _log_ratio(logprobs_BT, old_logprobs_BT, advantages_B, mask_BT, clip)
    log_ratio_BT = log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    clipped_BT = torch.where(
        advantages_B[:, None] > 0, log_ratio_BT.clamp(max=clip[1]), log_ratio_BT.clamp(min=-clip[0])
    )
    mean_B1 = clipped_BT.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask_BT, -advantages_B[:, None] * mean_B1.exp(), 0.0)


def _log_ratio(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    clip: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Check the arguments; return the log-ratio (0 where masked) and the mask as bool, both (B, T)."""
    if not all(bound >= 0 for bound in clip):
        raise ValueError(f"clip={tuple(clip)} must not be negative: (0.2, 0.2) allows ratios from 0.8 to 1.2")
    shapes = [tuple(tensor.shape) for tensor in (logprobs_BT, old_logprobs_BT, mask_BT)]
    if len(set(shapes)) > 1 or advantages_B.shape != logprobs_BT.shape[:1]:
        raise ValueError(
            "logprobs_BT, old_logprobs_BT and mask_BT must share one shape (B, T) and advantages_B be (B,); "
            f"got {shapes[0]}, {shapes[1]}, {shapes[2]} and {tuple(advantages_B.shape)}"
        )
    mask_BT = mask_BT.bool()
    # Masked before anything is exponentiated: 0 x inf would be NaN in the backward pass.
    return torch.where(mask_BT, logprobs_BT - old_logprobs_BT, 0.0), mask_BT


def _ratio(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    clip: tuple[float, float],
    level: Level,
) -> tuple[Tensor, Tensor]:
    """As `_log_ratio`, but the ratio itself (1 where masked), of tokens or of sequences."""
    log_ratio_BT, mask_BT = _log_ratio(logprobs_BT, old_logprobs_BT, advantages_B, mask_BT, clip)
    if level == "token":
        return log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), mask_BT
    if level != "sequence":
        raise ValueError(f"level={level!r} is unknown: use token or sequence")
    mean_B1 = log_ratio_BT.detach().sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
    kept_BT = torch.where(mask_BT, logprobs_BT, 0.0)
    # exp(0) is exactly 1, so the value is s and the gradient s times that of the log-probability.
    return mean_B1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * (kept_BT - kept_BT.detach()).exp(), mask_BT
