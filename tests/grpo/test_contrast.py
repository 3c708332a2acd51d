"""Sketches of gradients, and statistics of group sizes, against loops and closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.grpo.advantages import group_advantages
from lightning_modules.grpo.contrast import group_size_statistics, sketch

SIZES = (2, 4, 8, 16)
WITH_INTERVAL = ["variance", "squared_norm", "signal_to_noise", "relative_variance", "dead", "cosine"]


def pool(Q=6, C=16, d=5, seed=0, p=0.4):
    generator = torch.Generator().manual_seed(seed)
    rewards = (torch.rand(Q, C, generator=generator) < p).float()
    gradients = torch.randn(Q, C, d, generator=generator) + rewards[..., None] * torch.arange(1.0, d + 1)
    return gradients + torch.randn(Q, 1, d, generator=generator), rewards


# ---------------------------------------------------------------------- sketch


def test_without_dim_the_sketch_is_the_gradient():
    parts = [torch.arange(6.0).view(2, 3), torch.tensor([7.0]).bfloat16()]
    assert sketch(parts, None).tolist() == [0, 1, 2, 3, 4, 5, 7]


def test_a_sketch_keeps_inner_products_on_average_and_has_the_variance_of_theory():
    x = [torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), torch.ones(4)]
    y = [part.roll(1) + 0.5 for part in x]
    flat_x, flat_y = sketch(x, None).double(), sketch(y, None).double()
    exact, dim, seeds = float(flat_x @ flat_y), 16, 4000
    found = torch.tensor([float(sketch(x, dim, seed=s) @ sketch(y, dim, seed=s)) for s in range(seeds)])
    squares = (flat_x**2).sum() * (flat_y**2).sum() + exact**2 - 2 * (flat_x**2 * flat_y**2).sum()
    deviation = math.sqrt(squares / dim)
    assert abs(found.mean() - exact) < 4 * deviation / math.sqrt(seeds)
    assert found.std().item() == pytest.approx(deviation, rel=0.06)


def test_a_sketch_is_linear_and_repeats_itself_without_the_global_generator():
    x, y = [torch.randn(50), torch.randn(3, 3)], [torch.randn(50), torch.randn(3, 3)]
    state = torch.get_rng_state()
    both = sketch([a + 2 * b for a, b in zip(x, y, strict=True)], 8, seed=3)
    torch.testing.assert_close(both, sketch(x, 8, seed=3) + 2 * sketch(y, 8, seed=3))
    assert torch.equal(sketch(x, 8, seed=3), sketch(x, 8, seed=3))
    assert not torch.equal(sketch(x, 8, seed=3), sketch(x, 8, seed=4))
    assert torch.equal(state, torch.get_rng_state())


def test_equal_entries_of_two_parameters_do_not_share_their_place():
    one, other = torch.zeros(40), torch.ones(40)
    assert not torch.equal(sketch([one, other], 64), sketch([other, one], 64))


def test_statistics_of_sketches_are_close_to_the_exact_ones():
    gradients, rewards = pool(d=3000, seed=1)
    sketches = torch.stack([torch.stack([sketch([g], 2048) for g in row]) for row in gradients])
    for exact, rough in zip(
        group_size_statistics(gradients, rewards), group_size_statistics(sketches, rewards), strict=True
    ):
        assert rough.relative_variance.value == pytest.approx(exact.relative_variance.value, rel=0.1)
        assert rough.dead == exact.dead


# ---------------------------------------------------------------------- group sizes


def slow_values(gradients, rewards, G, scale, rollouts, prompts):
    """The definitions, group by group and pair by pair, over some prompts."""
    C = rewards.shape[1]
    batch = rewards.reshape(-1)
    groups, means, largest, dead = {}, {}, {}, []
    for q in prompts:
        A = group_advantages(batch, G, scale=scale).view(-1, C)[q].double()
        A_largest = group_advantages(batch, max(SIZES), scale=scale).view(-1, C)[q].double()
        g = gradients[q].double()
        groups[q] = [sum(A[i] * g[i] for i in range(start, start + G)) / G for start in range(0, C, G)]
        means[q] = sum(groups[q]) / len(groups[q])
        largest[q] = sum(A_largest[i] * g[i] for i in range(C)) / C
        dead += [all(A[i] == 0 for i in range(start, start + G)) for start in range(0, C, G)]
    pairs = [(q, s) for q, s in itertools.product(prompts, prompts) if q != s]
    squared_norm = sum(means[q] @ means[s] for q, s in pairs) / len(pairs)
    second = sum(sum(h @ h for h in groups[q]) / len(groups[q]) for q, _ in pairs) / len(pairs)
    mean, mean_largest = sum(means[q] for q in prompts), sum(largest[q] for q in prompts)
    return {
        "variance": float(second - squared_norm) * G / rollouts,
        "squared_norm": float(squared_norm),
        "dead": sum(dead) / len(dead),
        "cosine": float(torch.nn.functional.cosine_similarity(mean, mean_largest, dim=0)),
    }


@pytest.mark.parametrize("scale", ["population", "std", "batch", "none", "rloo"])
def test_equals_the_loop_over_groups_and_pairs(scale):
    gradients, rewards = pool()
    rewards[2], rewards[0, 3] = 1.0, torch.nan
    found = group_size_statistics(gradients, rewards, SIZES, scale, rollouts=64, resamples=5)
    for one, G in zip(found, SIZES, strict=True):
        slow = slow_values(gradients, rewards, G, scale, 64, range(6))
        assert one.group_size == G
        for name, value in slow.items():
            assert getattr(one, name).value == pytest.approx(value, abs=1e-9), (G, name)
        snr = slow["squared_norm"] / slow["variance"]
        assert one.signal_to_noise.value == pytest.approx(snr)
        if snr > 0:
            assert one.relative_variance.value == pytest.approx(1 / snr)
        else:
            assert math.isnan(one.relative_variance.value)


def test_intervals_are_those_of_resampled_prompts():
    """A slow bootstrap in which a prompt that was drawn twice is no pair of different prompts."""
    gradients, rewards = pool(Q=5)
    resamples = 60
    drawn = torch.randint(5, (resamples, 5), generator=torch.Generator().manual_seed(7)).tolist()
    found = group_size_statistics(gradients, rewards, (4, 16), resamples=resamples, seed=7)[0]
    A = group_advantages(rewards.flatten(), 4, scale="population").view(5, 16).double()
    means = [(A[q][:, None] * gradients[q].double()).mean(0) for q in range(5)]
    values = []
    for sample in drawn:
        pairs = [(q, s) for i, q in enumerate(sample) for j, s in enumerate(sample) if i != j and q != s]
        values.append(float(sum(means[q] @ means[s] for q, s in pairs) / len(pairs)))
    low, high = torch.tensor(values).double().quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    assert (found.squared_norm.low, found.squared_norm.high) == pytest.approx((low, high))
    snr, relative = found.signal_to_noise, found.relative_variance
    assert relative.low == pytest.approx(1 / snr.high)
    assert relative.high == pytest.approx(1 / snr.low) if snr.low > 0 else relative.high == math.inf


def averages(make, trials, sizes=SIZES):
    """Mean of variance and squared norm over many pools, with their standard errors."""
    found = {G: [] for G in sizes}
    for trial in range(trials):
        for one in group_size_statistics(*make(trial), sizes, rollouts=1, resamples=2):
            found[one.group_size].append((one.variance.value, one.squared_norm.value))
    values = {G: torch.tensor(rows).double() for G, rows in found.items()}
    return {G: (rows.mean(0), rows.std(0) / math.sqrt(trials)) for G, rows in values.items()}


def test_gradients_unrelated_to_rewards_are_noise_of_live_groups():
    """E h = 0 and tr Cov = (live share) sigma^2 d / B, whatever G is: the claim of the paper's lemma."""
    p, sigma, d = 0.3, 2.0, 3

    def make(trial):
        generator = torch.Generator().manual_seed(trial)
        rewards = (torch.rand(4, 16, generator=generator) < p).float()
        return torch.randn(4, 16, d, generator=generator) * sigma, rewards

    for G, (mean, error) in averages(make, 150).items():
        live = 1 - p**G - (1 - p) ** G
        assert abs(mean[0] - live * sigma**2 * d) < 4 * error[0] + 0.01 * live * sigma**2 * d
        assert abs(mean[1]) < 4 * error[1]


def test_gradients_along_the_reward_have_the_scale_of_their_group_size():
    """g = r u gives h = sqrt(share (1 - share)) u: p (1 - p) at G=2, towards its root as G grows."""
    p, u = 0.4, torch.tensor([3.0, 4.0])

    def make(trial):
        generator = torch.Generator().manual_seed(trial)
        rewards = (torch.rand(4, 16, generator=generator) < p).float()
        return rewards[..., None] * u, rewards

    for G, (mean, error) in averages(make, 150).items():
        share = [math.comb(G, k) * p**k * (1 - p) ** (G - k) for k in range(G + 1)]
        first = 5 * sum(w * math.sqrt(k / G * (1 - k / G)) for k, w in enumerate(share))
        second = 25 * sum(w * k / G * (1 - k / G) for k, w in enumerate(share))
        assert abs(mean[1] - first**2) < 4 * error[1] + 0.001 * first**2  # eps of the advantages
        assert abs(mean[0] - G * (second - first**2)) < 4 * error[0] + 0.01 * G * second
        if G == 2:
            assert first == pytest.approx(5 * p * (1 - p))


def test_the_squared_norm_can_be_negative_and_then_has_no_relative_variance():
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    gradients = torch.tensor([[[1.0], [0.0]], [[-1.0], [0.0]]])
    [one] = group_size_statistics(gradients, rewards, (2,), resamples=50)
    assert one.squared_norm.value == pytest.approx(-0.25, rel=1e-3)
    assert one.signal_to_noise.value < 0
    assert math.isnan(one.relative_variance.value)
    assert one.relative_variance.high == math.inf


@pytest.mark.parametrize("rewards", [torch.ones(3, 4), torch.full((3, 4), torch.nan)])
def test_a_pool_of_dead_groups_has_no_ratio(rewards):
    for one in group_size_statistics(torch.randn(3, 4, 2), rewards, (2, 4), resamples=10):
        assert one.dead == (1, 1, 1)
        assert one.variance.value == one.squared_norm.value == 0
        for name in ("signal_to_noise", "relative_variance", "cosine"):
            assert all(map(math.isnan, getattr(one, name)))


def test_one_prompt_has_no_variance_over_prompts():
    [one] = group_size_statistics(*pool(Q=1, C=4), (4,), resamples=10)
    assert all(map(math.isnan, one.variance))
    assert all(map(math.isnan, one.relative_variance))
    assert 0 <= one.dead.value <= 1


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    factor=st.floats(0.01, 100),
    rollouts=st.integers(1, 10_000),
    p=st.floats(0.1, 0.9),
)
def test_properties(seed, factor, rollouts, p):
    """Ratios ignore scale and direction of all gradients; variance goes with 1 / B; the order of prompts is nothing."""
    gradients, rewards = pool(Q=4, C=8, seed=seed, p=p)
    gradients, sizes = gradients.double(), (2, 8)
    turned = torch.linalg.qr(gradients[0, :5]).Q * factor
    base = group_size_statistics(gradients, rewards, sizes, rollouts=1, resamples=20)
    other = group_size_statistics(gradients @ turned, rewards, sizes, rollouts=rollouts, resamples=20)
    flipped = group_size_statistics(gradients.flip(0), rewards.flip(0), sizes, rollouts=1, resamples=20)
    for one, two, three in zip(base, other, flipped, strict=True):
        assert one.variance.value >= 0
        assert two.variance.value == pytest.approx(
            one.variance.value * factor**2 / rollouts, rel=1e-6, abs=1e-9
        )
        assert three.squared_norm.value == pytest.approx(one.squared_norm.value, rel=1e-6, abs=1e-9)
        assert two.cosine == pytest.approx(one.cosine, abs=1e-6, nan_ok=True)
        assert 0 <= one.dead.low <= one.dead.value <= one.dead.high <= 1
    all_dead = base[-1].dead.value == 1
    assert math.isnan(base[-1].cosine.value) if all_dead else base[-1].cosine.value == pytest.approx(1)


def test_large_pools_are_added_up_in_chunks():
    gradients, rewards = pool(Q=2, C=2, d=70_000)
    flat = gradients.double().flatten(0, 1)
    A = group_advantages(rewards.flatten(), 2, scale="none").double()
    rewards[0], rewards[1] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    A = torch.tensor([0.5, -0.5, -0.5, 0.5]).double()
    h = (A[:, None] * flat).view(2, 2, -1).mean(1)
    [one] = group_size_statistics(gradients, rewards, (2,), "none", resamples=2)
    assert one.squared_norm.value == pytest.approx(float(h[0] @ h[1]))


@pytest.mark.parametrize(
    ("gradients", "rewards", "sizes", "message"),
    [
        (
            torch.zeros(2, 4, 3),
            torch.zeros(2, 5),
            (2,),
            r"\(2, 4, 3\) and rewards_QC \(2, 5\): expected \(Q, C, d\)",
        ),
        (torch.zeros(8, 3), torch.zeros(8), (2,), r"expected \(Q, C, d\) and \(Q, C\)"),
        (torch.zeros(2, 6, 3), torch.zeros(2, 6), (2, 4), "sizes: 4 does not divide the 6 completions"),
        (torch.zeros(2, 6, 3), torch.zeros(2, 6), (1, 2), "sizes: 1 does not divide"),
    ],
)
def test_bad_pools_are_named(gradients, rewards, sizes, message):
    with pytest.raises(ValueError, match=message):
        group_size_statistics(gradients, rewards, sizes)


def test_a_seed_repeats_the_intervals():
    gradients, rewards = pool()
    first, again, other = (group_size_statistics(gradients, rewards, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
