"""Estimates of the KL divergence to the reference policy.

Shapes: B completions, T completion tokens. Log-probabilities are in nats, of the temperature-scaled logits
that the tokens were sampled from.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 nats: e^20 = 4.9e8 is finite in every dtype but float16, and far outside any
trust region. Values inside are untouched, to the bit; a token outside gets no gradient."""


def kl_estimate(
    logprobs_BT: Tensor,
    ref_logprobs_BT: Tensor,
    kind: Literal["k1", "k2", "k3"] = "k3",
    *,
    old_logprobs_BT: Tensor | None = None,
) -> Tensor:
    """Estimate KL(policy || reference) per token, from tokens that the policy sampled.

    J. Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html), with d = ref - logprobs:

    - `k1` = -d: unbiased, may be negative. As a loss its gradient is zero in expectation, so it belongs into
      a reward or a log.
    - `k2` = d^2 / 2: biased value, but its gradient is that of the KL when on-policy.
    - `k3` = e^d - d - 1: unbiased and never negative; GRPO's choice (arXiv 2402.03300, equation 4). Its
      gradient is biased.

    With `old_logprobs_BT` the estimate is multiplied by the ratio exp(logprobs - old), gradient included
    (DeepSeek-V3.2, arXiv 2512.02556; TRL's `use_bias_correction_kl`). It then estimates the KL of the policy in
    training, where the tokens came from an older one, and the gradient of k3 becomes unbiased: at ratio 1 it
    is -d grad logprobs, that of k2.

    Deviation: d and logprobs - old are clamped (`MAX_LOG_RATIO`). There is no mask: reduce the result with
    `aggregate`, and neither values nor gradients of masked positions survive, NaN included.

    Args:
        logprobs_BT: Log-probabilities under the policy, nats (B, T).
        ref_logprobs_BT: Under the reference, nats (B, T).
        kind: The estimator.
        old_logprobs_BT: Under the policy that made the completions, without gradient, nats (B, T);
            `logprobs_BT.detach()` when on-policy. None leaves the ratio out.

    Returns:
        Nats (B, T).

    Raises:
        ValueError: For an unknown kind.

    >>> kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), "k1")
    tensor([[0.5000]])
    """
    # The clamp also stops NaN on the way back: its gradient is a selection, not a product.
    d_BT = (ref_logprobs_BT - logprobs_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if old_logprobs_BT is None:
        return _estimate(d_BT, kind)
    log_ratio_BT = (logprobs_BT - old_logprobs_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    # Here is a product: a NaN in one factor must stop the gradient of the other as well.
    known_BT = ~(d_BT + log_ratio_BT).isnan()
    d_BT, log_ratio_BT = (torch.where(known_BT, x_BT, torch.nan) for x_BT in (d_BT, log_ratio_BT))
    return _estimate(d_BT, kind) * log_ratio_BT.exp()


def _estimate(d_BT: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Return the estimate for d = ref - logprobs."""
    if kind == "k1":
        return -d_BT
    if kind == "k2":
        return d_BT.square() / 2
    if kind == "k3":
        # expm1: e^d - 1 keeps its digits near d = 0, where policies usually are.
        return torch.expm1(d_BT) - d_BT
    raise ValueError(f"kind={kind!r} is unknown: use k1, k2 or k3")
