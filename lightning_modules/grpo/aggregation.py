"""How per-token losses become one number.

Shapes: B completions, T completion tokens; `mask_BT` is 1 on tokens that count. What stands at masked
positions is never read: it may be infinite or NaN without reaching a value or a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


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
