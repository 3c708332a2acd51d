"""MaxRL, OPO, GDPO, and what holds of every scale: closed forms, slow twins and properties."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.grpo.advantages import (
    dead_groups,
    group_advantages,
    normalized_each,
    opo_advantages,
)

NAN = math.nan
ALL_SCALES = ["std", "population", "batch", "none", "rloo", "maxrl"]
many = settings(max_examples=60, deadline=None)


@st.composite
def tables(draw, *, columns=1, missing=True, low=0):
    """float64 rewards in halves (exact sums) of whole groups, some of them NaN, and the group size."""
    group_size = draw(st.integers(2, 6))
    rows = group_size * draw(st.integers(1, 4))
    value = st.integers(low, 20).map(lambda n: n / 2)
    value = st.one_of(value, st.just(NAN)) if missing else value
    flat = draw(st.lists(value, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(flat, dtype=torch.float64).view(rows, columns), group_size


def known(values):
    return [v for v in values if not math.isnan(v)]


@given(table=tables(low=-20))
@many
def test_maxrl_equals_a_slow_loop(table):
    rewards, size = table[0][:, 0], table[1]
    expected = []
    for group in rewards.view(-1, size).tolist():
        mean = statistics.fmean(known(group)) if known(group) else 0.0
        expected += [(r - mean) / mean if mean > 1e-6 and not math.isnan(r) else 0.0 for r in group]
    ours = group_advantages(rewards, size, scale="maxrl")
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


def test_maxrl_closed_forms():
    pair = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 2, scale="maxrl")
    assert pair.tolist() == [1.0, -1.0, 0.0, 0.0]
    # One success among eight weighs 7, one failure among eight costs 1: rare successes count most.
    one = group_advantages(torch.tensor([1.0] + [0.0] * 7), 8, scale="maxrl")
    torch.testing.assert_close(one, torch.tensor([7.0] + [-1.0] * 7))
    # Rewards that cancel leave float noise as their mean: not a divisor.
    assert group_advantages(torch.tensor([0.1, 0.2, -0.3]), 3, scale="maxrl").tolist() == [0.0] * 3
    assert group_advantages(torch.tensor([-1.0, -2.0]), 2, scale="maxrl").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", ALL_SCALES)
@given(table=tables())
@many
def test_sums_dead_groups_and_missing_rows(scale, table):
    rewards, size = table[0][:, 0], table[1]
    advantages = group_advantages(rewards, size, scale=scale)
    sums = advantages.view(-1, size).sum(1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-9, rtol=0)
    assert (advantages[rewards.isnan()] == 0).all()
    assert torch.equal(dead_groups(rewards, size), (advantages.view(-1, size) == 0).all(1))


@pytest.mark.parametrize("scale", ALL_SCALES)
@given(table=tables(), factor=st.sampled_from([0.25, 2.0, 64.0]))
@many
def test_scaling_of_the_rewards(scale, table, factor):
    rewards, size = table[0][:, 0], table[1]
    advantages = group_advantages(rewards, size, scale=scale, eps=0.0)
    scaled = group_advantages(factor * rewards, size, scale=scale, eps=0.0)
    torch.testing.assert_close(scaled, advantages * (factor if scale in ("none", "rloo") else 1))


@given(table=tables(missing=False))
@many
def test_constant_factors_between_the_scales(table):
    rewards, size = table[0][:, 0], table[1]
    by_scale = {scale: group_advantages(rewards, size, scale=scale, eps=0.0) for scale in ALL_SCALES}
    torch.testing.assert_close(by_scale["rloo"], by_scale["none"] * size / (size - 1))
    torch.testing.assert_close(by_scale["population"], by_scale["std"] * math.sqrt(size / (size - 1)))


@given(bits=st.lists(st.booleans(), min_size=2, max_size=12).filter(lambda bits: len(bits) % 2 == 0))
@many
def test_decided_pairs_of_binary_rewards(bits):
    """Reference 1.1: at G=2 population = RLOO = MaxRL = 2 Dr. GRPO, and Bessel's is 1 / sqrt 2 of them."""
    rewards = torch.tensor(bits, dtype=torch.float64)
    by_scale = {scale: group_advantages(rewards, 2, scale=scale, eps=0.0) for scale in ALL_SCALES}
    assert torch.equal(by_scale["population"], by_scale["rloo"])
    assert torch.equal(by_scale["maxrl"], by_scale["rloo"])
    assert torch.equal(by_scale["rloo"], 2 * by_scale["none"])
    torch.testing.assert_close(by_scale["std"], by_scale["rloo"] / math.sqrt(2))


@given(bits=st.lists(st.booleans(), min_size=2, max_size=16).filter(lambda bits: len(set(bits)) == 2))
@many
def test_contrastive_form(bits):
    """2-GRPO paper, proposition 3.1: A+ G+/G = -A- G-/G = sqrt(p (1 - p)), so both sides weigh the same."""
    rewards = torch.tensor(bits, dtype=torch.float64)
    advantages = group_advantages(rewards, len(bits), scale="population", eps=0.0)
    p = sum(bits) / len(bits)
    assert advantages[rewards == 1].sum().item() / len(bits) == pytest.approx(math.sqrt(p * (1 - p)))
    assert advantages[rewards == 0].sum().item() / len(bits) == pytest.approx(-math.sqrt(p * (1 - p)))


@given(table=tables(low=-20), seed=st.integers(0, 10**6))
@many
def test_opo_equals_a_slow_loop_and_weighted_sums_vanish(table, seed):
    rewards, size = table[0][:, 0], table[1]
    lengths = torch.randint(0, 9, rewards.shape, generator=torch.Generator().manual_seed(seed))
    expected = []
    for group, tokens in zip(rewards.view(-1, size).tolist(), lengths.view(-1, size).tolist(), strict=True):
        pairs = [(r, n) for r, n in zip(group, tokens, strict=True) if not math.isnan(r)]
        dead = len({r for r, _ in pairs}) < 2 or sum(n for _, n in pairs) == 0
        base = 0.0 if dead else sum(r * n for r, n in pairs) / sum(n for _, n in pairs)
        expected += [0.0 if dead or math.isnan(r) else r - base for r in group]
    ours = opo_advantages(rewards, lengths, size)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))
    sums = (ours * lengths).view(-1, size).sum(1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-9, rtol=0)
    shifted = opo_advantages(rewards + 8, lengths, size)
    torch.testing.assert_close(shifted, ours, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(opo_advantages(4 * rewards, lengths, size), 4 * ours)
    same = opo_advantages(rewards, torch.full_like(lengths, 7), size)
    torch.testing.assert_close(same, group_advantages(rewards, size, scale="none"))


def slow_gdpo(table, weights, size, eps):
    rows, sums = table.tolist(), []
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        for row in group:
            total = 0.0
            for k, weight in enumerate(weights):
                column = known(r[k] for r in group)
                if math.isnan(row[k]) or len(set(column)) < 2:
                    continue
                total += weight * (row[k] - statistics.fmean(column)) / (statistics.stdev(column) + eps)
            sums.append(NAN if all(map(math.isnan, row)) else total)
    mean = statistics.fmean(known(sums)) if known(sums) else 0.0
    spread = statistics.stdev(known(sums)) if len(known(sums)) > 1 else 0.0
    return [0.0 if math.isnan(x) else (x - mean) / (spread + eps) for x in sums]


@given(table=tables(columns=3, low=-20), weights=st.sampled_from([(1.0, 1.0, 1.0), (1.0, 0.5, -2.0)]))
@many
def test_gdpo_equals_the_paper_as_a_slow_loop(table, weights):
    table, size = table
    ours = normalized_each(table, weights, size)
    expected = torch.tensor(slow_gdpo(table, weights, size, 1e-4), dtype=torch.float64)
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)
    equal = torch.stack([dead_groups(column, size) for column in table.unbind(1)]).all(0)
    assert (ours.view(-1, size)[equal] == 0).all()


@given(table=tables(columns=2), unit=st.sampled_from([0.25, 8.0]), shift=st.integers(-9, 9))
@many
def test_gdpo_does_not_see_the_unit_of_a_reward(table, unit, shift):
    table, size = table
    ours = normalized_each(table, [1.0, 1.0], size, eps=0.0)
    assert ours.isfinite().all()
    other = torch.stack([table[:, 0], unit * table[:, 1] + shift], 1)
    torch.testing.assert_close(normalized_each(other, [1.0, 1.0], size, eps=0.0), ours, atol=1e-9, rtol=1e-9)


def test_gdpo_keeps_apart_what_a_sum_confuses():
    # The totals are 1, 1, 0 and 0; a rare second reward weighs more than a common first one.
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
    each = normalized_each(table, [1.0, 1.0], 4)
    summed = group_advantages(table.sum(1), 4)
    assert summed[0] == summed[1]
    assert abs(each[0] - each[1]) > 0.1
    # Opposite weights cancel to float noise, which is not blown up.
    twice = torch.tensor([[0.1, 0.3], [0.2, 0.6], [0.4, 1.2]])
    assert torch.equal(normalized_each(twice, [1.0, -1.0], 3, eps=0.0), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_float64_stays_and_all_else_becomes_float32(dtype):
    rewards = torch.tensor([1, 0, 3, 4]).to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert group_advantages(rewards, 2).dtype == expected
    assert opo_advantages(rewards, torch.tensor([1, 2, 3, 4]), 2).dtype == expected
    assert normalized_each(rewards.view(2, 2), torch.ones(2), 2).dtype == expected


def test_errors_name_argument_value_and_remedy():
    rewards = torch.zeros(4)
    with pytest.raises(ValueError, match=r"lengths_B has the shape \(3,\): expected \(4,\), one length per"):
        opo_advantages(rewards, torch.ones(3), 2)
    for length in (-1.0, NAN, math.inf):
        with pytest.raises(ValueError, match="negative or not finite length: pass the tokens that count"):
            opo_advantages(rewards, torch.full((4,), length), 2)
    with pytest.raises(ValueError, match=r"shape \(4, 2\) and weights 3 entries: expected \(B, K\) and K"):
        normalized_each(torch.zeros(4, 2), [1.0] * 3, 2)
    for wrong in (rewards, torch.zeros(4, 0)):
        with pytest.raises(ValueError, match="one column and one weight per reward function"):
            normalized_each(wrong, [], 2)
    # Two columns of three rows are six numbers, but no whole groups.
    with pytest.raises(ValueError, match="3 rewards do not form groups of group_size=2"):
        normalized_each(torch.zeros(3, 2), [1.0, 1.0], 2)
