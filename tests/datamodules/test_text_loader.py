"""The loaders: sharding, order, and a position that survives an interruption anywhere."""

import random
from itertools import chain, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.batches import TextBatch
from datamodules.loader import EvalLoader, TrainLoader
from datamodules.splits import held_out, permutation, quotas


def batch_of(indices):
    return TextBatch(["p"] * len(indices), [""] * len(indices), [], list(indices), {}, [])


def train_loader(num_rows, batch_size, rank=0, world_size=1, seed=0):
    return TrainLoader(
        batch_of,
        num_rows,
        batch_size,
        rank,
        world_size,
        order=lambda epoch: permutation(num_rows, seed, "epoch", epoch),
    )


def stream(loader):
    """All batches, pass after pass, as Lightning's epochs draw them."""
    while True:
        for batch in loader:
            yield batch.uids


def global_steps(num_rows, batch_size, world_size, num_steps, state=None, seed=0):
    """The rows of each step over all ranks, and the state after the last step."""
    per_rank = []
    loaders = [train_loader(num_rows, batch_size, rank, world_size, seed) for rank in range(world_size)]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
        per_rank.append(list(islice(stream(loader), num_steps)))
    states = [loader.state_dict() for loader in loaders]
    assert all(other == states[0] for other in states)
    return [list(chain.from_iterable(parts)) for parts in zip(*per_rank, strict=True)], states[0]


sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 17)).map(
    lambda t: (t[0], t[1], t[0] * t[1] + t[2])
)


@given(sizes, st.integers(0, 20), st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_interrupted_anywhere_and_resumed_equals_uninterrupted(size, before, after):
    world_size, batch_size, num_rows = size
    straight, _ = global_steps(num_rows, batch_size, world_size, before + after)
    first, state = global_steps(num_rows, batch_size, world_size, before)
    second, _ = global_steps(num_rows, batch_size, world_size, after, state)
    assert first + second == straight


@given(sizes, st.integers(1, 3), st.integers(1, 4), st.data())
@settings(max_examples=150, deadline=None)
def test_another_world_size_sees_exactly_the_remaining_rows(size, new_world_size, new_batch_size, data):
    world_size, batch_size, num_rows = size
    num_rows = max(num_rows, new_world_size * new_batch_size)
    steps_per_epoch = -(-num_rows // (world_size * batch_size))
    before = data.draw(st.integers(0, steps_per_epoch - 1))
    seen, state = global_steps(num_rows, batch_size, world_size, before)
    remaining = num_rows - before * world_size * batch_size
    steps = -(-remaining // (new_world_size * new_batch_size))
    rest, state = global_steps(num_rows, new_batch_size, new_world_size, steps, state)
    order = permutation(num_rows, 0, "epoch", 0).tolist()
    assert list(chain.from_iterable(seen)) + list(chain.from_iterable(rest))[:remaining] == order
    assert state["epoch"] == 1
    assert state["position"] == 0
    following, _ = global_steps(num_rows, new_batch_size, new_world_size, 1, state)
    assert following[0] == permutation(num_rows, 0, "epoch", 1).tolist()[: len(following[0])]


@given(sizes)
@settings(max_examples=50, deadline=None)
def test_an_epoch_drops_nothing_and_fills_up_with_its_first_rows(size):
    world_size, batch_size, num_rows = size
    num_steps = len(train_loader(num_rows, batch_size, 0, world_size))
    steps, _ = global_steps(num_rows, batch_size, world_size, num_steps)
    order = permutation(num_rows, 0, "epoch", 0).tolist()
    seen = list(chain.from_iterable(steps))
    assert seen == order + order[: len(seen) - num_rows]
    assert len(seen) - num_rows < world_size * batch_size
    assert all(len(set(step)) == len(step) for step in steps)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_evaluation_sees_each_row_once_in_equally_many_batches(num_rows, batch_size, world_size):
    loaders = [EvalLoader(batch_of, num_rows, batch_size, rank, world_size) for rank in range(world_size)]
    batches = [[batch.uids for batch in loader] for loader in loaders]
    assert sorted(uid for rank in batches for batch in rank for uid in batch) == list(range(num_rows))
    assert [len(rank) for rank in batches] == [len(loader) for loader in loaders]
    assert all(1 <= len(batch) <= batch_size for rank in batches for batch in rank)
    if num_rows >= world_size and batch_size > 1:
        assert len({len(rank) for rank in batches}) == 1


def test_evaluation_starts_over_at_every_iter():
    loader = EvalLoader(batch_of, 5, 2)
    assert next(iter(loader)).uids == next(iter(loader)).uids == [0]
    assert [batch.uids for batch in loader] == [[0], [1, 2], [3, 4]]


def test_fewer_rows_than_ranks_leave_a_rank_without_batches():
    assert [len(EvalLoader(batch_of, 2, 4, rank, 3)) for rank in range(3)] == [1, 1, 0]


def test_order_depends_on_seed_and_epoch_and_spares_the_global_rng():
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    epochs = [
        global_steps(20, 5, 1, 4, {"epoch": e, "position": 0, "num_rows": 20}, s)[0]
        for s, e in [(0, 0), (0, 1), (1, 0)]
    ]
    assert epochs[0] != epochs[1]
    assert epochs[0] != epochs[2]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_creating_an_iterator_consumes_nothing():
    loader = train_loader(6, 2)
    iter(loader)
    assert loader.state_dict() == {"epoch": 0, "position": 0, "num_rows": 6}


def test_a_state_of_other_data_is_refused():
    with pytest.raises(ValueError, match="made with 10 training rows an epoch, this run has 12; resume with"):
        train_loader(12, 2).load_state_dict(train_loader(10, 2).state_dict())


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(
        ValueError,
        match=r"batch_size=4 on 3 rank\(s\) takes 12 rows a step, but an epoch has only 10: "
        "lower batch_size to at most 3, use fewer ranks, or add data",
    ):
        train_loader(10, 4, world_size=3)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        EvalLoader(batch_of, 10, 0)


@given(st.integers(2, 60), st.floats(0.01, 0.6) | st.integers(0, 1), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_held_out_rows_are_disjoint_complete_and_seeded(num_rows, val_size, seed):
    train, val = held_out(num_rows, val_size, seed, "data")
    assert sorted(train + val) == list(range(num_rows))
    assert train
    assert len(val) == (max(1, round(val_size * num_rows)) if isinstance(val_size, float) else val_size)
    assert held_out(num_rows, val_size, seed, "data") == (train, val)


def test_held_out_depends_on_the_seed():
    assert held_out(100, 10, 0, "data") != held_out(100, 10, 1, "data")


@pytest.mark.parametrize("val_size", [-1, -0.1, 1.0, 2.5])
def test_an_impossible_val_size_is_refused(val_size):
    with pytest.raises(ValueError, match=f"val_size={val_size!r}: must be .*Write 0.1 for a tenth"):
        held_out(10, val_size, 0, "data")


def test_holding_out_everything_is_refused():
    with pytest.raises(ValueError, match="val_size=10 holds out 10 of the 10 rows of data and leaves none"):
        held_out(10, 10, 0, "data")


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 500))
@settings(max_examples=100, deadline=None)
def test_quotas_sum_up_and_stay_within_one_of_the_exact_share(weights, total):
    counts = quotas(weights, total)
    assert sum(counts) == total
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1 + 1e-6
