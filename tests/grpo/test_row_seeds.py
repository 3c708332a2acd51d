"""Seeds of completions name run, step, row and number, and nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.grpo.rollout import row_seeds


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=8, unique=True), st.integers(1, 4))
def test_seeds_are_distinct_and_do_not_depend_on_the_batch(uids, num_generations):
    seeds = row_seeds(1, 2, uids, num_generations)
    assert len(set(seeds)) == len(seeds) == len(uids) * num_generations
    assert all(0 <= seed < 2**63 for seed in seeds)
    alone = [seed for uid in uids for seed in row_seeds(1, 2, [uid], num_generations)]
    assert seeds == alone


def test_seeds_differ_by_run_step_and_repetition():
    first = row_seeds(1, 2, [7], 2)
    assert not set(first) & set(row_seeds(2, 2, [7], 2))
    assert not set(first) & set(row_seeds(1, 3, [7], 2))
    twice = row_seeds(1, 2, [7, 7], 2)
    assert twice[:2] == first
    assert len(set(twice)) == 4


def test_a_row_that_comes_twice_is_drawn_alike_on_one_rank_and_on_two():
    assert row_seeds(1, 2, [5, 5, 6], 2) == row_seeds(1, 2, [5], 2) + row_seeds(1, 2, [5, 6], 2, before=[5])
