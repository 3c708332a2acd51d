"""The `datasets` DataModule on local files; nothing is downloaded."""

import json
import re

import pytest

from datamodules import HubDataModule


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(count, first=0):
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt": f"q{n}", "answer": [n, -n], "extra": {"n": n}} for n in range(first, first + count)]
    )


def prompts(loader):
    return [prompt for batch in loader for prompt in batch.prompts]


def test_a_parquet_file_stays_arrow_and_gives_batches(tmp_path):
    from datasets import Dataset

    table(6).to_parquet(tmp_path / "a.parquet")
    data = HubDataModule(str(tmp_path / "a.parquet"), val_size=2, batch_size=4, shuffle=False)
    data.prepare_data()
    data.setup("fit")
    assert isinstance(data.rows("train"), Dataset)
    batch = next(iter(data.train_dataloader()))
    assert batch.answers == [prompt.removeprefix("q") for prompt in batch.prompts]
    assert batch.columns["extra"] == [{"n": int(answer)} for answer in batch.answers]
    assert sorted(batch.prompts + prompts(data.val_dataloader())) == [f"q{n}" for n in range(6)]


@pytest.mark.parametrize("by", ["file", "builder", "folder"])
def test_jsonl_by_file_builder_and_folder(tmp_path, by):
    folder = tmp_path / "data"
    folder.mkdir()
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{n}", "answer": n}) + "\n" for n in range(4)))
    path, files = {"file": (file, None), "builder": ("json", str(file)), "folder": (folder, None)}[by]
    data = HubDataModule(str(path), data_files=files, batch_size=4, shuffle=False)
    data.setup("fit")
    assert prompts(data.train_dataloader()) == ["q0", "q1", "q2", "q3"]
    assert data.val_dataloader() == []


def test_named_splits_and_a_missing_one(tmp_path):
    files = {}
    for number, name in enumerate(("train", "dev", "eval")):
        files[name] = str(tmp_path / f"{name}.parquet")
        table(3, number * 10).to_parquet(files[name])
    data = HubDataModule("parquet", data_files=files, val_split="dev", test_split="eval", batch_size=3)
    data.setup()
    assert sorted(prompts(data.train_dataloader())) == ["q0", "q1", "q2"]
    assert prompts(data.val_dataloader()) == ["q10", "q11", "q12"]
    assert prompts(data.test_dataloader()) == ["q20", "q21", "q22"]
    with pytest.raises(
        ValueError, match="val_split='validation': parquet has no such split; it has train, dev, eval"
    ):
        HubDataModule("parquet", data_files=files, val_split="validation").setup("fit")


def test_conversations_in_arrow(tmp_path):
    from datasets import Dataset

    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    Dataset.from_list([{"messages": turns}]).to_parquet(tmp_path / "a.parquet")
    data = HubDataModule(str(tmp_path / "a.parquet"), messages_column="messages", batch_size=1)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.prompts == [turns[:1]]
    assert batch.answers == ["ho"]


def test_columns_are_checked_by_schema_and_values_when_batched(tmp_path):
    from datasets import Dataset

    file = str(tmp_path / "a.parquet")
    Dataset.from_list([{"prompt": "a", "gold": "b"}, {"prompt": "a", "gold": None}]).to_parquet(file)
    message = "train split: there is no column 'answer' (answer_column); the columns are: prompt, gold"
    with pytest.raises(ValueError, match=re.escape(message)):
        HubDataModule(file).setup("fit")
    data = HubDataModule(file, answer_column="gold", batch_size=2, shuffle=False)
    data.setup("fit")
    with pytest.raises(ValueError, match=re.escape(f"{file}, row 1 of the train split: column 'gold'")):
        next(iter(data.train_dataloader()))


def test_other_mistakes(tmp_path):
    with pytest.raises(ValueError, match=r"give either val_split='v' or val_size=0\.1, not both"):
        HubDataModule("a", val_split="v", val_size=0.1)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"is not one of the file types \.parquet, \.json, \.jsonl, \.csv"):
        HubDataModule(str(tmp_path / "a.txt")).setup("fit")
