"""Element-wise merging: equal to slow loops, to PEFT, and the same for sparse and dense experts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from lightning_modules.merging import (
    average,
    breadcrumbs,
    consensus,
    dare,
    entries,
    overlap_average,
    sign_consistent_average,
    task_arithmetic,
    ties,
)
from lightning_modules.sparse.delta import SparseDelta

SHAPE = (6, 5)


def sparse(shape, density, generator):
    size = math.prod(shape)
    indices = torch.randperm(size, generator=generator)[: round(density * size)].sort().values
    return SparseDelta(indices.int(), torch.randn(len(indices), generator=generator), shape)


def dense(delta):
    return delta.dense() if isinstance(delta, SparseDelta) else delta


def experts_of(kinds, seed, shape=SHAPE):
    """One expert for each of `kinds`: d dense, s sparse, 0 without this parameter."""
    generator = torch.Generator().manual_seed(seed)
    make = {
        "d": lambda: {"w": torch.randn(shape, generator=generator)},
        "s": lambda: {"w": sparse(shape, 0.5, generator)},
        "0": lambda: {},
    }
    return [make[kind]() for kind in kinds]


def densified(experts):
    return [{name: dense(delta) for name, delta in expert.items()} for expert in experts]


def columns(experts):
    """For each entry, the values of all experts, as floats; an expert without the parameter has zeros."""
    tensors = [
        dense(expert["w"]).flatten() if expert else torch.zeros(math.prod(SHAPE)) for expert in experts
    ]
    return torch.stack(tensors).T.tolist()


# ---------------------------------------------------------------- slow twins: one entry's values -> merged


def mean(values):
    return sum(values) / len(values)


def overlap(values):
    touching = [value for value in values if value != 0]
    return sum(touching) / max(1, len(touching))


def agreeing(values):
    sign = 1 if sum(values) >= 0 else -1
    chosen = [value for value in values if value * sign > 0]
    return sum(chosen) / max(1, len(chosen))


def add(values, scale=0.4):
    return scale * sum(values)


def agreed(values, scale=0.4, lam=0.4, agree=2):
    total = sum(values)
    uses = sum(abs(value) >= lam * abs(total - value) for value in values)
    return scale * total if uses >= agree else 0.0


def ranked(column):
    """Positions from the largest magnitude down, earlier first among equal ones."""
    return sorted(range(len(column)), key=lambda at: (-abs(column[at]), at))


def kept(columns, first, last):
    """Each expert keeps the ranks from `first` to before `last`."""
    by_expert = [list(column) for column in zip(*columns, strict=True)]
    for column in by_expert:
        for rank, at in enumerate(ranked(column)):
            if not first <= rank < last:
                column[at] = 0.0
    return [list(values) for values in zip(*by_expert, strict=True)]


def slow_ties(columns):
    return [agreeing(values) for values in kept(columns, 0, int(0.2 * len(columns)))]


def slow_breadcrumbs(columns):
    size = len(columns)
    return [add(values) for values in kept(columns, int(0.1 * size), size - int(0.5 * size))]


METHODS = [
    (average, lambda c: [mean(v) for v in c]),
    (overlap_average, lambda c: [overlap(v) for v in c]),
    (sign_consistent_average, lambda c: [agreeing(v) for v in c]),
    (task_arithmetic, lambda c: [add(v) for v in c]),
    (ties, slow_ties),
    (lambda experts: breadcrumbs(experts, bottom=0.5, top=0.1), slow_breadcrumbs),
    (consensus, lambda c: [agreed(v) for v in c]),
    (lambda experts: dare(experts, density=1), lambda c: [add(v) for v in c]),
]


@pytest.mark.parametrize(("method", "slow"), METHODS)
@given(
    kinds=st.text("ds0", min_size=1, max_size=5).filter(lambda kinds: set(kinds) != {"0"}),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_equals_the_slow_loop(method, slow, kinds, seed):
    experts = experts_of(kinds, seed)
    merged = method(experts)["w"]
    assert isinstance(merged, SparseDelta) == ("d" not in kinds)
    expected = torch.tensor(slow(columns(experts))).view(SHAPE)
    torch.testing.assert_close(dense(merged), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dense(method(densified(experts))["w"]), dense(merged), rtol=0, atol=0)


@pytest.mark.parametrize(("method", "slow"), METHODS)
@pytest.mark.parametrize("kinds", ["sss", "dsd"])
def test_the_chunk_size_does_not_matter(method, slow, kinds, monkeypatch):
    experts = experts_of(kinds, 3)
    whole = dense(method(experts)["w"])
    monkeypatch.setattr(entries, "CHUNK", 7)
    assert dense(method(experts)["w"]).equal(whole)


def test_sparse_results_are_sorted_without_zeros():
    experts = experts_of("sss", 1)
    experts.append({"w": SparseDelta(experts[0]["w"].indices, -experts[0]["w"].values, SHAPE)})
    merged = average(experts)["w"]
    assert (merged.values != 0).all()
    assert (merged.indices[1:] > merged.indices[:-1]).all()
    assert merged.indices.dtype == torch.int32
    assert merged.shape == SHAPE


@pytest.mark.parametrize("kind", ["d", "s"])
@pytest.mark.parametrize(
    "method",
    [average, overlap_average, sign_consistent_average, lambda experts: ties(experts, density=1)],
)
def test_identical_experts_give_that_expert(method, kind):
    experts = experts_of(kind, 5) * 3
    torch.testing.assert_close(dense(method(experts)["w"]), dense(experts[0]["w"]))


def test_overlap_average_of_disjoint_experts_is_their_sum():
    first = SparseDelta(torch.tensor([0, 3]), torch.tensor([1.0, 2.0]), (6,))
    second = SparseDelta(torch.tensor([1, 5]), torch.tensor([3.0, 4.0]), (6,))
    merged = overlap_average([{"w": first}, {"w": second}])["w"]
    assert dense(merged).tolist() == [1, 3, 0, 2, 0, 4]


def test_a_named_zero_touches():
    first = SparseDelta(torch.tensor([0]), torch.tensor([4.0]), (2,))
    second = SparseDelta(torch.tensor([0]), torch.tensor([0.0]), (2,))
    assert dense(overlap_average([{"w": first}, {"w": second}])["w"]).tolist() == [2, 0]
    assert overlap_average([{"w": first.dense()}, {"w": second.dense()}])["w"].tolist() == [4, 0]


def test_plain_tuples_infer_their_size():
    merged = average(
        [{"w": (torch.tensor([1]), torch.tensor([2.0]))}, {"w": (torch.tensor([4]), torch.ones(1))}]
    )
    assert merged["w"].indices.tolist() == [1, 4]
    assert merged["w"].values.tolist() == [1.0, 0.5]
    assert merged["w"].shape is None
    shaped = average([{"w": (torch.tensor([1]), torch.tensor([2.0]))}, {"w": torch.ones(2, 2)}])
    assert shaped["w"].tolist() == [[0.5, 1.5], [0.5, 0.5]]


# ---------------------------------------------------------------- peers


@given(seed=st.integers(0, 99), density=st.sampled_from([0.1, 0.2, 0.5, 0.9]), whole=st.booleans())
@settings(max_examples=30, deadline=None)
def test_ties_equals_pefts(seed, density, whole):
    experts = experts_of("dddd", seed)
    if whole:  # sums of exactly 0 occur among whole numbers
        shift = torch.arange(30).view(SHAPE) * 1e-3
        experts = [{"w": (expert["w"] * 2).round() + shift * expert["w"].sign()} for expert in experts]
        experts[1] = {"w": -experts[0]["w"]}
    tensors = [expert["w"] for expert in experts]
    expected = merge_utils.ties(tensors, torch.ones(len(tensors)), density)
    torch.testing.assert_close(ties(experts, density=density)["w"], expected)
    torch.testing.assert_close(ties(experts, density=density, scale=0.3)["w"], 0.3 * expected)


def test_a_sum_of_zero_elects_plus_as_in_peft():
    experts = [{"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([-2.0, 1.0])}]
    with pytest.warns(UserWarning, match="no pruning"):
        expected = merge_utils.ties([expert["w"] for expert in experts], torch.ones(2), 1.0)
    assert ties(experts, density=1)["w"].tolist() == expected.tolist() == [2, 1]


def test_dare_equals_pefts_with_the_same_masks(monkeypatch):
    experts = experts_of("ddd", 7)
    drawn = []
    draw = torch.bernoulli

    def record(*args, **kwargs):
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "bernoulli", record)
    merged = dare(experts, density=0.3, scale=0.7, seed=1)["w"]
    masks = iter(drawn)
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(masks).view(SHAPE))
    expected = merge_utils.dare_linear([expert["w"] for expert in experts], torch.full((3,), 0.7), 0.3)
    torch.testing.assert_close(merged, expected)


def test_dare_draws_by_seed_name_and_expert():
    experts = [{"a": torch.ones(100), "b": torch.ones(100)}] * 2
    merged = dare(experts, density=0.5)
    assert merged["a"].equal(dare(experts, density=0.5)["a"])
    assert merged["a"].equal(dare([{"a": torch.ones(100)}] * 2, density=0.5)["a"])
    assert not merged["a"].equal(merged["b"])
    assert not merged["a"].equal(dare(experts, density=0.5, seed=1)["a"])
    assert merged["a"].unique().tolist() == pytest.approx([0, 0.8, 1.6])  # experts draw apart


def test_dare_has_the_right_mean_and_drops_own_entries_only():
    size, density = 40_000, 0.1
    delta = SparseDelta(torch.arange(0, size, 2), torch.ones(size // 2), (size,))
    merged = dare([{"w": delta}], density=density, scale=1.0)["w"]
    assert merged.values.unique().tolist() == pytest.approx([1 / density])
    assert (merged.indices % 2 == 0).all()
    error = math.sqrt((1 - density) / density / (size // 2))  # standard deviation of the mean
    assert float(merged.values.sum()) / (size // 2) == pytest.approx(1, abs=4 * error)


def test_trimming_keeps_exactly_the_share():
    experts = [{"w": torch.randn(50, 20, generator=torch.Generator().manual_seed(0))}]
    assert int((ties(experts)["w"] != 0).sum()) == 200
    equal = [{"w": torch.ones(10)}]
    assert ties(equal)["w"].tolist() == [1, 1] + [0] * 8
    assert (ties([{"w": torch.ones(4)}])["w"] == 0).all()


def test_breadcrumbs_cuts_both_tails():
    weights = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float() + 1
    signed = torch.where(weights % 2 == 0, weights, -weights)
    merged = breadcrumbs([{"w": signed}], scale=1.0)["w"]
    left = merged[merged != 0].abs().sort().values
    assert left.tolist() == list(range(901, 991))
    named = SparseDelta(torch.arange(0, 1000, 10), torch.arange(1.0, 101.0), (1000,))
    part = breadcrumbs([{"w": named}], scale=1.0)["w"]
    assert part.values.tolist() == list(range(1, 91))  # the 900 that it does not name are the smallest


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: ties(e, density=0), "density=0: must be above 0 and at most 1"),
        (lambda e: dare(e, density=1.5), "density=1.5"),
        (lambda e: breadcrumbs(e, bottom=0.9, top=0.1), "bottom=0.9, top=0.1: must be below 1 together"),
        (lambda e: consensus(e, lam=0), "lam=0: must be above 0"),
        (lambda e: consensus(e, agree=0), "agree=0: must be at least 1"),
        (lambda e: average([]), "experts is empty"),
        (
            lambda e: average([*e, {"w": torch.ones(5, 6)}]),
            r"w: shapes clash: \(6, 5\) in expert 1, \(5, 6\) in expert 2",
        ),
        (
            lambda e: average([{"w": SparseDelta(torch.tensor([7]), torch.ones(1), (2, 3))}]),
            "w in expert 1: indices reach from 7 to 7, but the weight has 6",
        ),
        (lambda e: average([{"w": (torch.tensor([1, 1]), torch.ones(2))}]), "sorted without repetition"),
        (lambda e: average([{"w": (torch.tensor([1, 2]), torch.ones(3))}]), "3 values for 2 indices"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(experts_of("d", 0))


def test_more_experts_than_a_byte_counts():
    experts = [{"w": torch.ones(2)}] * 300
    assert overlap_average(experts)["w"].tolist() == [1, 1]
    assert consensus(experts, scale=1.0, lam=0.001, agree=299)["w"].tolist() == [300, 300]
