"""CISPO, SAPO and GMPO: slow twins, closed forms, and what holds of every policy loss."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.grpo.losses import aggregate, cispo, clipped_surrogate, gmpo, sapo

GARBAGE = [math.inf, -math.inf, math.nan, 1e30]
LOSSES = {
    "token": clipped_surrogate,
    "dual": functools.partial(clipped_surrogate, ceiling=3.0),
    "sequence": functools.partial(clipped_surrogate, level="sequence"),
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
}
seeds = given(seed=st.integers(0, 10**6))
some = settings(max_examples=20, deadline=None)


def rows(seed=0, B=5, T=7, spread=0.5):
    """Random log-probabilities and advantages; masks with gaps, one row of them empty."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=generator, dtype=torch.float64) * 3
    new = old + spread * torch.randn(B, T, generator=generator, dtype=torch.float64)
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)
    mask = torch.rand(B, T, generator=generator) < 0.7
    mask[0], mask[-1] = True, False
    return new.requires_grad_(), old, advantages, mask


def gradient(loss, new):
    return torch.autograd.grad(loss.sum(), new)[0]


@seeds
@some
def test_cispo_equals_a_slow_loop_in_value_and_gradient(seed):
    new, old, advantages, mask = rows(seed)
    loss = cispo(new, old, advantages, mask, clip=(0.3, 0.5))
    value, slope = torch.zeros_like(old), torch.zeros_like(old)
    for i, t in mask.nonzero().tolist():
        ratio = math.exp(new[i, t].item() - old[i, t])
        slope[i, t] = -min(max(ratio, 0.7), 1.5) * advantages[i]
        value[i, t] = slope[i, t] * new[i, t].detach()
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(gradient(loss, new), slope)


def test_cispo_never_drops_a_token_and_bounds_by_five():
    new = torch.tensor([[0.0, -9.0, 3.0]], requires_grad=True)
    loss = cispo(new, torch.zeros(1, 3), torch.tensor([-2.0]), torch.ones(1, 3))
    torch.testing.assert_close(gradient(loss, new), torch.tensor([[2.0, 2 * math.exp(-9), 10.0]]))


@seeds
@some
def test_sapo_equals_a_slow_loop_in_value_and_gradient(seed):
    new, old, advantages, mask = rows(seed)
    loss = sapo(new, old, advantages, mask, temperature=(2.0, 3.0))
    value, slope = torch.zeros_like(old), torch.zeros_like(old)
    for i, t in mask.nonzero().tolist():
        ratio, tau = math.exp(new[i, t].item() - old[i, t]), 2.0 if advantages[i] > 0 else 3.0
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        value[i, t] = -advantages[i] * gate * 4 / tau
        # The paper's weight 4 p (1 - p) times the ratio.
        slope[i, t] = -advantages[i] * 4 * gate * (1 - gate) * ratio
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(gradient(loss, new), slope)


@seeds
@some
def test_gmpo_averaged_over_sequences_is_the_formula_of_the_paper(seed):
    """-(prod of clipped ratios)^(1/|o|) A per row, ratios clipped as PPO's minimum does, by the sign of A."""
    new, old, advantages, mask = rows(seed)
    total = aggregate(
        gmpo(new, old, advantages, mask, clip=(0.3, 0.4)), mask, over="sequences", denominator=5
    )
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        ratios = (new[i] - old[i]).exp()[mask[i]]
        bounded = ratios.clamp(math.exp(-0.3), math.exp(0.4))
        # |min(ratio A, bounded A)| / |A|: one bound only counts, by the sign of A.
        chosen = torch.minimum(ratios * advantages[i], bounded * advantages[i]) / advantages[i]
        expected = (
            expected - advantages[i] * chosen.prod() ** (1 / len(ratios)) / 5 if len(ratios) else expected
        )
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradient(total, new), gradient(expected, new))


def test_gmpo_is_the_same_at_every_token_of_a_row():
    new, old, advantages, mask = rows(1)
    for row, counted in zip(gmpo(new, old, advantages, mask), mask, strict=True):
        assert row[counted].unique().numel() <= 1


@pytest.mark.parametrize("name", LOSSES)
@seeds
@some
def test_ratio_one_gives_the_plain_policy_gradient(name, seed):
    new, _, advantages, mask = rows(seed)
    loss = LOSSES[name](new, new.detach(), advantages, mask)
    plain = torch.where(mask, -advantages[:, None], 0.0)
    torch.testing.assert_close(gradient(loss, new), plain)


@pytest.mark.parametrize("name", LOSSES)
@given(
    seed=st.integers(0, 10**6),
    garbage=st.sampled_from(GARBAGE),
    victim=st.sampled_from(["new", "old", "both"]),
)
@some
def test_garbage_at_masked_positions_goes_nowhere(name, seed, garbage, victim):
    new, old, advantages, mask = rows(seed)
    clean = LOSSES[name](new, old, advantages, mask)
    bad = new.detach().masked_fill(~mask, garbage) if victim in ("new", "both") else new.detach().clone()
    bad_old = old.masked_fill(~mask, garbage) if victim in ("old", "both") else old
    bad.requires_grad_()
    loss = LOSSES[name](bad, bad_old, advantages, mask)
    assert torch.equal(loss, clean)
    assert (loss[~mask] == 0).all()
    assert torch.equal(gradient(loss, bad), gradient(clean, new))


@pytest.mark.parametrize("name", ["cispo", "sapo", "gmpo"])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_extreme_ratios_stay_finite(name, advantage):
    new = torch.tensor([[0.0, -300.0, 300.0]], requires_grad=True)
    options = {} if name == "sapo" else {"clip": (9e9, 9e9)}
    loss = LOSSES[name](new, torch.zeros(1, 3), torch.tensor([advantage]), torch.ones(1, 3), **options)
    assert loss.isfinite().all()
    assert gradient(loss, new).isfinite().all()


@pytest.mark.parametrize("name", ["cispo", "sapo", "gmpo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_that_of_the_log_probabilities(name, dtype):
    new, old = torch.zeros(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    assert LOSSES[name](new, old, torch.ones(2, dtype=dtype), torch.ones(2, 3)).dtype == dtype


def test_errors_name_argument_value_and_remedy():
    new, old, advantages, mask = rows()
    for loss in (cispo, gmpo):
        for clip in ((-0.1, 0.2), (0.2, math.nan)):
            with pytest.raises(ValueError, match="must not be negative"):
                loss(new, old, advantages, mask, clip=clip)
    for temperature in ((0.0, 1.0), (1.0, -1.0), (1.0, math.nan), (math.nan, 1.0)):
        with pytest.raises(ValueError, match=r"must be positive: \(1.0, 1.05\) is the paper's"):
            sapo(new, old, advantages, mask, temperature=temperature)
    for loss in (cispo, sapo, gmpo):
        with pytest.raises(ValueError, match="must share one shape"):
            loss(new, old, advantages[:1], mask)
