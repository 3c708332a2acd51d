"""From values of a row to text: what is read, and what is refused because it has no one spelling."""

import datetime
import decimal
import json
import re

import numpy as np
import pytest
import torch

from datamodules import HubDataModule, JsonlDataModule, MultiTaskDataModule, TextDataModule
from datamodules.rows import RowFormat

USER = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "Green."}
CALL = {"function": {"name": "clock", "arguments": {"zone": "UTC"}}}


def parse(row, **columns):
    return RowFormat(**columns).parse({"prompt": "p", "answer": "a", **row})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("4", "4"),
        (4, "4"),
        (-2.5, "-2.5"),
        (10**400, str(10**400)),
        (decimal.Decimal("1.50"), "1.50"),
        (np.int64(7), "7"),
        (np.float32(0.1), "0.1"),
        (np.str_("n"), "n"),
        (np.array(["x", "y"]), "x"),
        (np.array(3), "3"),
        (torch.tensor(5), "5"),
        (["Ada", "Lovelace"], "Ada"),
        ((1, 2), "1"),
        ([SAID], "Green."),
        (SAID, "Green."),
        ({**SAID, "name": None, "tool_calls": []}, "Green."),
    ],
)
def test_an_answer_is_text_or_a_number_or_one_message(value, text):
    answer = parse({"answer": value}).answer
    assert (answer, type(answer)) == (text, str)


NO_TEXT = [
    (True, "bool (True), which is no text: write it as text"),
    (np.bool_(False), "(np.False_), which is no text"),
    (float("nan"), "nan, which is no text: mend or drop the row"),
    (float("inf"), "inf, which is no text"),
    (np.float64("nan"), "nan, which is no text"),
    (b"4", "bytes (b'4'), which is no text"),
    (datetime.date(2020, 1, 2), "date (datetime.date(2020, 1, 2)), which is no text"),
    (
        {"text": "4", "start": 3},
        "struct ({'text': '4', 'start': 3}), which is no text: name one of its fields by a path",
    ),
]


@pytest.mark.parametrize(("value", "message"), NO_TEXT)
@pytest.mark.parametrize("place", ["answer", "list of answers", "task", "choices", "template"])
def test_what_has_no_one_spelling_is_refused_everywhere(place, value, message):
    row, columns, name = {
        "answer": ({"answer": value}, {}, "'answer' (answer_column)"),
        "list of answers": ({"answer": ["4", value]}, {}, "'answer' (answer_column)"),
        "task": ({"kind": value}, {"task_column": "kind"}, "'kind' (task_column)"),
        "choices": ({"options": ["a", value]}, {"choices_column": "options"}, "'options' (choices_column)"),
        "template": ({"hint": value}, {"template": "{hint}"}, "'hint' (a field of template)"),
    }[place]
    with pytest.raises(ValueError, match=re.escape(f"column {name} holds ") + ".*" + re.escape(message)):
        parse(row, **columns)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"answer": [["a", "b"]]}, {}, "holds list (['a', 'b']), which is no text"),
        ({"answer": json.loads("[" * 900 + "]" * 900)}, {}, "holds list"),
        ({"answer": [None]}, {}, "holds null, which is no text"),
        ({"answer": [USER, SAID]}, {}, "holds 2 messages, but an answer is one"),
        ({"answer": [USER]}, {}, "holds a message of role 'user', not the assistant's"),
        (
            {"answer": {**SAID, "tool_calls": "clock"}},
            {},
            "message 1: 'tool_calls' must be a list of objects",
        ),
        ({"answer": {**SAID, "content": ""}}, {}, "the assistant's message, which is the answer, is empty"),
        ({"kind": None}, {"task_column": "kind"}, "column 'kind' (task_column) holds null, which is no text"),
        ({"o": ["a", None]}, {"choices_column": "o"}, "column 'o' (choices_column) holds null"),
        ({"o": {"text": ["a"]}}, {"choices_column": "o"}, "the choices must be a list, got struct"),
        (
            {"o": ["x", "y"], "answer": 1},
            {"choices_column": "o"},
            "does not hold the answer '1': write the answer as",
        ),
        (
            {"prompt": {"text": "p"}},
            {},
            "must hold a string or a list of messages, got struct ({'text': 'p'})",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            {},
            "message 1 needs a string 'content'",
        ),
        (
            {"talk": [USER, SAID, SAID]},
            {"messages_column": "talk"},
            "messages 2 and 3 are both the assistant's",
        ),
        (
            {"talk": [USER, {**SAID, "content": " "}]},
            {"messages_column": "talk"},
            "which is the answer, is empty",
        ),
        (
            {"tools": "hammer"},
            {},
            "column 'tools' (tools_column) must hold a list of tool schemas, got str ('hammer')",
        ),
        ({"tools": ["hammer"]}, {}, "set tools_column: null if it is about something else"),
        (
            {"prompt": [{**USER, "tools": [{"name": "a"}]}], "tools": [{"name": "b"}]},
            {},
            "the first message carries other tools than the row",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(row, columns, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(row, **columns)


def test_a_tools_column_of_another_name_must_be_there():
    row = {"prompt": "p", "answer": "a"}
    with pytest.raises(ValueError, match=r"there is no column 'functions' \(tools_column\)"):
        first_batch(Given([row], tools_column="functions"))
    assert first_batch(Given([{**row, "functions": [CALL]}, row], tools_column="functions")).prompts[1] == "p"


def test_a_path_reads_into_a_struct():
    row = {
        "deep": {"ask": {"text": "2+2?"}, "gold": {"text": ["4"], "start": [0]}, "kind": "sum", "n": 0.25},
        "options.all": ["4", "5"],
    }
    parsed = parse(
        row,
        prompt_column="deep.ask.text",
        answer_column="deep.gold.text",
        task_column="deep.kind",
        choices_column="options.all",
        template="{prompt} ({deep.kind}, {deep.n:.1f})",
    )
    assert parsed == ("2+2? (sum, 0.2)", "4", "sum", ["4", "5"])
    talk = {"deep": {"talk": [USER, SAID], "tools": json.dumps([CALL])}}
    parsed = parse(talk, messages_column="deep.talk", tools_column="deep.tools")
    assert parsed[:2] == ([{**USER, "tools": [CALL]}], "Green.")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("deep.gold", "there is no 'deep.gold' (answer_column): 'deep' has ask, kind"),
        ("deep.kind.x", "there is no 'deep.kind.x' (answer_column): 'deep.kind' holds str ('sum')"),
        ("other.x", "there is no column 'other.x' (answer_column); the columns are: prompt, answer, deep"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(path, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse({"deep": {"ask": "x", "kind": "sum"}}, answer_column=path)


class Given(TextDataModule):
    def __init__(self, rows, **kwargs):
        super().__init__(batch_size=len(rows), shuffle=False, **kwargs)
        self.given = rows

    def rows(self, split):
        return self.given if split == "train" else []


def first_batch(data):
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def test_rewards_get_the_text_of_an_answer_that_is_a_message():
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    reasoned = {**SAID, "reasoning_content": "grass"}
    batch = first_batch(Given([{"prompt": "p", "answer": [one]} for one in (SAID, called, reasoned)]))
    assert batch.answers == ["Green.", called, reasoned]
    assert batch.columns["answer"] == ["Green.", called, "Green."]
    batch = first_batch(Given([{"prompt": "p", "answer": ["4", "four"]}]))
    assert batch.columns["answer"] == [["4", "four"]]  # all golds, for rewards that take several


def test_tools_make_a_conversation():
    rows = [{"prompt": "p", "answer": "a", "tools": [CALL]}, {"prompt": "p", "answer": "a", "tools": []}]
    assert first_batch(Given(rows)).prompts == [[{"role": "user", "content": "p", "tools": [CALL]}], "p"]
    assert first_batch(Given(rows, tools_column=None)).prompts == ["p", "p"]
    prompts = first_batch(Given(rows[:1], system_prompt="s")).prompts
    assert prompts == [
        [{"role": "system", "content": "s", "tools": [CALL]}, {"role": "user", "content": "p"}]
    ]


def test_a_bad_value_is_named_with_file_and_line(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n\n{"prompt": "a", "answer": NaN}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl:3: column 'answer' \(answer_column\) holds nan"):
        JsonlDataModule(str(file)).setup("fit")


def test_a_paraphrase_must_be_text(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "sum.jsonl").write_text('{"input": "1 2", "output": 3}\n')
    (tmp_path / "instructions.json").write_text('{"sum": ["Add.", {"text": "Sum."}]}')
    with pytest.raises(ValueError, match=r"instructions\.json': the task 'sum' holds struct"):
        MultiTaskDataModule(str(tmp_path), instructions=str(tmp_path / "instructions.json")).setup("fit")


def parquet(folder, rows):
    datasets = pytest.importorskip("datasets")
    file = str(folder / "rows.parquet")
    datasets.Dataset.from_list(rows).to_parquet(file)
    return file


def test_arrow_does_not_give_a_tool_call_the_arguments_of_others(tmp_path):
    """Arrow stores one struct for all calls, with null where a call has no such argument."""
    calls = [
        {"function": {"name": "clock", "arguments": {"zone": "UTC"}}},
        {"function": {"name": "sum", "arguments": {"a": 1}}},
    ]
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]} for call in calls
    ]
    batch = first_batch(
        HubDataModule(parquet(tmp_path, rows), messages_column="messages", batch_size=2, shuffle=False)
    )
    assert [answer["tool_calls"] for answer in batch.answers] == [[call] for call in calls]
    assert batch.prompts == [[USER]] * 2


def test_the_first_row_of_arrow_is_read_before_training(tmp_path):
    file = parquet(tmp_path, [{"prompt": "p", "answer": {"text": "a"}}])
    with pytest.raises(
        ValueError, match=r"rows\.parquet, row 0 of the train split: column 'answer'.*ends in \.text"
    ):
        HubDataModule(file).setup("fit")
    data = HubDataModule(file, answer_column="answer.text", batch_size=1)
    assert first_batch(data).answers == ["a"]
