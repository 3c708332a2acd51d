"""From rewards to advantages, group by group.

Shapes: B = prompts x G rows, the G completions of a prompt in neighbouring rows. A NaN reward means that no
reward function applied to the row. Deviations from the papers: near-equal rewards count as equal, because
dividing float noise by its own standard deviation turns it into a full-size signal; and rows without a reward
are left out, where the papers know none.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Scale: TypeAlias = Literal["std", "population", "batch", "none", "rloo"]
"""How `group_advantages` scales the centred rewards."""


def dead_groups(rewards_B: Tensor, group_size: int, *, tolerance: float = 1e-6) -> Tensor:
    """Whether a group carries no signal: all its advantages are zero under every scale.

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
        Advantages, float32 (B). A row without applicable reward has exactly 0.

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
    else:
        advantages_PG = centred_PG
    # where, not a product: a dead group with eps=0 is 0 / 0.
    return torch.where(live_P1 & applies_PG, advantages_PG, 0.0).reshape(-1)


def _grouped(rewards_B: Tensor, group_size: int) -> Tensor:
    """Return the rewards as float32 (P, G), after the checks that both public functions share."""
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
    return rewards_B.float().reshape(len(rewards_B) // group_size, group_size)
