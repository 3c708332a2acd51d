"""From rewards to advantages, group by group.

Shapes: B = prompts x G rows, the G completions of a prompt in neighbouring rows; K reward functions. A NaN
reward means that the function, or all of them, did not apply to the row. Computed and returned in float32, or
in float64 if the rewards are. Deviations from the papers: near-equal rewards count as equal, because dividing
float noise by its own standard deviation turns it into a full-size signal; and rows without a reward are left
out, where the papers know none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Scale: TypeAlias = Literal["std", "population", "batch", "none", "rloo", "maxrl"]
"""How `group_advantages` scales the centred rewards."""


def dead_groups(rewards_B: Tensor, group_size: int, *, tolerance: float = 1e-6) -> Tensor:
    """Whether a group carries no signal: all its advantages are zero, whatever the scale.

    That is so when the applicable rewards lie within `tolerance` of each other, and when fewer than two
    rewards of the group are applicable, since one reward alone has no baseline.

    Args:
        rewards_B: Rewards, NaN where not applicable (B).
        group_size: G.
        tolerance: Largest difference between rewards that counts as equal, in units of the reward.

    Returns:
        bool (B / G).

    Raises:
        ValueError: As `group_advantages`.

    >>> dead_groups(torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, torch.nan]), 2)
    tensor([False,  True,  True])
    """
    rewards_PG = _grouped(rewards_B, group_size)
    missing_PG = rewards_PG.isnan()
    highest_P = rewards_PG.masked_fill(missing_PG, -torch.inf).amax(1)
    lowest_P = rewards_PG.masked_fill(missing_PG, torch.inf).amin(1)
    # Without any applicable reward the difference is -inf, with one it is 0: dead in both cases.
    return highest_P - lowest_P <= tolerance


def group_advantages(
    rewards_B: Tensor,
    group_size: int,
    *,
    scale: Scale = "std",
    eps: float = 1e-4,
    tolerance: float = 1e-6,
) -> Tensor:
    """Compare each reward with the rewards of its group.

    With r a reward, m the mean and n the number of the group's applicable rewards, the advantage is

    - `std`: (r - m) / (s + eps), s the standard deviation with Bessel's correction (n - 1). GRPO
      (DeepSeekMath, arXiv 2402.03300, section 4.1.2) as TRL and verl compute it.
    - `population`: the same with s over n. The reading of 2-GRPO (arXiv 2510.00977, proposition C.1 in v3),
      where a decided pair of binary rewards has the advantages +1 and -1.
    - `batch`: (r - m) / (s + eps), s with Bessel's correction over all applicable rewards of the B rows
      (PPO-lite, arXiv 2508.08221). The value depends on which rows are handed in together.
    - `none`: r - m. Dr. GRPO (arXiv 2503.20783, section 3.2): no bias towards easy and hard prompts.
    - `rloo`: n / (n - 1) (r - m), which is r minus the mean of the other rewards (arXiv 2402.14740,
      equation 7): the unbiased one. For binary rewards at G=2 it equals `population` up to eps.
    - `maxrl`: (r - m) / m, and 0 where m is not above `tolerance`. MaxRL (arXiv 2602.02710): the gradient of
      the log-probability of success, which weights hard prompts most. For rewards that are not negative;
      +1 and -1 for a decided pair of binary ones. Unlike the others it changes with a shift of all rewards.

    With G=2 and continuous rewards, `std` and `population` keep only the sign of the difference; use `rloo`
    or `none` where its size matters.

    Args:
        rewards_B: Rewards of B = prompts x G rows, groups contiguous, NaN where not applicable (B).
        group_size: G, at least 2.
        scale: One of the above.
        eps: Added to the standard deviation, in units of the reward.
        tolerance: Rewards of a group that differ by no more than this are equal: their advantages are
            exactly zero (see `dead_groups`).

    Returns:
        Advantages (B). A row without applicable reward has exactly 0.

    Raises:
        ValueError: For a group size below 2, a number of rows that it does not divide, rewards that are not
            one-dimensional or infinite, or an unknown scale.

    >>> group_advantages(torch.tensor([1.0, 0.0, 3.0, 3.0]), 2, scale="rloo")
    tensor([ 1., -1.,  0.,  0.])
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale={scale!r} is unknown: use one of {', '.join(get_args(Scale))}")
    rewards_PG = _grouped(rewards_B, group_size)
    applies_PG = ~rewards_PG.isnan()
    live_P1 = ~dead_groups(rewards_B, group_size, tolerance=tolerance)[:, None]

    count_P1 = applies_PG.sum(1, keepdim=True)
    mean_P1 = rewards_PG.nansum(1, keepdim=True) / count_P1.clamp(min=1)
    centred_PG = (rewards_PG - mean_P1).masked_fill(~applies_PG, 0.0)
    others_P1 = (count_P1 - 1).clamp(min=1)
    squares_P1 = centred_PG.square().sum(1, keepdim=True)
    if scale == "std":
        advantages_PG = centred_PG / ((squares_P1 / others_P1).sqrt() + eps)
    elif scale == "population":
        advantages_PG = centred_PG / ((squares_P1 / count_P1.clamp(min=1)).sqrt() + eps)
    elif scale == "batch":
        rewards_N = rewards_PG[applies_PG]
        # Fewer than two rewards have no spread; every group is then dead and the divisor unused.
        spread = rewards_N.std() if len(rewards_N) > 1 else rewards_PG.new_zeros(())
        advantages_PG = centred_PG / (spread + eps)
    elif scale == "rloo":
        advantages_PG = centred_PG * (count_P1 / others_P1)
    elif scale == "maxrl":
        # A mean of rewards that cancel is float noise, and dividing by it would be an explosion.
        advantages_PG = torch.where(mean_P1 > tolerance, centred_PG / mean_P1, 0.0)
    else:
        advantages_PG = centred_PG
    # where, not a product: a dead group with eps=0 is 0 / 0.
    return torch.where(live_P1 & applies_PG, advantages_PG, 0.0).reshape(-1)


def opo_advantages(
    rewards_B: Tensor, lengths_B: Tensor, group_size: int, *, tolerance: float = 1e-6
) -> Tensor:
    """Subtract the length-weighted mean reward of the group: r_i - sum_j l_j r_j / sum_j l_j.

    OPO (arXiv 2505.23585): the baseline of least variance, if the squared norm of a completion's gradient
    grows like its length l. It is meant for steps on-policy, and for losses that sum over tokens
    (`aggregate(over="tokens")` or `"constant"`): then the length-weighted advantages of a group sum to 0.

    Args:
        rewards_B: As in `group_advantages` (B).
        lengths_B: Tokens of each completion that count, not negative (B).
        group_size: G, at least 2.
        tolerance: As in `group_advantages`.

    Returns:
        Advantages (B). Exactly 0 for rows without applicable reward, and in groups that are dead
        (`dead_groups`) or whose applicable rows have no tokens.

    Raises:
        ValueError: As `group_advantages`, and for lengths that are negative, not finite or not one per row.

    >>> opo_advantages(torch.tensor([1.0, 0.0]), torch.tensor([1, 3]), 2)
    tensor([ 0.7500, -0.2500])
    """
    rewards_PG = _grouped(rewards_B, group_size)
    if lengths_B.shape != rewards_B.shape:
        raise ValueError(
            f"lengths_B has the shape {tuple(lengths_B.shape)}: expected {tuple(rewards_B.shape)}, one length "
            "per reward"
        )
    if not (lengths_B.isfinite() & (lengths_B >= 0)).all():
        raise ValueError(
            "lengths_B holds a negative or not finite length: pass the tokens that count per row"
        )
    applies_PG = ~rewards_PG.isnan()
    lengths_PG = lengths_B.to(rewards_PG).view_as(rewards_PG) * applies_PG
    total_P1 = lengths_PG.sum(1, keepdim=True)
    baseline_P1 = (rewards_PG * lengths_PG).nansum(1, keepdim=True) / total_P1
    live_P1 = ~dead_groups(rewards_B, group_size, tolerance=tolerance)[:, None] & (total_P1 > 0)
    return torch.where(live_P1 & applies_PG, rewards_PG - baseline_P1, 0.0).reshape(-1)


def normalized_each(
    rewards_BK: Tensor,
    weights: Sequence[float] | Tensor,
    group_size: int,
    *,
    eps: float = 1e-4,
    tolerance: float = 1e-6,
) -> Tensor:
    """Normalise each reward function within its group, add them up, and normalise over the batch.

    GDPO (arXiv 2601.05242; TRL's `normalize_then_sum`): z_k = (r_k - m_k) / (s_k + eps) per group and
    function, x = sum_k weight_k z_k, advantage = x / (s + eps) with s over all rows that have any reward; both
    standard deviations with Bessel's correction. So rewards of different units, or combinations with the same
    total, stay distinct. The value depends on which rows are handed in together.

    The batch mean of x is not subtracted, since it is zero by construction: the z_k of a group sum to 0 over
    the rows where function k applies. Subtracting it, as the paper's formula and TRL do, would only add float
    noise, and turn the exact zeros of groups that are equal in every function into a signal. Deviation: sums
    x of a group that lie within `tolerance` of each other count as equal, like the rewards.

    Args:
        rewards_BK: One column per reward function, groups contiguous, NaN where it does not apply (B, K).
        weights: One per function (K).
        group_size: G, at least 2.
        eps: Added to the standard deviations, in units of the reward and of x.
        tolerance: As in `group_advantages`, per function.

    Returns:
        Advantages (B). A row to which no function applies has exactly 0.

    Raises:
        ValueError: As `group_advantages` for each column, and for a number of weights other than K.

    >>> normalized_each(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), [1.0, 1.0], 2, eps=0.0)
    tensor([ 0.7071, -0.7071])
    """
    if rewards_BK.ndim != 2 or not 0 < rewards_BK.shape[1] == len(weights):
        raise ValueError(
            f"rewards_BK has the shape {tuple(rewards_BK.shape)} and weights {len(weights)} entries: expected "
            "(B, K) and K, one column and one weight per reward function"
        )
    scores_BK = torch.stack(
        [group_advantages(r_B, group_size, eps=eps, tolerance=tolerance) for r_B in rewards_BK.unbind(1)], 1
    )
    sums_B = scores_BK @ torch.as_tensor(weights).to(scores_BK)
    sums_B = sums_B.masked_fill(rewards_BK.isnan().all(1), torch.nan)
    return group_advantages(sums_B, group_size, scale="batch", eps=eps, tolerance=tolerance)


def _grouped(rewards_B: Tensor, group_size: int) -> Tensor:
    """Return the rewards as float (P, G), after the checks that all public functions share."""
    if rewards_B.ndim != 1:
        raise ValueError(
            f"rewards_B has the shape {tuple(rewards_B.shape)}: expected (B,), one reward per row"
        )
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: a group of one has no baseline; set num_generations >= 2")
    if len(rewards_B) % group_size:
        raise ValueError(
            f"{len(rewards_B)} rewards do not form groups of group_size={group_size}: "
            "pass whole groups, the completions of a prompt in neighbouring rows"
        )
    infinite_N = rewards_B.isinf().nonzero()[:, 0].tolist()
    if infinite_N:
        raise ValueError(
            f"rewards_B is infinite at row {infinite_N[0]} ({len(infinite_N)} such rows): "
            "rewards must be finite, or NaN where no reward applies"
        )
    dtype = torch.float64 if rewards_B.dtype == torch.float64 else torch.float32
    return rewards_B.to(dtype).reshape(len(rewards_B) // group_size, group_size)
