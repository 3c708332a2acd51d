from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.grpo.advantages import dead_groups, group_advantages

SCALES = ["std", "population", "batch", "none", "rloo"]


def slow_advantages(rewards, group_size, scale, eps, tolerance):
    """The same definition, one reward at a time, in double precision."""

    def spread(values, divisor):
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / divisor)

    everything = [r for r in rewards if not math.isnan(r)]
    result = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        known = [r for r in group if not math.isnan(r)]
        for r in group:
            if math.isnan(r) or len(known) < 2 or max(known) - min(known) <= tolerance:
                result.append(0.0)
                continue
            mean = sum(known) / len(known)
            if scale == "rloo":
                result.append(r - (sum(known) - r) / (len(known) - 1))
            elif scale == "none":
                result.append(r - mean)
            elif scale == "std":
                result.append((r - mean) / (spread(known, len(known) - 1) + eps))
            elif scale == "population":
                result.append((r - mean) / (spread(known, len(known)) + eps))
            else:
                result.append((r - mean) / (spread(everything, len(everything) - 1) + eps))
    return result


# Halves: sums are exact in float32, so that equal rewards stay equal through shifts.
reward = st.integers(-20, 20).map(lambda n: n / 2)


@st.composite
def batches(draw, values=reward):
    group_size = draw(st.integers(2, 6))
    rows = group_size * draw(st.integers(1, 4))
    return torch.tensor(draw(st.lists(values, min_size=rows, max_size=rows))), group_size


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("std", 0.5 / (1 / math.sqrt(2) + 1e-4)),
        ("population", 0.5 / (0.5 + 1e-4)),
        ("none", 0.5),
        ("rloo", 1.0),
        # Batch: rewards 1, 0, 1, 1 have the Bessel standard deviation 1/2.
        ("batch", 0.5 / (0.5 + 1e-4)),
    ],
)
def test_closed_forms_of_a_pair(scale, expected):
    advantages = group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2, scale=scale)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, torch.tensor([expected, -expected, 0.0, 0.0]))


def test_binary_pairs_make_three_methods_one():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    population = group_advantages(rewards, 2, scale="population", eps=0.0)
    rloo = group_advantages(rewards, 2, scale="rloo")
    centred = group_advantages(rewards, 2, scale="none")
    bessel = group_advantages(rewards, 2, scale="std", eps=0.0)
    assert torch.equal(population, rloo)
    assert torch.equal(rloo, 2 * centred)
    torch.testing.assert_close(bessel, population / math.sqrt(2))


@pytest.mark.parametrize("positives", range(1, 8))
def test_binary_group_has_the_contrastive_form(positives):
    """2-GRPO paper, proposition 3.1: sqrt((1-p)/p) for the good and -sqrt(p/(1-p)) for the bad ones."""
    rewards = torch.tensor([1.0] * positives + [0.0] * (8 - positives))
    p = positives / 8
    advantages = group_advantages(rewards, 8, scale="population", eps=0.0)
    torch.testing.assert_close(advantages[0].item(), math.sqrt((1 - p) / p), rtol=1e-5, atol=0)
    torch.testing.assert_close(advantages[-1].item(), -math.sqrt(p / (1 - p)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@given(batch=batches(values=st.one_of(reward, st.just(math.nan))))
@settings(max_examples=60, deadline=None)
def test_equals_the_slow_loop(scale, batch):
    rewards, group_size = batch
    expected = torch.tensor(slow_advantages(rewards.tolist(), group_size, scale, 1e-4, 1e-6))
    torch.testing.assert_close(group_advantages(rewards, group_size, scale=scale), expected)


@given(batch=batches())
@settings(max_examples=60, deadline=None)
def test_equals_the_formulas_of_trl_and_verl(batch):
    rewards, group_size = batch
    groups = rewards.view(-1, group_size)
    # TRL 1.16: mean and Bessel std of the group, eps 1e-4; verl's RLOO in its own form.
    trl = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, group_size), trl.view(-1), atol=1e-5, rtol=1e-5)
    n = group_size
    verl = groups * n / (n - 1) - groups.mean(1, keepdim=True) * n / (n - 1)
    rloo = group_advantages(rewards, group_size, scale="rloo")
    torch.testing.assert_close(rloo, verl.view(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@given(batch=batches(values=st.one_of(reward, st.just(math.nan))), shift=st.integers(-50, 50))
@settings(max_examples=40, deadline=None)
def test_properties_of_every_scale(scale, batch, shift):
    rewards, group_size = batch
    advantages = group_advantages(rewards, group_size, scale=scale)
    sums = advantages.view(-1, group_size).sum(1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-4, rtol=0)
    shifted = group_advantages(rewards + shift, group_size, scale=scale)
    torch.testing.assert_close(shifted, advantages, atol=1e-4, rtol=1e-4)
    # Rows may change places within their group, and groups with each other.
    order = torch.arange(len(rewards)).view(-1, group_size).flip(0).flip(1).reshape(-1)
    moved = group_advantages(rewards[order], group_size, scale=scale)
    torch.testing.assert_close(moved, advantages[order], atol=1e-5, rtol=1e-5)
    assert torch.equal(advantages[rewards.isnan()], torch.zeros(int(rewards.isnan().sum())))
    dead = dead_groups(rewards, group_size)
    assert torch.equal(dead, (advantages.view(-1, group_size) == 0).all(1))


@pytest.mark.parametrize("scale", ["std", "population", "batch"])
@given(batch=batches(), factor=st.sampled_from([0.5, 2.0, 8.0]))
@settings(max_examples=40, deadline=None)
def test_unit_of_the_reward_does_not_matter_without_eps(scale, batch, factor):
    rewards, group_size = batch
    advantages = group_advantages(rewards, group_size, scale=scale, eps=0.0)
    assert advantages.isfinite().all()
    scaled = group_advantages(rewards * factor, group_size, scale=scale, eps=0.0)
    torch.testing.assert_close(scaled, advantages)


@pytest.mark.parametrize("scale", SCALES)
def test_float_noise_is_a_dead_group(scale):
    noise = torch.tensor([0.3, 0.1 + 0.2 + 5e-7], dtype=torch.float64)
    assert torch.equal(group_advantages(noise, 2, scale=scale, eps=0.0), torch.zeros(2))
    assert group_advantages(noise, 2, scale=scale, tolerance=0.0).abs().min() > 0


@pytest.mark.parametrize("scale", SCALES)
def test_nan_rows_do_not_take_part(scale):
    nan = math.nan
    with_nan = group_advantages(torch.tensor([1.0, nan, 0.0, 0.5, nan, nan]), 6, scale=scale)
    without = group_advantages(torch.tensor([1.0, 0.0, 0.5]), 3, scale=scale)
    torch.testing.assert_close(with_nan[[0, 2, 3]], without)
    assert torch.equal(with_nan[[1, 4, 5]], torch.zeros(3))
    alone = torch.tensor([nan, 1.0, nan, nan])
    assert torch.equal(group_advantages(alone, 2, scale=scale), torch.zeros(4))


@pytest.mark.parametrize("scale", SCALES)
def test_no_rows_and_integer_rewards(scale):
    assert group_advantages(torch.zeros(0), 4, scale=scale).shape == (0,)
    integers = group_advantages(torch.tensor([1, 0, 3, 1]), 2, scale=scale)
    assert torch.equal(integers, group_advantages(torch.tensor([1.0, 0.0, 3.0, 1.0]), 2, scale=scale))


def test_errors_name_argument_value_and_remedy():
    rewards = torch.zeros(6)
    with pytest.raises(
        ValueError, match=r"group_size=1: a group of one has no baseline.*num_generations >= 2"
    ):
        group_advantages(rewards, 1)
    with pytest.raises(ValueError, match="6 rewards do not form groups of group_size=4: pass whole groups"):
        group_advantages(rewards, 4)
    with pytest.raises(
        ValueError, match="scale='zscore' is unknown: use one of std, population, batch, none, rloo"
    ):
        group_advantages(rewards, 2, scale="zscore")
    with pytest.raises(ValueError, match=r"rewards_B has the shape \(3, 2\): expected \(B,\)"):
        group_advantages(rewards.view(3, 2), 2)
    with pytest.raises(
        ValueError, match=r"infinite at row 1 \(1 such rows\): rewards must be finite, or NaN"
    ):
        group_advantages(torch.tensor([1.0, -math.inf]), 2)
    with pytest.raises(ValueError, match="no baseline"):
        dead_groups(rewards, 1)
