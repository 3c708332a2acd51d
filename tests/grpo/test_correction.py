"""Importance weights against the sampler: slow twins, bounds, growth with the length, masked garbage."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.grpo.correction import masked_importance, off_policy_rows, truncated_importance

LEVELS = ["token", "sequence", "geometric"]
WEIGHTS = {
    "truncated": functools.partial(truncated_importance, cap=1.3),
    "masked": functools.partial(masked_importance, bounds=(0.8, 1.3)),
}
some = settings(max_examples=30, deadline=None)


def rows(seed=0, B=4, T=5):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=generator, dtype=torch.float64) * 3
    sampler = old + 0.4 * torch.randn(B, T, generator=generator, dtype=torch.float64)
    mask = torch.rand(B, T, generator=generator) < 0.7
    mask[-1] = False
    return old, sampler, mask


def slow(old, sampler, mask, level, bound):
    weights = torch.zeros_like(old)
    for i, t in mask.nonzero().tolist():
        deltas = [(old[i, u] - sampler[i, u]).item() for u in range(mask.shape[1]) if mask[i, u]]
        exponent = {
            "token": (old[i, t] - sampler[i, t]).item(),
            "sequence": sum(deltas),
            "geometric": sum(deltas) / len(deltas),
        }[level]
        weights[i, t] = bound(math.exp(exponent))
    return weights


BOUNDS = {"truncated": lambda w: min(w, 1.3), "masked": lambda w: w if 0.8 <= w <= 1.3 else 0.0}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", WEIGHTS)
@given(seed=st.integers(0, 10**6))
@some
def test_equals_a_slow_loop(name, level, seed):
    old, sampler, mask = rows(seed)
    ours = WEIGHTS[name](old, sampler, mask, level=level)
    torch.testing.assert_close(ours, slow(old, sampler, mask, level, BOUNDS[name]))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_one_where_both_agree_and_never_a_gradient(name, level):
    old, _, mask = rows()
    old.requires_grad_()
    weights = WEIGHTS[name](old, old, mask.int(), level=level)
    assert torch.equal(weights, mask.double())
    assert not weights.requires_grad


def test_only_the_sum_grows_with_the_length():
    """The reference's figures: 0.012 nats a token over 100 tokens are a weight of 3.3."""
    old, sampler, mask = torch.full((1, 100), -1.0), torch.full((1, 100), -1.012), torch.ones(1, 100)
    weights = {level: masked_importance(old, sampler, mask, level=level)[0, 0].item() for level in LEVELS}
    assert weights["sequence"] == pytest.approx(math.exp(1.2), rel=1e-3)
    assert weights["token"] == pytest.approx(math.exp(0.012), rel=1e-3)
    assert weights["geometric"] == pytest.approx(math.exp(0.012), rel=1e-3)
    assert masked_importance(old, sampler, mask, bounds=(0.0, 3.0), level="sequence").eq(0).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan, 1e30])
def test_garbage_at_masked_positions_goes_nowhere(name, level, garbage):
    old, sampler, mask = rows()
    clean = WEIGHTS[name](old, sampler, mask, level=level)
    bad_old, bad_sampler = old.masked_fill(~mask, garbage), sampler.masked_fill(~mask, garbage)
    assert torch.equal(WEIGHTS[name](bad_old, bad_sampler, mask, level=level), clean)
    assert torch.equal(WEIGHTS[name](old, bad_sampler, mask, level=level), clean)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_nan_at_a_token_that_counts_shows(name, level):
    old, sampler, mask = torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 2)
    sampler[0, 1] = math.nan
    weights = WEIGHTS[name](old, sampler, mask, level=level)
    assert weights[0, 1].isnan()
    assert weights[1].eq(1).all()


def test_extreme_differences_stay_finite():
    old, sampler = torch.tensor([[0.0, -900.0]]), torch.tensor([[-900.0, 0.0]])
    for level in LEVELS:
        huge = truncated_importance(old, sampler, torch.ones(1, 2), cap=math.inf, level=level)
        assert huge.isfinite().all()


@given(seed=st.integers(0, 10**6), threshold=st.sampled_from([0.01, 0.1, 0.3]))
@some
def test_off_policy_rows_equal_a_slow_loop(seed, threshold):
    new, sampler, mask = rows(seed)
    advantages = torch.randn(4, generator=torch.Generator().manual_seed(seed)).double()
    expected = []
    for i in range(4):
        gaps = [(sampler[i, t] - new[i, t]).item() for t in range(5) if mask[i, t]]
        expected.append(bool(advantages[i] < 0 and gaps and sum(gaps) / len(gaps) > threshold))
    new.requires_grad_()
    ours = off_policy_rows(new, sampler, advantages, mask, threshold=threshold)
    assert ours.tolist() == expected
    bad = sampler.masked_fill(~mask, math.nan)
    assert torch.equal(off_policy_rows(new, bad, advantages, mask, threshold=threshold), ours)


def test_off_policy_rows_need_more_than_the_threshold_and_a_bad_completion():
    new, mask = torch.zeros(4, 2), torch.ones(4, 2)
    sampler = torch.tensor([[0.25, 0.75], [0.25, 0.76], [0.25, 0.76], [0.25, 0.76]])
    advantages = torch.tensor([-1.0, -1.0, 0.0, 1.0])
    dropped = off_policy_rows(new, sampler, advantages, mask, threshold=0.5)
    assert dropped.tolist() == [False, True, False, False]


def test_errors_name_argument_value_and_remedy():
    old, sampler, mask = rows()
    for cap in (0.5, math.nan):
        with pytest.raises(ValueError, match=f"cap={cap} must be at least 1"):
            truncated_importance(old, sampler, mask, cap=cap)
    for bounds in ((1.1, 2.0), (0.5, 0.9), (-1.0, 2.0), (math.nan, 2.0)):
        with pytest.raises(ValueError, match="must enclose 1"):
            masked_importance(old, sampler, mask, bounds=bounds)
    for weights in WEIGHTS.values():
        with pytest.raises(ValueError, match="level='row' is unknown: use token, sequence or geometric"):
            weights(old, sampler, mask, level="row")
        with pytest.raises(
            ValueError, match=r"must share one shape \(B, T\); got \(4, 5\), \(1, 5\), \(4, 5\)"
        ):
            weights(old, sampler[:1], mask)
    for threshold in (0.0, math.nan):
        with pytest.raises(ValueError, match=f"threshold={threshold} must be positive"):
            off_policy_rows(old, sampler, torch.ones(4), mask, threshold=threshold)
    with pytest.raises(ValueError, match=r"advantages_B has the shape \(4, 1\): expected \(4,\)"):
        off_policy_rows(old, sampler, torch.ones(4, 1), mask, threshold=0.5)
