"""How good the policy gradient is at each group size, and why: the contrast of good and bad completions.

"It Takes Two: Your GRPO Is Secretly DPO" (arXiv 2510.00977) claims that the variance of the gradient depends on the
number of rollouts, not on the group size, and that failed completions are a control variate of successful ones. Here
both are measured, from the gradients of C completions for each of Q prompts, drawn from one policy.

Shapes: Q prompts, C completions of each, N = Q x C, d entries of a gradient or of its sketch, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.grpo.advantages import Scale, dead_groups, group_advantages

_CONFIDENCE = 0.95
_CHUNK = 1 << 16  # entries of each gradient that are taken to float64 at a time


class Estimate(NamedTuple):
    """A value with the ends of its 95 % interval; NaN where there is none, infinite where nothing bounds it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class GroupSizeStatistics:
    """The policy-gradient estimate made of groups of one size. Intervals are bootstrapped over prompts.

    Attributes:
        group_size: G.
        variance: Trace of the covariance of the estimate from B rollouts, each group that of another prompt.
        squared_norm: Of its expectation. Estimated without bias, so it can be negative: then the pool is too small to
            tell the gradient from noise.
        signal_to_noise: `squared_norm` / `variance`.
        relative_variance: Its inverse. NaN where `squared_norm` is not positive. Its upper end is infinite where the
            interval of `squared_norm` reaches 0.
        dead: Share of the groups without any advantage.
        cosine: Between the estimates from the whole pool of this and of the largest size. They share their
            completions, so it says how differently two sizes use the same rollouts.
    """

    group_size: int
    variance: Estimate
    squared_norm: Estimate
    signal_to_noise: Estimate
    relative_variance: Estimate
    dead: Estimate
    cosine: Estimate


@dataclass(frozen=True)
class ContrastCovariance:
    """How the mean gradients of successful and failed completions vary together over prompts.

    Attributes:
        prompts: How many have both outcomes. All other numbers are NaN below 2.
        covariance: Trace of the covariance of g+ and g-.
        permuted: The same for g- of another prompt, chosen at random: its mean, which is 0 but for chance, and the
            range of 95 % of the permutations.
        p_value: Share of permutations whose covariance is at least that of the true pairs.
        correlation: rho, the covariance divided by both standard deviations.
        coefficient: c at which g+ - c g- has the least variance. The paper's theorem covers 0 to 2 c.
        remaining: Variance of g+ - c g- at that c, divided by that of g+: 1 - rho^2.
    """

    prompts: int
    covariance: float
    permuted: Estimate
    p_value: float
    correlation: float
    coefficient: float
    remaining: float


def sketch(gradients: Iterable[Tensor], dim: int | None, *, seed: int = 0) -> Tensor:
    """Compress a gradient so that inner products stay what they are, on average over seeds.

    A count sketch (Charikar, Chen, Farach-Colton 2002, "Finding frequent items in data streams"): each entry is added
    to a random one of `dim` sums with a random sign. An inner product of two sketches has the standard deviation
    sqrt((|x|^2 |y|^2 + <x, y>^2) / dim) or less. Sketches compare if seed, shapes and kind of device are the same.

    Args:
        gradients: Of each parameter, any shape.
        dim: Length of the sketch; None keeps all entries, in order.
        seed: Of the random numbers, drawn again at each call: keeping them would take as much as a gradient.

    Returns:
        float32 (dim), or (entries).

    >>> sketch([torch.ones(2), torch.zeros(1, 2)], None)
    tensor([1., 1., 0., 0.])
    """
    if dim is None:
        return torch.cat([gradient.flatten().float() for gradient in gradients])
    sums: Tensor | None = None
    for gradient in gradients:
        if sums is None:
            sums = torch.zeros(dim, device=gradient.device)
            generator = torch.Generator(gradient.device).manual_seed(seed)
        draws = torch.randint(2 * dim, (gradient.numel(),), generator=generator, device=gradient.device)
        signs = 1 - 2 * (draws & 1)
        sums.index_add_(0, draws >> 1, gradient.flatten().float() * signs)
    return torch.zeros(dim) if sums is None else sums


def group_size_statistics(
    gradients_QCd: Tensor,
    rewards_QC: Tensor,
    sizes: Sequence[int] = (2, 4, 8, 16),
    scale: Scale = "population",
    *,
    rollouts: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> list[GroupSizeStatistics]:
    """Compare group sizes at an equal number of rollouts.

    For each G the completions of a prompt are split into C / G disjoint groups of neighbours. A group's estimate is
    h = (1/G) sum_i A_i g_i. With B rollouts there are B / G groups of as many prompts, whose mean has the variance
    (G / B) tr Cov(h). That counts both what completions and what prompts add, as prompts are drawn anew in each step.
    Both tr Cov(h) and |E h|^2 are unbiased means over pairs of different prompts.

    The expected gradient has another scale at each G: with binary rewards of probability p it goes with r - p at G=2,
    and with (r - p) / sqrt(p (1 - p)) as G grows. So compare `relative_variance`, which no learning rate changes.

    Args:
        gradients_QCd: Gradient of each completion's mean log-probability, or its sketch.
        rewards_QC: NaN where none applies; such a completion has no advantage.
        sizes: Each at least 2 and a divisor of C.
        scale: As in `group_advantages`. `batch` takes the whole pool as one batch.
        rollouts: B, of one update; None takes the pool's N.
        resamples: Bootstrap samples of prompts. With few prompts their intervals are rather too narrow.
        seed: Of the bootstrap.

    Returns:
        One entry for each size, in order. With one prompt there is no covariance: NaN.

    Raises:
        ValueError: If shapes do not fit, or a size does not divide C.
    """
    _check_shapes(gradients_QCd, rewards_QC, "rewards_QC")
    Q, C = rewards_QC.shape
    if bad := [size for size in sizes if size < 2 or C % size]:
        raise ValueError(
            f"sizes: {bad[0]} does not divide the {C} completions of a prompt into groups of 2 or more. Leave it out, "
            "or draw a multiple of it."
        )
    gram_QCQC = _gram(gradients_QCd)
    own_QCC = gram_QCQC.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    rewards_N = rewards_QC.flatten().cpu()
    advantages = {size: group_advantages(rewards_N, size, scale=scale).double().view(Q, C) for size in sizes}
    counts_RQ = _bootstrap_counts(Q, resamples, seed)

    def products(one: int, other: int) -> Tensor:
        """Inner products of the prompts' mean estimates (Q, Q)."""
        return torch.einsum("qi,qirj,rj->qr", advantages[one], gram_QCQC, advantages[other]) / C**2

    def total(products_QQ: Tensor) -> Tensor:
        return torch.einsum("rq,qs,rs->r", counts_RQ, products_QQ, counts_RQ)

    def over_pairs(values_QQ: Tensor) -> Tensor:
        """Mean over pairs of different prompts; a prompt that was resampled twice is no pair (R)."""
        squares_RQ = counts_RQ.square()
        return (total(values_QQ) - squares_RQ @ values_QQ.diagonal()) / (Q**2 - squares_RQ.sum(1))

    largest, results = max(sizes), []
    for size in sizes:
        A_QC = advantages[size]
        group_C = torch.arange(C) // size
        weighted_QCC = A_QC[:, :, None] * own_QCC * A_QC[:, None, :]
        squares_Q = (weighted_QCC * (group_C[:, None] == group_C)).sum((1, 2)) / (size * C)
        products_QQ = products(size, size)
        half_distances_QQ = (squares_Q[:, None] + squares_Q) / 2 - products_QQ
        # Never negative but for rounding.
        variance_R = over_pairs(half_distances_QQ).clamp(min=0) * size / (rollouts or Q * C)
        squared_norm_R = over_pairs(products_QQ)
        lengths_R = (total(products_QQ) * total(products(largest, largest))).sqrt()
        dead_Q = dead_groups(rewards_N, size).view(Q, -1).double().mean(1)
        signal = _estimate(squared_norm_R / variance_R)
        results.append(
            GroupSizeStatistics(
                group_size=size,
                variance=_estimate(variance_R),
                squared_norm=_estimate(squared_norm_R),
                signal_to_noise=signal,
                relative_variance=_inverse(signal),
                dead=_estimate(counts_RQ @ dead_Q / Q),
                cosine=_estimate(total(products(size, largest)) / lengths_R),
            )
        )
    return results


def contrast_covariance(
    gradients_QCd: Tensor, success_QC: Tensor, *, permutations: int = 1000, seed: int = 0
) -> ContrastCovariance:
    """Measure whether failed completions are a control variate of successful ones (paper, section 4 and appendix B.8).

    For each prompt with both outcomes, g+ is the mean gradient of its successful completions and g- that of its failed
    ones. Their covariance over prompts, the mean inner product of centred vectors, is compared with that of pairs
    from different prompts. Completions are independent given their prompt, so a covariance is due to the prompt alone.

    Deviations from the paper: n - 1 in the denominator, which makes the covariance unbiased; many permutations instead
    of one. `correlation` and `remaining` are those of means over the completions at hand: the more of them, the less
    noise and the larger the correlation.

    Args:
        gradients_QCd: As in `group_size_statistics`.
        success_QC: 1, 0, or NaN where unknown.
        permutations: Random pairings.
        seed: Of the pairings.

    Returns:
        NaN in all numbers but `prompts` if fewer than 2 prompts have both outcomes.

    Raises:
        ValueError: If shapes do not fit.
    """
    _check_shapes(gradients_QCd, success_QC, "success_QC")
    positive_QC, negative_QC = (success_QC == 1).double().cpu(), (success_QC == 0).double().cpu()
    mixed_Q = positive_QC.any(1) & negative_QC.any(1)
    n, nan = int(mixed_Q.sum()), math.nan
    if n < 2:
        return ContrastCovariance(n, nan, Estimate(nan, nan, nan), nan, nan, nan, nan)
    gram_nCnC = _gram(gradients_QCd[mixed_Q.to(gradients_QCd.device)])
    plus_nC = positive_QC[mixed_Q] / positive_QC[mixed_Q].sum(1, keepdim=True)
    minus_nC = negative_QC[mixed_Q] / negative_QC[mixed_Q].sum(1, keepdim=True)

    def centred_products(one_nC: Tensor, other_nC: Tensor) -> Tensor:
        products_nn = torch.einsum("qi,qirj,rj->qr", one_nC, gram_nCnC, other_nC)
        products_nn = products_nn - products_nn.mean(0)
        return (products_nn - products_nn.mean(1, keepdim=True)) / (n - 1)

    products_nn = centred_products(plus_nC, minus_nC)
    covariance = products_nn.trace()
    of_plus = centred_products(plus_nC, plus_nC).trace()
    of_minus = centred_products(minus_nC, minus_nC).trace()
    generator = torch.Generator().manual_seed(seed)
    partners_Pn = torch.rand(permutations, n, generator=generator).argsort(1)
    permuted_P = products_nn[torch.arange(n), partners_Pn].sum(1)
    correlation = covariance / (of_plus * of_minus).sqrt()
    # Adding up in another order must not let the true pairing pass for a smaller one.
    reached = (permuted_P >= covariance - 1e-9 * (of_plus * of_minus).sqrt()).sum()
    return ContrastCovariance(
        prompts=n,
        covariance=float(covariance),
        permuted=_estimate(torch.cat([permuted_P.mean()[None], permuted_P])),
        p_value=float((1 + reached) / (1 + permutations)),
        correlation=float(correlation),
        coefficient=float(covariance / of_minus),
        remaining=float(1 - correlation.square()),
    )


def _check_shapes(gradients_QCd: Tensor, values_QC: Tensor, name: str) -> None:
    if gradients_QCd.ndim != 3 or gradients_QCd.shape[:2] != values_QC.shape:
        raise ValueError(
            f"gradients_QCd has the shape {tuple(gradients_QCd.shape)} and {name} {tuple(values_QC.shape)}: expected "
            "(Q, C, d) and (Q, C), a gradient and a value for each completion of each prompt."
        )


def _gram(gradients_QCd: Tensor) -> Tensor:
    """Inner products of all completions, float64 (Q, C, Q, C): all that any statistic here needs."""
    Q, C, _ = gradients_QCd.shape
    gram_NN = torch.zeros(Q * C, Q * C, dtype=torch.float64)
    for chunk in gradients_QCd.flatten(0, 1).split(_CHUNK, dim=1):
        exact = chunk.cpu().double()
        gram_NN += exact @ exact.T
    return gram_NN.view(Q, C, Q, C)


def _bootstrap_counts(Q: int, resamples: int, seed: int) -> Tensor:
    """How often each sample has each prompt, float64 (1 + resamples, Q); the first has each once."""
    drawn = torch.randint(Q, (resamples, Q), generator=torch.Generator().manual_seed(seed))
    counts = [torch.ones(1, Q), *(row.bincount(minlength=Q)[None] for row in drawn)]
    return torch.cat(counts).double()


def _estimate(values_R: Tensor) -> Estimate:
    """The first value, with the middle 95 % of the others."""
    ends = values_R.new_tensor([(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Estimate(float(values_R[0]), *values_R[1:].nanquantile(ends).tolist())


def _inverse(estimate: Estimate) -> Estimate:
    """1 / estimate, whose interval is open above where the estimate's own reaches 0."""
    if math.isnan(estimate.value):
        return estimate
    value, low, high = (1 / number if number > 0 else math.inf for number in estimate)
    return Estimate(value if math.isfinite(value) else math.nan, high, low)
