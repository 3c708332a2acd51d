"""The ratio in `kl_estimate`: closed forms, unbiasedness off-policy, masked garbage."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.grpo import kl, losses
from lightning_modules.grpo.kl import MAX_LOG_RATIO, kl_estimate
from lightning_modules.grpo.losses import aggregate

some = settings(max_examples=30, deadline=None)


def three(seed, B=3, T=4):
    generator = torch.Generator().manual_seed(seed)
    new, ref, old = -torch.rand(3, B, T, generator=generator, dtype=torch.float64) * 3
    return new.clone().requires_grad_(), ref, old


def gradient(loss, new):
    return torch.autograd.grad(loss.sum(), new, retain_graph=True)[0]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@given(seed=st.integers(0, 10**6))
@some
def test_value_is_the_estimate_times_the_ratio(kind, seed):
    new, ref, old = three(seed)
    ours = kl_estimate(new, ref, kind, old_logprobs_BT=old)
    torch.testing.assert_close(ours, kl_estimate(new, ref, kind) * (new - old).exp())
    on_policy = kl_estimate(new, ref, kind, old_logprobs_BT=new.detach())
    assert torch.equal(on_policy, kl_estimate(new, ref, kind))


@given(seed=st.integers(0, 10**6))
@some
def test_gradient_of_corrected_k3_is_that_of_k2_at_ratio_one(seed):
    new, ref, _ = three(seed)
    ours = gradient(kl_estimate(new, ref, "k3", old_logprobs_BT=new.detach()), new)
    torch.testing.assert_close(ours, (new - ref).detach())
    torch.testing.assert_close(ours, gradient(kl_estimate(new, ref, "k2"), new))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_value_and_gradient_are_unbiased_on_tokens_of_another_policy(kind):
    """Exact expectation over a vocabulary of three, tokens sampled from `old`."""
    logits = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64, requires_grad=True)
    policy = logits.log_softmax(0)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    old = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64).log()
    kl_value = (policy.exp() * (policy - reference)).sum()
    estimate = kl_estimate(policy[None], reference[None], kind, old_logprobs_BT=old[None])[0]
    expected = (old.exp() * estimate).sum()
    torch.testing.assert_close(expected, kl_value)
    torch.testing.assert_close(gradient(expected, logits), gradient(kl_value, logits))
    # Without the ratio, even the value is that of another divergence.
    assert abs((old.exp() * kl_estimate(policy[None], reference[None], kind)[0]).sum() - kl_value) > 0.01


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("victims", ["new", "ref", "old", "new ref", "ref old", "new ref old"])
def test_garbage_at_masked_positions_goes_nowhere(kind, garbage, victims):
    tensors = dict(zip(("new", "ref", "old"), three(0), strict=True))
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])

    def total_and_gradient(new, ref, old):
        new = new.detach().clone().requires_grad_()
        kl_BT = kl_estimate(new, ref, kind, old_logprobs_BT=old)
        total = aggregate(kl_BT, mask, over="tokens", denominator=4)
        return total, gradient(total, new)

    bad = {
        name: x.detach().masked_fill(mask == 0, garbage) if name in victims.split() else x
        for name, x in tensors.items()
    }
    for ours, clean in zip(total_and_gradient(**bad), total_and_gradient(**tensors), strict=True):
        assert torch.equal(ours, clean)


def test_nan_at_a_token_that_counts_shows():
    nan = torch.full((1, 1), math.nan)
    zero = torch.zeros(1, 1)
    for tensors in ((nan, zero, zero), (zero, nan, zero), (zero, zero, nan)):
        assert kl_estimate(tensors[0], tensors[1], old_logprobs_BT=tensors[2]).isnan().all()


def test_extreme_differences_stay_finite():
    new = torch.tensor([[300.0, -300.0]], requires_grad=True)
    ours = kl_estimate(new, torch.zeros(1, 2), old_logprobs_BT=torch.zeros(1, 2))
    # d is -20 and 20, the ratio e^20 and e^-20.
    k3 = [math.expm1(-20) + 20, math.expm1(20) - 20]
    exact = torch.tensor([[k3[0] * math.exp(20), k3[1] * math.exp(-20)]])
    torch.testing.assert_close(ours.detach(), exact)
    assert gradient(ours, new).eq(0).all()


def test_the_contract_place_has_the_same_objects():
    assert losses.kl_estimate is kl.kl_estimate
    assert losses.MAX_LOG_RATIO == MAX_LOG_RATIO == 20
    with pytest.raises(ValueError, match="kind='k4' is unknown: use k1, k2 or k3"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4", old_logprobs_BT=torch.zeros(1, 1))
