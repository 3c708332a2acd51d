from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.grpo.losses import (
    MAX_LOG_RATIO,
    aggregate,
    clip_fractions,
    clipped_surrogate,
    kl_estimate,
)

GARBAGE = [math.inf, -math.inf, math.nan, 1e30]


def rows(seed=0, B=5, T=7, spread=0.4):
    """Random log-probabilities, advantages and ragged masks; one row is fully masked."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=generator, dtype=torch.float64) * 3
    new = old + spread * torch.randn(B, T, generator=generator, dtype=torch.float64)
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[-1] = 0
    mask = torch.arange(T) < lengths[:, None]
    mask[0, 0] = False  # tool output may come first
    return new.requires_grad_(), old, advantages, mask


def slow_surrogate(new, old, advantages, mask, clip, level, ceiling):
    """Equations of PPO, GSPO and the dual clip, token by token."""
    loss = torch.zeros_like(new)
    for i in range(new.shape[0]):
        counted = [t for t in range(new.shape[1]) if mask[i, t]]
        for t in counted:
            log_ratio = new[i, t] - old[i, t]
            if level == "sequence":
                log_ratio = sum(new[i, u] - old[i, u] for u in counted) / len(counted)
            ratio, A = math.exp(log_ratio), advantages[i]
            free = min(ratio, ceiling) if ceiling else ratio
            loss[i, t] = -min(free * A, min(max(ratio, 1 - clip[0]), 1 + clip[1]) * A)
    return loss


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("ceiling", [None, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.2, 0.28), (0.0, 0.0)])
def test_surrogate_equals_the_slow_loop(level, ceiling, clip):
    for seed in range(5):
        new, old, advantages, mask = rows(seed, spread=0.8)
        loss = clipped_surrogate(new, old, advantages, mask, clip=clip, level=level, ceiling=ceiling)
        expected = slow_surrogate(new.detach(), old, advantages, mask, clip, level, ceiling)
        torch.testing.assert_close(loss.detach(), expected)


def test_surrogate_equals_the_formulas_of_trl_and_verl():
    new, old, advantages, mask = rows(3, spread=1.0)
    A, ratio = advantages[:, None], (new - old).exp().detach()
    clipped = ratio.clamp(0.8, 1.28)
    trl = -torch.min(ratio.clamp(max=3.0) * A, clipped * A) * mask
    ours = clipped_surrogate(new, old, advantages, mask, clip=(0.2, 0.28), ceiling=3.0).detach()
    torch.testing.assert_close(ours, trl)
    # verl: bound the loss of bad tokens by -c A instead; the same function.
    plain = torch.max(-ratio * A, -clipped * A)
    verl = torch.where(A < 0, torch.min(plain, -3.0 * A), plain) * mask
    torch.testing.assert_close(ours, torch.where(A < 0, verl, ours))


def test_plain_policy_gradient_when_on_policy():
    new, _, advantages, mask = rows()
    for level in ("token", "sequence"):
        loss = clipped_surrogate(new, new.detach(), advantages, mask, level=level)
        assert torch.equal(loss.detach(), torch.where(mask, -advantages[:, None], 0.0))
        (gradient,) = torch.autograd.grad(loss.sum(), new)
        torch.testing.assert_close(gradient, torch.where(mask, -advantages[:, None], 0.0))


def test_sequence_gradient_is_that_of_gspo():
    """Autograd through GSPO's equation 5 as written: s = exp(mean log-ratio), one loss per row."""
    for seed in range(5):
        new, old, advantages, mask = rows(seed, spread=0.3)
        kept = mask.any(1)
        loss = clipped_surrogate(new, old, advantages, mask, clip=(0.1, 0.1), level="sequence")
        total = aggregate(loss, mask, over="sequences", denominator=len(new))
        (ours,) = torch.autograd.grad(total, new)
        again = new.detach().clone().requires_grad_()
        s = (((again - old) * mask).sum(1) / mask.sum(1).clamp(min=1)).exp()
        paper = -torch.min(s * advantages, s.clamp(0.9, 1.1) * advantages)
        (theirs,) = torch.autograd.grad(paper[kept].sum() / len(new), again)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(total, paper[kept].sum() / len(new))
        # Closed form of the unclipped rows: -s A / |o| at each token.
        free = kept & (s > 0.9) & (s < 1.1)
        closed = (-s * advantages / mask.sum(1).clamp(min=1))[:, None] * mask / len(new)
        torch.testing.assert_close(ours[free], closed[free].detach())


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("victim", ["new", "old", "both"])
def test_garbage_at_masked_positions_goes_nowhere(level, garbage, victim):
    new, old, advantages, mask = rows()

    def gradient(new, old, ref):
        new = new.detach().clone().requires_grad_()
        loss = clipped_surrogate(new, old, advantages, mask, level=level, ceiling=3.0)
        assert torch.equal(loss[~mask], torch.zeros_like(loss[~mask]))
        assert loss.isfinite().all()
        for kind in ("k1", "k2", "k3"):
            loss = loss + 0.1 * kl_estimate(new, ref, kind)
        totals = [
            aggregate(loss, mask, over=over, denominator=3) for over in ("tokens", "sequences", "constant")
        ]
        (result,) = torch.autograd.grad(sum(totals), new)
        fractions = clip_fractions(new, old, advantages, mask, level=level)
        return torch.stack(totals), result, *fractions

    clean = gradient(new, old, old - 0.3)
    bad_new = new.detach().masked_fill(~mask, garbage) if victim in ("new", "both") else new
    bad_old = old.masked_fill(~mask, garbage) if victim in ("old", "both") else old
    for ours, theirs in zip(gradient(bad_new, bad_old, bad_old - 0.3), clean, strict=True):
        assert torch.equal(ours, theirs)


def test_extreme_ratios_stay_finite_and_normal_ones_untouched():
    new = torch.tensor([[0.0, -300.0, 300.0, -0.1]], requires_grad=True)
    old = torch.tensor([[0.0, 0.0, 0.0, -0.4]])
    for advantage in (1.0, -1.0):
        loss = clipped_surrogate(new, old, torch.tensor([advantage]), torch.ones(1, 4), clip=(9e9, 9e9))
        exact = [1.0, math.exp(-MAX_LOG_RATIO), math.exp(MAX_LOG_RATIO)]
        torch.testing.assert_close(loss[0, :3].detach(), -advantage * torch.tensor(exact))
        assert loss[0, 3].item() == -advantage * (new - old).exp()[0, 3].item()
        (gradient,) = torch.autograd.grad(loss.sum(), new)
        assert gradient.isfinite().all()
        assert gradient[0, 1:3].eq(0).all()


def test_clip_fractions_are_where_the_gradient_vanishes():
    for level in ("token", "sequence"):
        for seed in range(5):
            new, old, advantages, mask = rows(seed, spread=0.8)
            low, high = clip_fractions(new, old, advantages, mask, clip=(0.1, 0.2), level=level)
            loss = clipped_surrogate(new, old, advantages, mask, clip=(0.1, 0.2), level=level)
            (gradient,) = torch.autograd.grad(loss.sum(), new)
            assert torch.equal(low | high, mask & (gradient == 0))
            assert not (low & (advantages[:, None] >= 0)).any()
            assert not (high & (advantages[:, None] <= 0)).any()
            assert not low.requires_grad


def test_kl_closed_forms_and_gradients():
    new = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[-1.5, -1.0, -0.5]], dtype=torch.float64)
    d = (ref - new).detach()
    values = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}
    gradients = {"k1": torch.ones_like(d), "k2": -d, "k3": 1 - d.exp()}
    for kind, expected in values.items():
        estimate = kl_estimate(new, ref, kind)
        torch.testing.assert_close(estimate.detach(), expected)
        (gradient,) = torch.autograd.grad(estimate.sum(), new)
        torch.testing.assert_close(gradient, gradients[kind])
    assert torch.equal(kl_estimate(new, ref), kl_estimate(new, ref, "k3"))


def test_k1_and_k3_are_unbiased():
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    kl = (policy * (policy / reference).log()).sum()
    for kind in ("k1", "k3"):
        estimate = kl_estimate(policy.log()[None], reference.log()[None], kind)[0]
        torch.testing.assert_close((policy * estimate).sum(), kl)


@given(
    seed=st.integers(0, 10**6),
    cut=st.integers(1, 4),
    over=st.sampled_from(["tokens", "sequences", "constant"]),
)
@settings(max_examples=40, deadline=None)
def test_aggregate_equals_a_loop_whatever_the_split_padding_and_order(seed, cut, over):
    new, old, advantages, mask = rows(seed)
    denominator = {"tokens": int(mask.sum()), "sequences": 5, "constant": 5 * 7}[over]

    def share(index, width):
        part = slice(None), slice(0, width)
        loss = clipped_surrogate(new[index][part], old[index][part], advantages[index], mask[index][part])
        return aggregate(loss, mask[index][part], over=over, denominator=max(denominator, 1))

    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    total = torch.zeros((), dtype=torch.float64)
    for index in (order[:cut], order[cut:]):
        total = total + share(index, max(1, int((mask[index] * torch.arange(1, 8)).max())))
    (split,) = torch.autograd.grad(total, new)

    expected = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        terms = [-advantages[i] * (new[i, t] - old[i, t]).exp() for t in range(7) if mask[i, t]]
        clipped = [
            -advantages[i] * (new[i, t] - old[i, t]).exp().clamp(0.8, 1.2) for t in range(7) if mask[i, t]
        ]
        terms = [torch.maximum(a, b) for a, b in zip(terms, clipped, strict=True)]
        if terms:
            expected = expected + sum(terms) / (len(terms) if over == "sequences" else 1)
    expected = expected / max(denominator, 1)
    torch.testing.assert_close(total, expected)
    (looped,) = torch.autograd.grad(expected, new, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(split, looped)


def test_errors_name_argument_value_and_remedy():
    new, old, advantages, mask = rows()
    with pytest.raises(ValueError, match=r"ceiling=0.9 must be at least 1"):
        clipped_surrogate(new, old, advantages, mask, ceiling=0.9)
    with pytest.raises(ValueError, match=r"ceiling=nan must be at least 1"):
        clipped_surrogate(new, old, advantages, mask, ceiling=math.nan)
    with pytest.raises(ValueError, match=r"clip=\(-0.1, 0.2\) must not be negative"):
        clipped_surrogate(new, old, advantages, mask, clip=(-0.1, 0.2))
    with pytest.raises(ValueError, match="level='word' is unknown: use token or sequence"):
        clipped_surrogate(new, old, advantages, mask, level="word")
    with pytest.raises(
        ValueError, match=r"must share one shape.*got \(5, 7\), \(5, 7\), \(5, 7\) and \(1,\)"
    ):
        clipped_surrogate(new, old, advantages[:1], mask)
    with pytest.raises(ValueError, match="must share one shape"):
        clip_fractions(new, old, advantages, mask[:1])
    with pytest.raises(ValueError, match="kind='k4' is unknown: use k1, k2 or k3"):
        kl_estimate(new, old, "k4")
    with pytest.raises(ValueError, match="over='rows' is unknown: use tokens, sequences or constant"):
        aggregate(new, mask, over="rows", denominator=1)
    for denominator in (0, -1.0, math.nan, torch.tensor(0)):
        with pytest.raises(ValueError, match="must be positive: count over the whole optimiser step"):
            aggregate(new, mask, over="tokens", denominator=denominator)
