"""Which weights are chosen: exact budgets, against loops over units that sort by (-score, position)."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.sparse.masks import replace, select, select_across

STRUCTURES = ["element", "row", "column", "block"]
SHAPES = [(1, 1), (1, 9), (9, 1), (17, 33), (16, 16), (5, 7), (3, 100), (32, 48)]


def slow_units(shape, structure, block=16) -> list[list[int]]:
    """The flat positions of each unit, units in the order of position."""
    rows, columns = shape
    if structure == "element":
        return [[i] for i in range(rows * columns)]
    if structure == "row":
        return [[r * columns + c for c in range(columns)] for r in range(rows)]
    if structure == "column":
        return [[r * columns + c for r in range(rows)] for c in range(columns)]
    return [
        [
            r * columns + c
            for r in range(top, min(top + block, rows))
            for c in range(left, min(left + block, columns))
        ]
        for top in range(0, rows, block)
        for left in range(0, columns, block)
    ]


def slow_count(density, units) -> int:
    """floor(density x units) of the density as it is written, at least 1."""
    return max(1, math.floor(Fraction(str(density)) * units))


def slow_select(scores, density, structure, block=16) -> list[int]:
    units = slow_units(scores.shape, structure, block)
    flat = scores.flatten().tolist()
    order = sorted(range(len(units)), key=lambda u: (-sum(flat[i] for i in units[u]), u))
    return sorted(i for u in order[: slow_count(density, len(units))] for i in units[u])


def whole(*shape, seed=0, high=4) -> torch.Tensor:
    """Whole numbers, whose sums are exact in any order, with many ties and both signs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-high, high + 1, shape, generator=generator).float()


def check(scores, density, structure, block=16) -> None:
    chosen = select(scores, density, structure, block)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == slow_select(scores, density, structure, block)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_select_equals_the_loop(structure, shape):
    for density in (0.001, 0.05, 0.29, 0.5, 0.99, 1.0, 1):
        for block in (1, 2, 5, 16, 100):
            check(whole(*shape), density, structure, block)
            check(whole(*shape, high=10**5), density, structure, block)
        check(torch.zeros(shape), density, structure)
        check(-whole(*shape).abs() - 1, density, structure)


@pytest.mark.parametrize("structure", STRUCTURES)
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    permille=st.integers(1, 1000),
    block=st.integers(1, 13),
    high=st.sampled_from([0, 1, 3, 1000]),
    seed=st.integers(0, 10**6),
)
def test_select_equals_the_loop_whatever_the_shape(structure, shape, permille, block, high, seed):
    check(whole(*shape, seed=seed, high=high), permille / 1000, structure, block)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_exact_counts_where_products_of_floats_fall_short(structure):
    """0.29 x 100 is 28.999999999999996 in floating point."""
    scores = whole(100, 100)
    for density, expected in ((0.29, 29), (0.57, 57), (0.58, 58), (0.07, 7), (0.005, 1), (0.0199, 1)):
        units = {"element": 10_000, "row": 100, "column": 100, "block": 100}[structure]
        size = 10_000 // units
        expected = expected if units == 100 else round(density * 10_000)
        assert len(select(scores, density, structure, block=10)) == expected * size


def test_equal_scores_are_taken_in_the_order_of_position():
    assert select(torch.ones(4, 5), 0.25).tolist() == [0, 1, 2, 3, 4]
    assert select(torch.zeros(4, 5), 0.5, "row").tolist() == list(range(10))
    assert select(torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0]]), 0.5).tolist() == [1, 2, 3]


def test_infinite_scores_are_the_first_and_the_last():
    inf = math.inf
    scores = torch.tensor([[-inf, 3.0, inf], [1.0, -inf, 2.0]])
    assert select(scores, 1 / 6 + 0.01).tolist() == [2]
    assert select(scores, 4 / 6 + 0.01).tolist() == [1, 2, 3, 5]
    assert select(scores, 5 / 6 + 0.01).tolist() == [0, 1, 2, 3, 5]
    assert select(torch.full((2, 3), -inf), 0.5).tolist() == [0, 1, 2]
    rows = torch.tensor([[1.0, 1.0], [inf, 0.0], [-inf, 9.0]])
    assert select(rows, 0.34, "row").tolist() == [2, 3]
    assert select(rows, 0.67, "row").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("structure", ["row", "column", "block"])
def test_a_unit_with_both_infinities_has_no_score(structure):
    scores = torch.zeros(4, 4)
    scores[0, 0], scores[1, 1], scores[0, 1] = math.inf, math.inf, -math.inf
    with pytest.raises(ValueError, match="NaN"):
        select(scores, 0.5, structure, 2)
    with pytest.raises(ValueError, match=r"w: .*NaN"):
        select_across({"w": scores}, 0.5, structure, 2)


def test_edge_blocks_compete_with_the_sum_of_what_they_have():
    scores = torch.ones(5, 3)
    scores[4, 2] = 3.5  # a block of one element, against blocks of four, two and two ones
    assert select(scores, 0.17, "block", 2).tolist() == [0, 1, 3, 4]
    assert select(scores, 0.5, "block", 2).tolist() == [0, 1, 3, 4, 6, 7, 9, 10, 14]


def test_element_structure_takes_any_shape():
    assert select(torch.tensor([1.0, 3.0, 2.0]), 0.7).tolist() == [1, 2]
    assert select(torch.arange(24.0).view(2, 3, 4), 0.1).tolist() == [22, 23]
    assert select(torch.arange(4).bfloat16().view(2, 2), 0.5).tolist() == [2, 3]


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf])
def test_a_density_out_of_range_is_refused(density):
    for call in (lambda: select(torch.ones(2, 2), density), lambda: select_across({}, density)):
        with pytest.raises(ValueError, match=r"density=.*: must be (a finite number )?above 0 and at most 1"):
            call()


def test_bad_arguments_are_refused_with_a_message():
    ones = torch.ones(2, 2)
    with pytest.raises(ValueError, match="scores: 1 of 4 scores are NaN"):
        select(torch.tensor([[1.0, math.nan], [0.0, 2.0]]), 0.5)
    with pytest.raises(ValueError, match=r"layer\.weight: 4 of 4 scores are NaN"):
        select_across({"ok": ones, "layer.weight": ones * math.nan}, 0.5)
    with pytest.raises(ValueError, match="NaN"):
        replace(torch.tensor([0]), ones, ones * math.nan, 0.5)
    with pytest.raises(ValueError, match="structure='diagonal': must be element, row, column or block"):
        select(ones, 0.5, "diagonal")
    with pytest.raises(ValueError, match="block=0: must be at least 1"):
        select(ones, 0.5, "block", 0)
    for structure in ("row", "column", "block"):
        with pytest.raises(ValueError, match=r"needs a matrix, got scores of shape \(2, 2, 2\)"):
            select(torch.ones(2, 2, 2), 0.5, structure)
        with pytest.raises(ValueError, match=r"needs a matrix, got scores of shape \(4,\)"):
            select_across({"w": torch.ones(4)}, 0.5, structure)


# ---------------------------------------------------------------------- across weights


def slow_across(scores, density, structure, block) -> dict[str, list[int]]:
    """Units of all weights by their exact mean, first weight first; the first that is too large ends it."""
    units = [
        (sum(Fraction(one.flatten()[i].item()) for i in unit) / len(unit), name, unit)
        for name, one in scores.items()
        for unit in slow_units(one.shape, structure, block)
    ]
    order = sorted(range(len(units)), key=lambda u: (-units[u][0], u))
    limit = slow_count(density, sum(one.numel() for one in scores.values()))
    chosen: dict[str, list[int]] = {name: [] for name in scores}
    taken = 0
    for rank, u in enumerate(order):
        _, name, unit = units[u]
        if taken + len(unit) > limit and rank > 0:
            break
        chosen[name] += unit
        taken += len(unit)
    return {name: sorted(one) for name, one in chosen.items()}


@pytest.mark.parametrize("structure", STRUCTURES)
@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    permille=st.integers(1, 1000),
    block=st.integers(1, 5),
    high=st.sampled_from([0, 1, 5, 1000]),
    seed=st.integers(0, 10**6),
)
def test_select_across_equals_the_loop(structure, shapes, permille, block, high, seed):
    scores = {f"w{i}": whole(*shape, seed=seed + i, high=high) for i, shape in enumerate(shapes)}
    chosen = select_across(scores, permille / 1000, structure, block)
    assert list(chosen) == list(scores)
    assert all(one.dtype == torch.int64 for one in chosen.values())
    expected = slow_across(scores, permille / 1000, structure, block)
    assert {name: one.tolist() for name, one in chosen.items()} == expected


def test_across_weights_a_weight_may_get_nothing_and_elements_fill_the_budget():
    scores = {"small": torch.zeros(3, 3), "large": torch.ones(5, 5)}
    chosen = select_across(scores, 0.29)
    assert {name: len(one) for name, one in chosen.items()} == {"small": 0, "large": 9}  # floor(0.29 x 34)
    assert chosen["small"].dtype == torch.int64


def test_across_weights_a_long_row_has_no_advantage():
    scores = {"long": torch.ones(2, 50), "short": torch.full((2, 2), 1.5)}
    assert {n: len(i) for n, i in select_across(scores, 0.04, "row").items()} == {"long": 0, "short": 4}
    # Not even one row fits, but one is taken.
    assert {n: len(i) for n, i in select_across(scores, 0.001, "row").items()} == {"long": 0, "short": 2}


# ---------------------------------------------------------------------- replacing


def slow_replace(indices, magnitudes, scores, share, structure, block) -> list[int]:
    units = slow_units(scores.shape, structure, block)
    held = set(indices.tolist())
    present = [u for u, unit in enumerate(units) if held & set(unit)]
    others = [u for u in range(len(units)) if u not in present]
    count = min(math.floor(Fraction(str(share)) * len(present)), len(others))
    size, score = (
        [sum(one.flatten()[i].item() for i in unit) for unit in units] for one in (magnitudes, scores)
    )
    dropped = sorted(present, key=lambda u: (size[u], u))[:count]
    grown = sorted(others, key=lambda u: (-score[u], u))[:count]
    return sorted(i for u in (set(present) - set(dropped)) | set(grown) for i in units[u])


@pytest.mark.parametrize("structure", STRUCTURES)
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    permille=st.integers(1, 1000),
    percent=st.integers(0, 100),
    block=st.integers(1, 5),
    high=st.sampled_from([0, 1, 5, 1000]),
    seed=st.integers(0, 10**6),
)
def test_replace_equals_the_loop(structure, shape, permille, percent, block, high, seed):
    before = select(whole(*shape, seed=seed), permille / 1000, structure, block)
    magnitudes, scores = (
        whole(*shape, seed=seed + 1, high=high).abs(),
        whole(*shape, seed=seed + 2, high=high),
    )
    after = replace(before, magnitudes, scores, percent / 100, structure, block)
    assert after.dtype == torch.int64
    assert after.tolist() == slow_replace(before, magnitudes, scores, percent / 100, structure, block)

    units = slow_units(shape, structure, block)
    old, new = ({u for u, unit in enumerate(units) if set(unit) <= set(i.tolist())} for i in (before, after))
    assert len(new) == len(old)
    size = [sum(magnitudes.flatten()[i].item() for i in unit) for unit in units]
    if old - new and old & new:
        assert max(size[u] for u in old - new) <= min(size[u] for u in old & new)


def test_replace_takes_any_scores_and_never_what_was_present():
    inf = math.inf
    before = torch.tensor([0, 1, 2])
    magnitudes = torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0, 0.0]])
    for scores in ([[9.0, 9, 9, -inf, -inf, -inf]], [[-inf] * 6], [[inf] * 6], [[inf, inf, inf, -9, -9, -9]]):
        after = replace(before, magnitudes, torch.tensor(scores), 0.67)
        assert after.tolist() == [2, 3, 4]


def test_replace_stops_where_nothing_is_left_to_grow():
    scores = torch.arange(4.0).view(2, 2)
    assert replace(torch.tensor([0, 1, 2]), scores, scores, 1.0).tolist() == [1, 2, 3]
    assert replace(torch.arange(4), scores, scores, 1.0).tolist() == [0, 1, 2, 3]
    assert replace(torch.tensor([1, 2]), scores, scores, 0.49).tolist() == [1, 2]
    # int32 indices, as the adapter keeps them
    assert replace(torch.tensor([0, 2], dtype=torch.int32), scores, scores, 0.5).tolist() == [2, 3]
