"""How settings of one group size carry over to another at equal compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Matched(NamedTuple):
    """Settings of an update with another group size.

    Attributes:
        prompts: Prompts of an update, over all ranks.
        num_generations: Completions of each.
        lr: Learning rate.
    """

    prompts: int
    num_generations: int
    lr: float


def linear(ratio: float) -> float:
    """Scale the learning rate with the prompts of an update: the rule of the 2-GRPO paper."""
    return ratio


def square_root(ratio: float) -> float:
    """Scale the learning rate with the square root of the prompts of an update, as is usual for Adam."""
    return math.sqrt(ratio)


def match_compute(
    prompts: int,
    num_generations: int,
    lr: float,
    *,
    to: int,
    rule: Callable[[float], float] = linear,
) -> Matched:
    """Keep the rollouts of an update, prompts x G, when the group size changes.

    "It Takes Two" (arXiv 2510.00977, lemma C.3 in v3): the variance of a gradient goes with the number of rollouts in
    the update, not with the group size. So fewer completions of more prompts cost the same and are about as good, and
    an epoch has fewer updates, which a higher learning rate makes up for: 32 x 16 at 1e-6 becomes 256 x 2 at 8e-6.

    Args:
        prompts: Prompts of an update.
        num_generations: G, completions of each.
        lr: Learning rate.
        to: The new group size.
        rule: From the ratio of new to old prompts to that of learning rates: `linear` or `square_root`.

    Returns:
        The new settings.

    Raises:
        ValueError: If the rollouts do not divide into groups of the new size, or it is below 2.

    >>> match_compute(32, 16, 1e-6, to=2)
    Matched(prompts=256, num_generations=2, lr=8e-06)
    """
    if to < 2:
        raise ValueError(f"to={to}: a group of one has nothing to compare with; use 2 or more")
    rollouts = prompts * num_generations
    if rollouts % to:
        raise ValueError(
            f"{prompts} prompts x {num_generations} are {rollouts} rollouts, which groups of {to} do not fill"
        )
    ratio = rollouts // to / prompts
    return Matched(rollouts // to, to, lr * rule(ratio))
