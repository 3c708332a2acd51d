from __future__ import annotations

import itertools
import math
import random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_modules.grpo.evaluation import (
    Interval,
    PromptRecord,
    majority_at_k,
    mean_interval,
    paired_gain,
    pass_at_k,
    success_at_k,
    summarise,
)

binary = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=40)
shares = st.lists(st.integers(0, 8).map(lambda n: n / 8), min_size=1, max_size=40)


@pytest.mark.parametrize(("correct", "samples"), [(0, 5), (1, 5), (3, 5), (5, 5), (2, 7)])
def test_pass_at_k_counts_all_subsets(correct, samples):
    answers = [True] * correct + [False] * (samples - correct)
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(answers, k))
        assert pass_at_k(correct, samples, k) == pytest.approx(
            sum(map(any, subsets)) / len(subsets), abs=1e-12
        )


def test_pass_at_k_is_stable_and_exact_at_the_ends():
    assert pass_at_k(0, 10_000, 100) == 0.0
    assert pass_at_k(10_000, 10_000, 1) == 1.0
    assert pass_at_k(9_901, 10_000, 100) == 1.0
    expected = 1 - math.comb(9_000, 100) / math.comb(10_000, 100)
    assert pass_at_k(1_000, 10_000, 100) == pytest.approx(expected, rel=1e-10)
    assert pass_at_k(3, 8, 1) == pytest.approx(3 / 8)


def test_pass_at_k_errors():
    with pytest.raises(ValueError, match="num_correct=5 must lie between 0 and num_samples=4"):
        pass_at_k(5, 4, 1)
    with pytest.raises(ValueError, match="num_correct=-1"):
        pass_at_k(-1, 4, 1)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k={k} must lie between 1 and num_samples=4: sample more"):
            pass_at_k(1, 4, k)


def vote(answers, success):
    """Majority by lists: the mean over the winning answers of the mean success of each."""
    named = [answer for answer in answers if answer is not None] or [None]
    most = max(named.count(answer) for answer in named)
    winners = {answer for answer in named if named.count(answer) == most}
    return fmean(fmean(s for a, s in zip(answers, success, strict=True) if a == winner) for winner in winners)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_majority_of_every_small_case(k):
    for answers in itertools.product([None, "a", "b", "c"], repeat=k):
        for success in itertools.product([0.0, 1.0], repeat=k):
            assert majority_at_k(answers, success) == pytest.approx(vote(answers, success), abs=1e-12)


def test_majority_by_hand():
    assert majority_at_k([7, 7, 8], [1.0, 1.0, 0.0]) == 1
    assert majority_at_k([7, 8, 8], [1.0, 0.0, 0.0]) == 0
    assert majority_at_k([7, 7, 8, 8, 9], [1.0, 1.0, 0.0, 0.0, 0.0]) == 0.5
    assert majority_at_k([None, None, None, 7], [0.0, 0.0, 0.0, 1.0]) == 1
    assert majority_at_k([None, None], [0.0, 1.0]) == 0.5
    assert majority_at_k([0, 0, 1], [1.0, 1.0, 0.0]) == 1  # zero is an answer like any other


votes = st.lists(st.tuples(st.sampled_from([None, 0, 1, 2]), st.sampled_from([0.0, 1.0])), min_size=1)


@given(pairs=votes, seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_majority_asks_neither_for_order_nor_for_names(pairs, seed):
    answers, success = zip(*pairs, strict=True)
    value = majority_at_k(answers, success)
    assert min(success) <= value <= max(success)
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    assert majority_at_k(*zip(*shuffled, strict=True)) == value
    assert majority_at_k([None if a is None else ("name", -a) for a in answers], success) == value
    more = [*answers, *[9] * (len(answers) + 1)]
    assert majority_at_k(more, [*success, *[1.0] * (len(answers) + 1)]) == 1


def test_majority_errors():
    with pytest.raises(ValueError, match="answers has 1 values and success 2: give one each"):
        majority_at_k(["a"], [1.0, 0.0])
    with pytest.raises(ValueError, match="and at least one"):
        majority_at_k([], [])
    with pytest.raises(ValueError, match=r"success\[1\]=nan is not finite: leave out prompts"):
        majority_at_k(["a", "b"], [1.0, math.nan])
    with pytest.raises(ValueError, match=r"answers=\[\['a'\]\] must be hashable"):
        majority_at_k([["a"]], [1.0])


@pytest.mark.parametrize("k", range(1, 8))
def test_success_at_k_of_every_outcome(k):
    """Each pass@j is the share of j-subsets with a success."""
    answers = [row % 3 for row in range(k)]
    for success in itertools.product([0.0, 1.0], repeat=k):
        expected = {f"mean@{k}": fmean(success)}
        for j in [j for j in (2, 4, k) if 1 < j <= k]:
            subsets = list(itertools.combinations(success, j))
            expected[f"pass@{j}"] = sum(map(max, subsets)) / len(subsets)
        if k > 1:
            expected[f"maj@{k}"] = vote(answers, success)
        assert success_at_k(success, answers) == pytest.approx(expected, abs=1e-12)


def test_success_that_does_not_apply():
    assert success_at_k([math.nan] * 4, ["a"] * 4) == {}
    assert success_at_k([1.0, math.nan, 0.0, 0.0], ["a"] * 4) == {"mean@4": pytest.approx(1 / 3)}


records = st.lists(
    st.builds(
        PromptRecord,
        st.sampled_from(["sums", "a/b", "a_b"]),
        st.dictionaries(st.sampled_from(["reward", "mean@2"]), st.integers(0, 4).map(lambda n: n / 4)),
    ),
    max_size=12,
)


@given(rows=records, seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_summary_is_the_mean_of_each_metric_and_task(rows, seed):
    labels = {"sums": "sums/", "a_b": "a_b/", "a/b": "a_b_/" if "a_b" in [r.task for r in rows] else "a_b/"}
    tasks = {row.task for row in rows}
    expected = {}
    for name in ("reward", "mean@2"):
        for task in [None, *(tasks if len(tasks) > 1 else ())]:
            values = [row.values[name] for row in rows if name in row.values and task in (None, row.task)]
            if values:
                full = labels.get(task, "") + name
                expected[full] = sum(values) / len(values)
                if name == "mean@2":
                    _, expected[f"{full}/low"], expected[f"{full}/high"] = mean_interval(values)
    assert summarise(rows, ["mean@2"]) == pytest.approx(expected, abs=1e-12)
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert summarise(shuffled, ["mean@2"]) == summarise(rows, ["mean@2"])


@given(values=binary, confidence=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
@settings(max_examples=60, deadline=None)
def test_binary_means_get_wilsons_interval(values, confidence):
    ours = mean_interval(values, confidence)
    scipys = stats.binomtest(int(sum(values)), len(values)).proportion_ci(confidence, method="wilson")
    assert ours.mean == fmean(values)
    assert (ours.low, ours.high) == pytest.approx((scipys.low, scipys.high), abs=1e-12)
    assert 0 <= ours.low <= ours.mean <= ours.high <= 1
    assert ours.low < ours.high


@pytest.mark.parametrize("count", [2, 3, 4, 5, 12, 101, 1001])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_other_means_get_students_interval(count, confidence):
    generator = random.Random(count)
    values = [generator.gauss(2, 3) for _ in range(count)]
    ours = mean_interval(values, confidence)
    expected = stats.t.interval(confidence, count - 1, loc=fmean(values), scale=stats.sem(values))
    assert (ours.low, ours.high) == pytest.approx(expected, rel=1e-8)


def test_many_prompts_use_the_normal_quantile():
    values = [row % 3 / 2 for row in range(1500)]
    ours = mean_interval(values)
    expected = stats.t.interval(0.95, 1499, loc=fmean(values), scale=stats.sem(values))
    assert (ours.low, ours.high) == pytest.approx(expected, rel=1e-3)


def test_students_interval_is_not_cut_off():
    assert mean_interval([1.0, 0.5]).high > 1


def test_equal_values_do_not_claim_certainty():
    low, high = mean_interval([0.5] * 20)[1:]
    assert (low, high) == pytest.approx(stats.binomtest(10, 20).proportion_ci(method="wilson"), abs=1e-12)
    assert mean_interval([0.1 + 0.2, 0.3]) != mean_interval([0.3])
    assert mean_interval([0.5]).low < 0.5 < mean_interval([0.5]).high
    assert mean_interval([-2.0, -2.0]) == Interval(-2.0, -math.inf, math.inf)


def test_paired_gain_reproduces_newcombe():
    """Newcombe 1998, table II, method 10: pairs 36, 12, 2, 0 give 0.0569 to 0.3404."""
    before = [1] * 36 + [0] * 12 + [1] * 2
    after = [1] * 36 + [1] * 12 + [0] * 2
    gain = paired_gain(before, after)
    assert gain == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    loss = paired_gain(after, before)
    assert loss == pytest.approx((-gain.mean, -gain.high, -gain.low))


def test_paired_gain_of_shares_is_students():
    generator = random.Random(0)
    before = [generator.random() for _ in range(30)]
    after = [value + generator.gauss(0.1, 0.2) for value in before]
    expected = stats.ttest_rel(after, before).confidence_interval(0.9)
    assert paired_gain(before, after, 0.9)[1:] == pytest.approx((expected.low, expected.high), rel=1e-8)


@given(pairs=st.one_of(st.tuples(binary, binary), st.tuples(shares, shares)))
@settings(max_examples=100, deadline=None)
def test_paired_gain_contains_the_gain_and_has_width(pairs):
    count = min(map(len, pairs))
    before, after = (values[:count] for values in pairs)
    gain = paired_gain(before, after)
    assert gain.mean == pytest.approx(fmean(after) - fmean(before), abs=1e-12)
    assert gain.low <= gain.mean <= gain.high
    assert gain.low < gain.high


def test_no_change_is_not_certainty_and_more_prompts_narrow_it():
    for value in (0.0, 0.5, 1.0):
        few, many = (paired_gain([value] * n, [value] * n) for n in (10, 1000))
        assert few.low < many.low < 0 < many.high < few.high
    everywhere = paired_gain([0.25] * 50, [0.75] * 50)
    assert everywhere.low < 0.5 < everywhere.high


def test_intervals_cover_the_truth():
    generator = random.Random(1)
    hits = 0
    for _ in range(400):
        skill = [generator.betavariate(2, 2) for _ in range(60)]
        before = [float(generator.random() < p * 0.8) for p in skill]
        after = [float(generator.random() < p) for p in skill]
        gain = paired_gain(before, after)
        hits += gain.low <= 0.1 <= gain.high
    assert 0.92 <= hits / 400 <= 0.99


def test_interval_errors():
    with pytest.raises(
        ValueError, match="before has 1 values and after 2: a paired gain needs the same prompts"
    ):
        paired_gain([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="values is empty: an interval needs at least one prompt"):
        mean_interval([])
    with pytest.raises(ValueError, match=r"values\[1\]=nan is not finite: leave out prompts"):
        mean_interval([1.0, math.nan])
    with pytest.raises(ValueError, match="confidence=95 must lie between 0 and 1"):
        mean_interval([1.0], confidence=95)
