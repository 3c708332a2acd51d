"""Scores by which weights are chosen. Torch alone.

Each takes, for one weight, the adapted weight W + dW, the learned change dW, and the gradient g of the loss
of one batch with respect to it, all of one shape, and returns a score for each element. The highest win.
g is that of the whole optimiser step, over its micro-batches and ranks; scores of several steps are added up. SNIP
and RigL score so too. Scores marked by `of_examples` get the gradient of one row at a time.
Write your own with these three arguments and name it by its import path.
"""

# ruff: noqa: ARG001  every score takes all three arguments

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def signed_sensitivity(weight: Tensor, delta: Tensor, gradient: Tensor) -> Tensor:
    """Product dW * g with its sign: connection sensitivity as in the code of arXiv 2507.07140 (eq. 2).

    It keeps the entries whose shrinking would lower the loss at first order; SNIP's criterion has an absolute
    value here. Zero as long as nothing was learned, so it needs a dense phase.
    """
    return delta * gradient


def sensitivity(weight: Tensor, delta: Tensor, gradient: Tensor) -> Tensor:
    """|dW * g|: how much the loss changes at first order when a learned change is taken back."""
    return (delta * gradient).abs()


def snip(weight: Tensor, delta: Tensor, gradient: Tensor) -> Tensor:
    """|(W + dW) * g|: SNIP (arXiv 1810.02340, eq. 4) with the base weight."""
    return (weight * gradient).abs()


def weight_magnitude(weight: Tensor, delta: Tensor, gradient: Tensor) -> Tensor:
    """|W + dW|. Needs no gradient."""
    return weight.abs()


def delta_magnitude(weight: Tensor, delta: Tensor, gradient: Tensor) -> Tensor:
    """|dW|, called weight magnitude in the code of arXiv 2507.07140. Needs a dense phase."""
    return delta.abs()


def gradient_magnitude(weight: Tensor, delta: Tensor, gradient: Tensor) -> Tensor:
    """|g|, by which RigL (arXiv 1911.11134) and SpIEL (arXiv 2401.16405) grow."""
    return gradient.abs()


def of_examples(score: Score) -> Score:
    """Mark a score that must see the gradient of each example by itself; what it returns is added up over them.

    A score that is not linear in the gradient needs this where it means examples: the mean of squares is not the
    square of the mean. `SparseAdapter` then wants one row in each forward pass while it observes, and modules of ours
    give it that.
    """
    score.per_example = True  # type: ignore[attr-defined]
    return score


@of_examples
def fisher(weight: Tensor, delta: Tensor, gradient: Tensor) -> Tensor:
    """g^2 of each example: the diagonal of the empirical Fisher information, as FISH Mask (arXiv 2111.09839, eq. 3).

    An example is a row: a prompt with its answer, or with one completion and its advantage. Its gradient is that of its
    share of the step's loss, so that scores have another scale than the paper's, and the same order.
    """
    return gradient.square()


def random(weight: Tensor, delta: Tensor, gradient: Tensor) -> Tensor:
    """Uniform random numbers: the baseline. Needs no gradient.

    `SparseAdapter` seeds them by weight and by expert, so that experts of one configuration differ in what they train.
    """
    return torch.rand(weight.shape, device=weight.device)
