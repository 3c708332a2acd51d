"""The base class: from rows to batches, and its error messages."""

import re

import pytest

from datamodules import TextDataModule


class Given(TextDataModule):
    def __init__(self, train, val=(), test=(), **kwargs):
        super().__init__(**kwargs)
        self.given = {"train": list(train), "val": list(val), "test": list(test)}

    def rows(self, split):
        return self.given[split]


def first_batch(rows, **kwargs):
    data = Given(rows, **{"batch_size": len(rows), "shuffle": False, **kwargs})
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def assert_refused(message, rows, **kwargs):
    with pytest.raises(ValueError, match=re.escape(message)):
        first_batch(rows, **kwargs)


def test_a_batch_holds_prompts_answers_and_all_raw_columns():
    batch = first_batch(
        [{"prompt": "a", "answer": 1, "extra": None}, {"prompt": "b", "answer": [2, 3], "late": True}]
    )
    assert batch.prompts == ["a", "b"]
    assert batch.answers == ["1", "2"]
    assert batch.tasks == ["default", "default"]
    assert batch.uids == [0, 1]
    assert batch.choices == [[], []]
    assert batch.columns == {
        "prompt": ["a", "b"],
        "answer": [1, [2, 3]],
        "extra": [None, None],
        "late": [None, True],
        "task": ["default", "default"],
    }


def test_columns_can_have_other_names():
    batch = first_batch(
        [{"q": "x", "gold": "y", "kind": 7, "options": ["y", 2]}, {"q": "x", "gold": "y", "kind": "k"}],
        prompt_column="q",
        answer_column="gold",
        task_column="kind",
        choices_column="options",
    )
    assert batch.tasks == ["7", "k"]
    assert batch.choices == [["y", "2"], []]
    assert batch.columns["answer"] == ["y", "y"]
    assert batch.columns["task"] == ["7", "k"]


def test_data_without_gold_answers_has_no_answer_column():
    batch = first_batch([{"prompt": "a"}], answer_column=None)
    assert batch.answers == [""]
    assert "answer" not in batch.columns


def test_the_template_reads_columns_and_leaves_braces_in_values_alone():
    batch = first_batch(
        [{"q": "f(x) = {x}", "hint": "{prompt}", "answer": "0"}],
        prompt_column="q",
        template="Q: {prompt} {{hint}}: {hint}",
    )
    assert batch.prompts == ["Q: f(x) = {x} {hint}: {prompt}"]


def test_a_system_prompt_or_conversational_makes_messages():
    rows = [{"prompt": "hi", "answer": ""}]
    user = {"role": "user", "content": "hi"}
    assert first_batch(rows, conversational=True).prompts == [[user]]
    assert first_batch(rows, system_prompt="Be brief.").prompts == [
        [{"role": "system", "content": "Be brief."}, user]
    ]


def test_message_prompts_keep_their_own_system_message():
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "hi", "name": "x"}]
    batch = first_batch([{"prompt": own, "answer": ""}], system_prompt="other")
    assert batch.prompts == [own]


def test_a_conversation_is_split_into_prompt_and_answer():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    batch = first_batch([{"messages": turns}], messages_column="messages")
    assert batch.prompts == [turns[:1]]
    assert batch.answers == batch.columns["answer"] == ["hello"]


@pytest.mark.parametrize(
    ("message", "row", "kwargs"),
    [
        (
            "there is no column 'prompt' (prompt_column); the columns are: q, answer",
            {"q": 1, "answer": 2},
            {},
        ),
        ("there is no column 'answer' (answer_column); the columns are: prompt", {"prompt": "a"}, {}),
        ("there is no column 'kind' (task_column)", {"prompt": "a", "answer": ""}, {"task_column": "kind"}),
        (
            "there is no column 'opts' (choices_column)",
            {"prompt": "a", "answer": ""},
            {"choices_column": "opts"},
        ),
        ("there is no column 'talk' (messages_column)", {"prompt": "a"}, {"messages_column": "talk"}),
        (
            "there is no column 'hint' (a field of template)",
            {"prompt": "a", "answer": ""},
            {"template": "{hint}"},
        ),
        (
            "field {hint}, but the row's value is null",
            {"prompt": "", "answer": "", "hint": None},
            {"template": "{hint}"},
        ),
        ("must hold a string or a list of messages, got int", {"prompt": 3, "answer": ""}, {}),
        ("'answer' (answer_column) holds no answer; answer_column=None", {"prompt": "a", "answer": None}, {}),
        ("'answer' (answer_column) holds no answer", {"prompt": "a", "answer": []}, {}),
        (
            "the choices must be a list, got str",
            {"prompt": "a", "answer": "", "o": "x"},
            {"choices_column": "o"},
        ),
        ("a conversation must be a non-empty list of messages, got []", {"prompt": [], "answer": ""}, {}),
        ("message 1 must be an object with role and content, got 'x'", {"prompt": ["x"], "answer": ""}, {}),
        ("message 1 needs a string 'role', got None", {"prompt": [{"content": "x"}], "answer": ""}, {}),
        ("message 1 needs a string 'content', got None", {"prompt": [{"role": "user"}], "answer": ""}, {}),
        (
            "applies to strings, but this prompt is a list",
            {"prompt": [{"role": "user", "content": ""}], "answer": ""},
            {"template": "{prompt}!"},
        ),
    ],
)
def test_a_bad_row_is_named(message, row, kwargs):
    assert_refused(message, [row], **kwargs)


def test_the_message_names_data_set_row_and_split():
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "a"}]
    assert_refused("Given, row 1 of the train split: there is no column 'answer'", rows)
    assert_refused("Given, row 0 of the train split: a row must be a mapping, got str", ["text"])


def test_no_training_rows():
    assert_refused("Given has no training rows", [], batch_size=1)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{prompt", "template='{prompt': "),
        ("{}", "the field {} is not a plain column name; write {{ and }} for literal braces"),
        ("{prompt.real}", "the field {prompt.real} is not a plain column name"),
        ('{"a": {prompt}}', "is not a plain column name"),
    ],
)
def test_malformed_templates(template, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Given([], template=template)


def test_splits_and_their_loaders():
    row = {"prompt": "a", "answer": "b"}
    data = Given([row] * 4, [row] * 3, batch_size=4, val_batch_size=2)
    data.setup()
    assert [batch.uids for batch in data.val_dataloader()] == [[0], [1, 2]]
    assert [batch.uids for batch in data.predict_dataloader()] == [[0], [1, 2]]
    with pytest.raises(ValueError, match="Given has no test rows; give it a test split, or use validate"):
        data.test_dataloader()
    data = Given([row] * 4, test=[row] * 2, batch_size=4)
    data.setup()
    assert data.val_dataloader() == []
    assert [batch.uids for batch in data.test_dataloader()] == [[0, 1]]
    assert [batch.uids for batch in data.predict_dataloader()] == [[0, 1]]
    data = Given([row])
    data.setup("predict")
    with pytest.raises(ValueError, match="Given has neither test nor validation rows to predict"):
        data.predict_dataloader()


def test_a_subclass_must_define_rows():
    with pytest.raises(NotImplementedError, match=r"TextDataModule must define rows\(split\)"):
        TextDataModule().setup("fit")
