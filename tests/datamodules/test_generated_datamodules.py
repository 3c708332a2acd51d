"""Generated data: sums, and the task families of reasoning_gym."""

import re
from itertools import chain

import pytest

from datamodules import ArithmeticDataModule, ReasoningGymDataModule

FAMILIES = {
    "chain_sum": {"min_terms": 2, "max_terms": 3},
    "spell_backward": {},
    "decimal_arithmetic": {"max_num_decimal_places": 4, "precision": 6},
    "countdown": {"min_numbers": 3, "max_numbers": 4},
}


def read(data, loader):
    return [
        {name: values[i] for name, values in batch.columns.items()}
        for batch in loader
        for i in range(len(batch))
    ]


def operands(rows):
    return {frozenset(map(int, re.findall(r"\d+", row["question"]))) for row in rows}


def test_sums_are_right_and_held_out_in_both_orders():
    data = ArithmeticDataModule(max_operand=9, train_size=200, val_size=15, test_size=10, batch_size=10)
    data.setup()
    train, val, test = (
        read(data, loader)
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    )
    assert [len(train), len(val), len(test)] == [200, 15, 10]
    for row in train + val + test:
        a, b = map(int, re.findall(r"\d+", row["question"]))
        assert row["question"] == f"What is {a} + {b}? Answer with just the number."
        assert row["answer"] == str(a + b)
        assert max(a, b) <= 9
    assert len(operands(val)) == 15
    assert len(operands(test)) == 10
    assert not operands(train) & operands(val)
    assert not (operands(train) | operands(val)) & operands(test)
    assert len(operands(train)) == 55 - 25


def test_sums_are_seeded():
    def questions(seed):
        return [row["question"] for row in ArithmeticDataModule(seed=seed).rows("train")]

    assert len(questions(0)) == 640
    assert questions(0) == questions(0) != questions(1)


def test_sums_need_pairs_to_train_on():
    message = "val_size=5 and test_size=1 leave nothing to train on: max_operand=2 gives 6 pairs"
    with pytest.raises(ValueError, match=message):
        ArithmeticDataModule(max_operand=2, val_size=5, test_size=1)


def gym(tasks, **kwargs):
    pytest.importorskip("reasoning_gym")
    data = ReasoningGymDataModule(tasks, batch_size=5, **kwargs)
    data.setup()
    return data


def test_gold_answers_score_one_and_splits_are_disjoint():
    data = gym(FAMILIES, train_size=80, val_size=40, test_size=20)
    import reasoning_gym

    splits = [
        read(data, loader)
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    ]
    assert [len(rows) for rows in splits] == [80, 40, 20]
    for row in list(chain.from_iterable(splits)):
        scorer = reasoning_gym.create_dataset(row["task"], **row["options"])
        assert scorer.score_answer(row["answer"], row["entry"]) == 1.0
        assert scorer.score_answer("no idea", row["entry"]) < 1.0
    train, val, test = ({row["question"] for row in rows} for rows in splits)
    assert len(val) == 40
    assert len(test) == 20
    assert not train & val
    assert not (train | val) & test


def test_families_are_mixed_by_weight_and_named_as_tasks():
    data = gym(["chain_sum", "spell_backward"], weights=[3, 1], train_size=40, val_size=4)
    tasks = [task for batch in data.train_dataloader() for task in batch.tasks]
    assert tasks.count("chain_sum") == 30
    assert tasks.count("spell_backward") == 10
    assert len({tuple(tasks[i : i + 5]) for i in range(0, 40, 5)}) > 1


def test_generated_rows_are_seeded_and_the_options_apply():
    def questions(seed):
        data = gym({"chain_sum": {"min_terms": 2, "max_terms": 2}}, train_size=20, val_size=5, seed=seed)
        return [row["metadata"]["num_terms"] for row in data.rows("train")], [
            r["question"] for r in data.rows("train")
        ]

    assert questions(0) == questions(0) != questions(1)
    assert set(questions(0)[0]) == {2}
    assert not set(questions(0)[1]) & set(questions(1)[1])


def test_a_small_family_trains_on_what_is_not_held_out():
    tiny = {"chain_sum": {"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1}}
    data = gym(tiny, train_size=50, val_size=4)
    train = {row["question"] for row in read(data, data.train_dataloader())}
    val = {row["question"] for row in read(data, data.val_dataloader())}
    assert len(val) == 4
    assert len(train) == 6
    assert not train & val
    with pytest.raises(
        ValueError, match="'chain_sum' has too few different questions: all that were found are held"
    ):
        gym(tiny, train_size=50, val_size=10)
    with pytest.raises(
        ValueError, match="11 are to be held out for validation and test, only 10 were found; lower"
    ):
        gym(tiny, train_size=50, val_size=11)


def test_a_family_without_a_gold_answer_has_an_empty_one():
    data = gym(["propositional_logic"], train_size=5, val_size=2)
    batch = next(iter(data.train_dataloader()))
    assert batch.answers == [""] * 5
    assert [entry["answer"] for entry in batch.columns["entry"]] == [None] * 5


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["chain_sun"], "reasoning_gym has no task family 'chain_sun'; did you mean: chain_sum"),
        (["composite"], "reasoning_gym has no task family 'composite'"),
        (
            {"chain_sum": {"terms": 2}},
            "'chain_sum' has no option 'terms'; its options are: min_terms, max",
        ),
        ({"chain_sum": {"seed": 2}}, "'chain_sum' has no option 'seed'"),
        (
            {"chain_sum": {"min_terms": 9}},
            "'chain_sum' refuses the options {'min_terms': 9}: max_terms must be >=",
        ),
        ({"chain_sum": {"min_terms": "a"}}, "'chain_sum' refuses the options {'min_terms': 'a'}: "),
        ([], "tasks is empty; name at least one family of reasoning_gym"),
    ],
)
def test_bad_tasks_and_options(tasks, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gym(tasks)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "weights=[1]: must be 2 numbers, not 1"),
        ([1, 0], "weights[1]=0: must be above 0"),
        ([1, float("nan")], "weights[1]=nan: must be a finite number above 0"),
        ([1, 2, 3], "weights=[1, 2, 3]: must be 2 numbers, not 3"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gym(["chain_sum", "spell_backward"], weights=weights)
