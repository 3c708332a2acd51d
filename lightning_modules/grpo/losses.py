"""Per-token losses of the policy and how they become one number.

Shapes: B completions, T completion tokens; `mask_BT` is 1 on tokens that count. What stands at masked
positions (padding, tool output) is never read: it may be infinite or NaN without reaching a value or a
gradient. Log-probabilities are in nats, of the temperature-scaled logits that the tokens were sampled from.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 nats: e^20 = 4.9e8 is finite in every dtype but float16, and far outside any
trust region. Values inside are untouched, to the bit; a token outside gets no gradient."""

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


def kl_estimate(
    logprobs_BT: Tensor, ref_logprobs_BT: Tensor, kind: Literal["k1", "k2", "k3"] = "k3"
) -> Tensor:
    """Estimate KL(policy || reference) per token, from tokens that the policy sampled.

    J. Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html), with d = ref - logprobs:

    - `k1` = -d: unbiased, may be negative. As a loss its gradient is zero in expectation, so it belongs into
      a reward or a log.
    - `k2` = d^2 / 2: biased value, but its gradient is that of the KL when on-policy.
    - `k3` = e^d - d - 1: unbiased and never negative; GRPO's choice (arXiv 2402.03300, equation 4). Its
      gradient is biased.

    Deviation: d is clamped (`MAX_LOG_RATIO`). There is no mask: reduce the result with `aggregate`, and
    neither values nor gradients of masked positions survive, NaN included.

    Args:
        logprobs_BT: Log-probabilities under the policy, nats (B, T).
        ref_logprobs_BT: Under the reference, nats (B, T).
        kind: The estimator.

    Returns:
        Nats (B, T).

    Raises:
        ValueError: For an unknown kind.

    >>> kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), "k1")
    tensor([[0.5000]])
    """
    # The clamp also stops NaN on the way back: its gradient is a selection, not a product.
    d_BT = (ref_logprobs_BT - logprobs_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return -d_BT
    if kind == "k2":
        return d_BT.square() / 2
    if kind == "k3":
        # expm1: e^d - 1 keeps its digits near d = 0, where policies usually are.
        return torch.expm1(d_BT) - d_BT
    raise ValueError(f"kind={kind!r} is unknown: use k1, k2 or k3")


def aggregate(
    loss_BT: Tensor,
    mask_BT: Tensor,
    *,
    over: Literal["tokens", "sequences", "constant"],
    denominator: float | Tensor,
) -> Tensor:
    """Reduce per-token losses to this micro-batch's share of the loss of the optimiser step.

    The denominator is a count over the WHOLE optimiser step, all micro-batches and ranks: shares then simply
    add up, and no split into micro-batches changes the gradient. With gradients averaged over W ranks,
    multiply the share by W. Never divide by the number of accumulated batches as well.

    - `sequences`: sum_i (1 / tokens_i) sum_t loss_it / denominator, denominator = number of completions.
      GRPO (arXiv 2402.03300, equation 3) and GSPO. Completions without any token that counts add 0; whether
      they are in the denominator is the caller's choice.
    - `tokens`: sum of all losses / denominator, denominator = number of tokens that count. DAPO
      (arXiv 2503.14476, equation 8).
    - `constant`: sum of all losses / denominator, denominator = number of completions x maximal length.
      Dr. GRPO (arXiv 2503.20783, section 3.2). `tokens` and `constant` differ only in this number.

    Args:
        loss_BT: Per-token loss (B, T).
        mask_BT: 1 or True on tokens that count (B, T).
        over: What is averaged.
        denominator: See above; positive.

    Returns:
        Scalar.

    Raises:
        ValueError: For an unknown `over`, or a denominator that is not positive.

    >>> loss, mask = torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> aggregate(loss, mask, over="sequences", denominator=2)
    tensor(3.5000)
    >>> aggregate(loss, mask, over="tokens", denominator=3)
    tensor(3.)
    """
    if not denominator > 0:
        raise ValueError(
            f"denominator={float(denominator)} must be positive: count over the whole optimiser step, "
            "and skip a step in which no token counts"
        )
    counts_BT = mask_BT.bool()
    loss_B = torch.where(counts_BT, loss_BT, 0.0).sum(1)
    if over == "sequences":
        loss_B = loss_B / counts_BT.sum(1).clamp(min=1)
    elif over not in ("tokens", "constant"):
        raise ValueError(f"over={over!r} is unknown: use tokens, sequences or constant")
    return loss_B.sum() / denominator


def _ratio(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    clip: tuple[float, float],
    level: Level,
) -> tuple[Tensor, Tensor]:
    """Check the arguments; return the ratio (1 where masked) and the mask as bool, both (B, T)."""
    if min(clip) < 0:
        raise ValueError(f"clip={tuple(clip)} must not be negative: (0.2, 0.2) allows ratios from 0.8 to 1.2")
    shapes = [tuple(tensor.shape) for tensor in (logprobs_BT, old_logprobs_BT, mask_BT)]
    if len(set(shapes)) > 1 or advantages_B.shape != logprobs_BT.shape[:1]:
        raise ValueError(
            "logprobs_BT, old_logprobs_BT and mask_BT must share one shape (B, T) and advantages_B be (B,); "
            f"got {shapes[0]}, {shapes[1]}, {shapes[2]} and {tuple(advantages_B.shape)}"
        )
    mask_BT = mask_BT.bool()
    # Masked before anything is exponentiated: 0 x inf would be NaN in the backward pass.
    log_ratio_BT = torch.where(mask_BT, logprobs_BT - old_logprobs_BT, 0.0)
    if level == "token":
        return log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), mask_BT
    if level != "sequence":
        raise ValueError(f"level={level!r} is unknown: use token or sequence")
    mean_B1 = log_ratio_BT.detach().sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
    kept_BT = torch.where(mask_BT, logprobs_BT, 0.0)
    # exp(0) is exactly 1, so the value is s and the gradient s times that of the log-probability.
    return mean_B1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * (kept_BT - kept_BT.detach()).exp(), mask_BT
