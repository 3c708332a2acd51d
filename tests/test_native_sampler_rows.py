"""Which rows NativeSampler decodes together: prompts read once, rows that leave, wait and join; what is announced."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules import NativeSampler, RoutedAdapter, TaskRouter
from lightning_modules.sampling import GenerateSampler, Sampling, batch, decoding

TEXTS = ["a", "hello there, you", "what is 2 + 2?", "zz", "the end is near", "0123456789" * 3]
GREEDY = Sampling(max_new_tokens=9, temperature=0.0)
HOT = Sampling(max_new_tokens=12, temperature=1.5)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return tokenizer(TEXTS)["input_ids"]


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def bound(sampler, model, tokenizer):
    sampler.bind(model, tokenizer)
    return sampler


def assert_same(got, expected, tolerance: float = 1e-4) -> None:
    assert (got.token_ids, got.finish, got.texts) == (expected.token_ids, expected.finish, expected.texts)
    for own, other in zip(got.logprobs, expected.logprobs, strict=True):
        assert own == pytest.approx(other, abs=tolerance)


@pytest.mark.parametrize(
    "options", [{"max_rows": n} for n in (1, 2, 5)] + [{"max_tokens": n} for n in (42, 100, 200)]
)
def test_what_a_row_draws_does_not_depend_on_batching(tiny, tokenizer, prompts, options):
    rows = [
        ids for ids in prompts for _ in range(3)
    ] + prompts  # the last ones are no neighbours of their kind
    seeds = range(len(rows))
    expected = bound(NativeSampler(), tiny, tokenizer).generate(rows, HOT, seeds=seeds)
    assert len({len(ids) for ids in expected.token_ids}) > 4  # so rows leave at different times
    got = bound(NativeSampler(**options), tiny, tokenizer).generate(rows, HOT, seeds=seeds)
    assert_same(got, expected)


class Watch:
    """Counts the rows and columns of each forward pass, and what is announced for it."""

    def __init__(self, model):
        self.rows: list[int] = []
        self.announced: list[list[int]] = []
        self.passes: list[tuple[list[int], int, int]] = []  # rows announced, columns of input, cached columns
        self.handle = model.register_forward_pre_hook(self.see, with_kwargs=True)

    def announce(self, rows):
        self.rows = list(rows)
        self.announced.append(self.rows)

    def see(self, _, __, options):
        assert len(options["input_ids"]) == len(self.rows)
        columns = options["input_ids"].shape[1]
        self.passes.append((self.rows, columns, options["past_key_values"].get_seq_length() + columns))


@pytest.fixture
def watch(tiny):
    watch = Watch(tiny)
    yield watch
    watch.handle.remove()


def test_prompts_are_read_once_and_ended_rows_leave(tiny, tokenizer, prompts, watch):
    rows = [ids for ids in prompts for _ in range(4)]
    got = bound(NativeSampler(), tiny, tokenizer).generate(rows, HOT, watch.announce, seeds=range(24))
    (first, columns, _), *rest = watch.passes
    assert sorted(map(tuple, (rows[row] for row in first))) == sorted(map(tuple, prompts))
    assert columns == 30
    assert all(columns == 1 for _, columns, _ in rest)  # nothing is read again
    assert len(rest) == max(map(len, got.token_ids)) - 1
    assert sorted(watch.announced[1]) == list(range(24))
    left = [len(announced) for announced in watch.announced[1:]]
    assert left == sorted(set(left), reverse=True)
    assert len(left) > 2
    # A row is in all passes up to its last token, and in few more: at most an eighth of a pass waits to leave.
    for row, ids in enumerate(got.token_ids):
        assert sum(row in announced for announced, *_ in rest) >= len(ids) - 1
    assert sum(len(announced) for announced, *_ in rest) <= sum(len(ids) - 1 for ids in got.token_ids) * 8 / 7


def test_waiting_rows_take_the_place_of_ended_ones(tiny, tokenizer, prompts, watch):
    rows = [ids for ids in prompts for _ in range(4)]
    budget = 4 * (30 + HOT.max_new_tokens)
    sampler = bound(NativeSampler(max_rows=6, max_tokens=budget), tiny, tokenizer)
    got = sampler.generate(rows, HOT, watch.announce, seeds=range(24))
    reads = [number for number, (_, columns, _) in enumerate(watch.passes) if columns > 1 or number == 0]
    assert len(reads) > 2
    decoded = [set(announced) for announced, columns, cached in watch.passes if columns < cached]
    joined = [after - before for before, after in pairwise(decoded) if before & after]
    assert any(joined)  # new rows beside rows that go on
    assert max(len(announced) for announced in decoded) <= 6
    assert all(len(announced) * cached <= budget for announced, _, cached in watch.passes)
    watch.handle.remove()
    alone = bound(NativeSampler(), tiny, tokenizer).generate(rows, HOT, seeds=range(24))
    assert_same(got, alone)


def test_the_budget_bounds_the_cache_in_a_long_queue(tiny, tokenizer, prompts, watch):
    rows = [ids for ids in prompts for _ in range(20)]
    budget = 200
    sampler = bound(NativeSampler(max_tokens=budget), tiny, tokenizer)
    sampler.generate(rows, HOT, watch.announce, seeds=range(len(rows)))
    assert max(len(announced) * cached for announced, _, cached in watch.passes) <= budget
    assert max(cached for *_, cached in watch.passes) <= 30 + HOT.max_new_tokens


def test_groups_keep_rows_of_equal_ids_apart(tiny, tokenizer, prompts, watch):
    rows = [prompts[1]] * 6
    sampler = bound(NativeSampler(), tiny, tokenizer)
    sampler.generate(rows, GREEDY, watch.announce)
    assert watch.announced[0] == [0]
    watch.announced.clear()
    sampler.generate(rows, GREEDY, watch.announce, groups=[5, 5, 5, 8, 8, 8])
    assert watch.announced[0] == [0, 3]


@pytest.mark.parametrize("at_once", [1, 40, 90])
def test_many_prompts_are_read_in_several_passes(tiny, tokenizer, prompts, watch, monkeypatch, at_once):
    rows = [ids for ids in prompts for _ in range(3)]
    expected = bound(NativeSampler(), tiny, tokenizer).generate(rows, HOT, watch.announce, seeds=range(18))
    watch.passes.clear()
    monkeypatch.setattr(decoding, "_PREFILL_CPU", at_once)
    got = bound(NativeSampler(), tiny, tokenizer).generate(rows, HOT, watch.announce, seeds=range(18))
    assert_same(got, expected)
    reads = [(leaders, columns) for leaders, columns, cached in watch.passes if columns == cached]
    assert len(reads) > 1
    assert sorted(map(tuple, (rows[row] for leaders, _ in reads for row in leaders))) == sorted(
        map(tuple, prompts)
    )
    assert all(len(leaders) * columns <= at_once or len(leaders) == 1 for leaders, columns in reads)
    decoded = [announced for announced, columns, cached in watch.passes if columns < cached]
    assert sorted(decoded[0]) == list(range(18))  # all together, once all are read


@pytest.mark.parametrize("whole", [True, False])
def test_what_a_cache_hands_out_is_as_long_as_it_says_and_empty_behind(whole):
    cache = batch.RowCache(whole)
    states = torch.randn(2, 3, 50, 4) + 5
    keys, values = cache.update(states[:, :, :10], -states[:, :, :10])
    assert keys.shape[2] == values.shape[2] == 10  # a prompt is attended to as it is
    for end in range(11, 51):
        if end == 30:
            cache.select(torch.tensor([1, 0]), 0)
            states = states[[1, 0]]
        promised = cache.columns(end)
        keys, values = cache.update(states[:, :, end - 1 : end], -states[:, :, end - 1 : end])
        assert keys.shape[2] == values.shape[2] == promised
        assert cache.get_seq_length() == end
        assert torch.equal(keys[:, :, :end], states[:, :, :end])
        assert torch.equal(values[:, :, :end], -states[:, :, :end])
        assert not keys[:, :, end:].any()
        assert not values[:, :, end:].any()
        assert keys.is_contiguous() or not whole


def test_a_cache_keeps_no_more_than_its_keys_and_values():
    cache = batch.RowCache()
    product = torch.randn(2, 5, 3, 8)  # queries, keys and values of some models come from one
    kept = cache.update(product[..., 2:4].transpose(1, 2), product[..., 4:6].transpose(1, 2))
    for one, states in zip(kept, (product[..., 2:4], product[..., 4:6]), strict=True):
        assert torch.equal(one, states.transpose(1, 2))
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size()


@pytest.mark.parametrize("options", [{}, {"max_rows": 5}, {"max_tokens": 130}])
def test_experts_answer_the_rows_of_their_tasks(tiny_model, tokenizer, prompts, options):
    """The same prompts for two tasks, whose experts say different things."""
    adapter = RoutedAdapter(TaskRouter(), experts=["one", "two"], rank=2)
    torch.manual_seed(4)
    model = adapter.attach(AutoModelForCausalLM.from_pretrained(tiny_model)).eval()
    with torch.no_grad():
        for parameter in adapter.expert_parameters():
            parameter.normal_(std=0.2)
    rows = [ids for ids in prompts for _ in range(4)]
    tasks = ["one", "one", "two", "two"] * len(prompts)

    def announce(drawn):
        adapter.route([tasks[row] for row in drawn], [""] * len(drawn))

    groups = [row // 2 for row in range(len(rows))]
    expected = bound(GenerateSampler(), model, tokenizer).generate(rows, HOT, announce, range(len(rows)))
    sampler = bound(NativeSampler(**options), model, tokenizer)
    # These experts amplify rounding: GenerateSampler with other `max_rows` differs from itself by 1.7e-4.
    assert_same(sampler.generate(rows, HOT, announce, range(len(rows)), groups), expected, 1e-3)
    greedy = sampler.generate(rows, GREEDY, announce, groups=groups).token_ids
    assert greedy[::4] == greedy[1::4]
    assert greedy[::4] != greedy[2::4]  # the experts make a difference
