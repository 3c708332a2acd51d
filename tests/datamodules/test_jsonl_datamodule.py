"""JSONL files: what is read, and that every mistake is reported with file and line."""

import json
import re

import pytest

from datamodules import JsonlDataModule


def write(path, *lines):
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )
    return str(path)


def row(number):
    return {"prompt": f"q{number}", "answer": str(number)}


def prompts(loader):
    return [prompt for batch in loader for prompt in batch.prompts]


def test_blank_lines_marks_and_unicode_separators(tmp_path):
    text = json.dumps({"prompt": "a\u2028b", "answer": "ü"}, ensure_ascii=False).encode()
    file = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + text, b"", b"  ", text + b"\r")
    data = JsonlDataModule(file, batch_size=2)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.prompts == ["a\u2028b"] * 2
    assert batch.answers == ["ü"] * 2


def test_three_files(tmp_path):
    files = [write(tmp_path / f"{n}.jsonl", row(n), row(n + 10)) for n in range(3)]
    data = JsonlDataModule(*files, batch_size=2)
    data.setup()
    assert sorted(prompts(data.train_dataloader())) == ["q0", "q10"]
    assert prompts(data.val_dataloader()) == ["q1", "q11"]
    assert prompts(data.test_dataloader()) == ["q2", "q12"]


@pytest.mark.parametrize(("val_size", "num_val"), [(3, 3), (0.2, 2)])
def test_held_out_rows(tmp_path, val_size, num_val):
    file = write(tmp_path / "a.jsonl", *(row(n) for n in range(10)))
    drawn = []
    for seed in (0, 0, 1):
        data = JsonlDataModule(file, val_size=val_size, batch_size=1, seed=seed)
        data.setup("fit")
        val, train = prompts(data.val_dataloader()), prompts(data.train_dataloader())
        assert len(val) == num_val
        assert sorted(train + val) == sorted(row(n)["prompt"] for n in range(10))
        drawn.append(val)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b"{nonsense",
            ":3: not JSON: Expecting property name enclosed in double quotes at column 2: '{nonsense'",
        ),
        (b"[1]", ":3: a line must be a JSON object, got list: '[1]'"),
        (b'{"prompt": "\xff"}', ":3: not UTF-8 (byte 13: invalid start byte)"),
        ({"prompt": "x"}, ":3: there is no column 'answer' (answer_column); the columns are: prompt"),
        ({}, ":3: there is no column 'prompt' (prompt_column); the columns are: "),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = write(tmp_path / "a.jsonl", row(0), b"", line)
    with pytest.raises(ValueError, match=re.escape(file + message)):
        JsonlDataModule(file).setup("fit")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [{"role": "user", "content": "x"}],
            ":2: the last message must be the assistant's, not of role 'user'",
        ),
        ([{"role": "assistant", "content": "x"}], ":2: there is no message before the assistant's"),
        ([{"role": "user"}], ":2: message 1 needs a string 'content', got None"),
        ("text", ":2: a conversation must be a non-empty list of messages, got 'text'"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path, messages, message):
    good = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file = write(tmp_path / "a.jsonl", {"chat": good}, {"chat": messages})
    with pytest.raises(ValueError, match=re.escape(file + message)):
        JsonlDataModule(file, messages_column="chat").setup("fit")


def test_the_line_of_a_held_out_row_is_that_of_its_file(tmp_path):
    lines = [row(n) for n in range(9)] + [{"prompt": "x"}]
    file = write(tmp_path / "a.jsonl", *lines)
    for seed in range(4):
        with pytest.raises(ValueError, match=re.escape(file + ":10: there is no column 'answer'")):
            JsonlDataModule(file, val_size=5, seed=seed).setup("fit")


def test_missing_files_folders_and_empty_files(tmp_path):
    write(tmp_path / "b.jsonl", b"")
    write(tmp_path / "a.jsonl", row(0))
    missing = tmp_path / "train.jsonl"
    with pytest.raises(
        ValueError, match=re.escape(f"there is no file {missing}; {tmp_path} holds a.jsonl, b.jsonl")
    ):
        JsonlDataModule(str(missing)).setup("fit")
    nowhere = tmp_path / "no" / "train.jsonl"
    with pytest.raises(ValueError, match=re.escape(f"there is no file {nowhere}") + "$"):
        JsonlDataModule(str(nowhere)).setup("fit")
    with pytest.raises(
        ValueError, match=re.escape(f"{tmp_path} is a folder, not a JSONL file; {tmp_path} holds a.j")
    ):
        JsonlDataModule(str(tmp_path)).setup("fit")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'b.jsonl'} has no rows")):
        JsonlDataModule(str(tmp_path / "b.jsonl")).setup("fit")


def test_val_file_and_val_size_exclude_each_other():
    with pytest.raises(ValueError, match=r"give either val_file='b' or val_size=0\.1, not both"):
        JsonlDataModule("a", val_file="b", val_size=0.1)
