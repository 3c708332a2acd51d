"""Intervals that say how far a score can be trusted.

The unit is the prompt: completions of one prompt are not independent, so average them first and hand in one
value per prompt. Standard library only; quantiles of Student's t come from its closed form (below).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean and its two-sided confidence interval, in units of the values."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean over prompts, with its confidence interval.

    - Every value 0 or 1: Wilson's score interval (Wilson 1927), which stays inside [0, 1] and keeps its width
      when all answers are right or all are wrong.
    - Otherwise: Student's t interval of the mean, not cut off at 0 or 1.
    - Otherwise, where the t interval has no width (one value, or all equal): Wilson's at this mean if it is
      in [0, 1], since a coin has the largest spread of all such values; else unbounded, because nothing is
      known about the spread.

    Args:
        values: One value per prompt, e.g. the share of its completions that are correct.
        confidence: Between 0 and 1.

    Returns:
        Mean, lower and upper end.

    Raises:
        ValueError: For no values, a value that is not finite, or a confidence outside (0, 1).

    >>> [round(end, 3) for end in mean_interval([1.0, 1.0, 1.0, 0.0])]
    [0.75, 0.301, 0.954]
    """
    _check(values, confidence)
    mean = fmean(values)
    if not _binary(values) and not _equal(values):
        return _t_interval(values, confidence)
    if not 0.0 <= mean <= 1.0:
        return Interval(mean, -math.inf, math.inf)
    return Interval(mean, *_wilson(mean, len(values), confidence))


def paired_gain(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean gain per prompt from one model to another on the same prompts, with its confidence interval.

    - Every value 0 or 1: Newcombe's square-and-add interval for paired proportions (Newcombe 1998,
      "Improved confidence intervals for the difference between binomial proportions based on paired data",
      method 10). It keeps its width when no answer changed.
    - Otherwise: Student's t interval of the mean difference.
    - Otherwise, where that has no width (one prompt, or one gain everywhere): the t interval after adding two
      made-up prompts, one that gains and one that loses the largest amount in sight (at least 1), widened to
      contain the observed gain.

    Args:
        before: One value per prompt.
        after: One value per prompt, same order.
        confidence: Between 0 and 1.

    Returns:
        Mean of after - before, lower and upper end.

    Raises:
        ValueError: For different lengths, no values, a value that is not finite, or a confidence outside
            (0, 1).

    >>> paired_gain([0.0, 0.25, 0.5], [0.5, 0.5, 0.5]).mean
    0.25
    """
    if len(before) != len(after):
        raise ValueError(
            f"before has {len(before)} values and after {len(after)}: a paired gain needs the same prompts"
        )
    _check(before, confidence)
    _check(after, confidence)
    gains = [new - old for old, new in zip(before, after, strict=True)]
    if _binary(before) and _binary(after):
        return _newcombe(before, after, confidence)
    if not _equal(gains):
        return _t_interval(gains, confidence)
    bound = max(1.0, max(map(abs, gains)))
    _, low, high = _t_interval([*gains, bound, -bound], confidence)
    return Interval(gains[0], min(low, gains[0]), max(high, gains[0]))


def _t_interval(values: Sequence[float], confidence: float) -> Interval:
    mean = fmean(values)
    half = _t_quantile(confidence, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def _wilson(share: float, count: int, confidence: float) -> tuple[float, float]:
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = share + z2 / (2 * count)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * count)) / count)
    low, high = ((centre + sign * half) / (1 + z2 / count) for sign in (-1, 1))
    # Rounding must not push an end past the mean it belongs to.
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def _newcombe(before: Sequence[float], after: Sequence[float], confidence: float) -> Interval:
    n = len(before)
    pairs = list(zip(before, after, strict=True))
    both, lost, won, neither = (pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))
    old, new = (both + lost) / n, (both + won) / n
    old_low, old_high = _wilson(old, n, confidence)
    new_low, new_high = _wilson(new, n, confidence)
    margins = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    covariance = float(both * neither - lost * won)
    if covariance > 0:
        # Newcombe's continuity correction of a positive correlation.
        covariance = max(covariance - n / 2, 0.0)
    phi = covariance / math.sqrt(margins) if margins else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    gain = new - old
    low = gain - distance(new - new_low, old_high - old)
    return Interval(gain, low, gain + distance(new_high - new, old - old_low))


def _t_quantile(confidence: float, degrees: int) -> float:
    """Half-width of the central `confidence` of Student's t, by bisection of its closed form.

    Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4: a finite sum for whole
    degrees of freedom. Beyond 1000 degrees the normal quantile is within 0.2 % and takes its place.
    """
    if degrees > 1000:
        return NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        cosine, odd, total = math.cos(angle), degrees % 2, 0.0
        term = cosine if odd else 1.0
        for power in range(odd, degrees - 1, 2):
            total += term
            term *= cosine * cosine * (power + 1) / (power + 2)
        inside = math.sin(angle) * total
        if odd:
            inside = 2 / math.pi * (angle + inside)
        low, high = (angle, high) if inside < confidence else (low, angle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _check(values: Sequence[float], confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1; 0.95 is usual")
    if not values:
        raise ValueError("values is empty: an interval needs at least one prompt")
    bad = [row for row, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"values[{bad[0]}]={values[bad[0]]} is not finite: leave out prompts to which no reward applies"
        )


def _binary(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def _equal(values: Sequence[float]) -> bool:
    # Not the standard deviation: rounding can leave equal values with a tiny one.
    return max(values) - min(values) <= 1e-12
