"""Mixtures of tasks."""

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from datamodules import MultiTaskDataModule

SIZES = {"big": 80, "mid": 20, "small": 5}


@pytest.fixture
def folder(tmp_path):
    for part, scale in (("train", 1), ("test", 0.2)):
        (tmp_path / part).mkdir()
        for task, size in SIZES.items():
            rows = [
                {"task": "x", "input": f"{part} {task} {n}", "output": str(n)}
                for n in range(int(size * scale))
            ]
            (tmp_path / part / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {task: [f"{task} A", f"{task} B"] for task in SIZES}
    (tmp_path / "instructions.json").write_text(json.dumps(texts))
    return tmp_path


def made(folder, stage="fit", **kwargs):
    data = MultiTaskDataModule(str(folder), **{"batch_size": 5, **kwargs})
    data.setup(stage)
    return data


def inputs(loader, name="input"):
    return [value for batch in loader for value in batch.columns[name]]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, 1e6])
def test_the_mixture_follows_the_formula(folder, temperature):
    data = made(folder, temperature=temperature, examples_per_epoch=300)
    seen = Counter(task for batch in data.train_dataloader() for task in batch.tasks)
    mass = {task: size ** (1 / temperature) for task, size in SIZES.items()}
    assert sum(seen.values()) == 300
    for task in SIZES:
        assert abs(seen[task] - 300 * mass[task] / sum(mass.values())) < 1


def test_a_plain_epoch_is_each_row_once(folder):
    seen = inputs(made(folder).train_dataloader())
    assert len(seen) == len(set(seen)) == sum(SIZES.values())


def test_rounds_over_a_task_go_on_across_epochs(folder):
    data = made(folder, examples_per_epoch=21, batch_size=7)
    loader = data.train_dataloader()
    epochs = [inputs(loader) for _ in range(5)]
    assert [Counter(text.split()[1] for text in epoch) for epoch in epochs] == [
        {"big": 16, "mid": 4, "small": 1}
    ] * 5
    assert len(set(chain.from_iterable(epochs))) == 105
    again = made(folder, examples_per_epoch=21, batch_size=7).train_dataloader()
    assert [inputs(again) for _ in range(5)] == epochs
    other = made(folder, examples_per_epoch=21, batch_size=7, seed=1).train_dataloader()
    assert inputs(other) != epochs[0]


def test_an_interrupted_mixture_resumes(folder):
    straight = made(folder, temperature=3.0).train_dataloader()
    rows = [batch.uids for _ in range(2) for batch in straight]
    first, second = (
        made(folder, temperature=3.0).train_dataloader(),
        made(folder, temperature=3.0).train_dataloader(),
    )
    begun = iter(first)
    head = [next(begun).uids for _ in range(8)]
    second.load_state_dict(first.state_dict())
    assert head + [batch.uids for batch in second] == rows[: 8 + len(second)]


def test_instructions_are_chosen_per_row_and_stay(folder):
    file = str(folder / "instructions.json")
    data = made(folder, instructions=file)
    loader = data.train_dataloader()
    epochs = [
        {
            uid: (prompt, text)
            for batch in loader
            for uid, prompt, text in zip(batch.uids, batch.prompts, batch.columns["instruction"], strict=True)
        }
        for _ in range(2)
    ]
    assert epochs[0] == epochs[1]
    for (prompt, text), row in zip(
        (epochs[0][uid] for uid in sorted(epochs[0])), data.rows("train"), strict=True
    ):
        assert prompt == f"{text}\n\nInput: {row['input']}"
        assert text in (f"{row['task']} A", f"{row['task']} B")
    assert Counter(text[-1] for _, text in epochs[0].values()).keys() == {"A", "B"}
    other = made(folder, instructions=file, seed=1).rows("train")
    assert [row["instruction"] for row in other] != [row["instruction"] for row in data.rows("train")]


def test_the_template_can_be_changed(folder):
    data = made(folder, template="[{task}] {prompt}", tasks=["small"], shuffle=False)
    assert next(iter(data.train_dataloader())).prompts[0] == "[small] train small 0"
    assert next(iter(made(folder).train_dataloader())).prompts[0].startswith("train ")


def test_validation_from_train_or_test(folder):
    assert made(folder).val_dataloader() == []
    held = made(folder, val_size=0.2)
    val, train = inputs(held.val_dataloader()), inputs(held.train_dataloader())
    assert Counter(text.split()[1] for text in val) == {"big": 16, "mid": 4, "small": 1}
    assert not set(val) & set(train)
    assert len(val) + len(set(train)) == sum(SIZES.values())
    few = made(folder, val_size=0.2, max_per_task_val=2)
    assert Counter(text.split()[1] for text in inputs(few.val_dataloader())) == {
        "big": 2,
        "mid": 2,
        "small": 1,
    }
    assert set(inputs(few.val_dataloader())) <= set(val)
    assert {text.split()[0] for text in inputs(made(folder, validate_on_test=True).val_dataloader())} == {
        "test"
    }
    assert len(inputs(made(folder, "test").test_dataloader())) == 16 + 4 + 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tasks": ["bigg"]}, "unknown task 'bigg' in "),
        ({"tasks": ["bigg"]}, "did you mean: big?"),
        (
            {"examples_per_epoch": 10},
            "examples_per_epoch=10 gives no row to small; raise it, or raise temperature=1.0",
        ),
        ({"temperature": 0}, "temperature=0: must be above 0"),
        ({"validate_on_test": True, "val_size": 3}, "give either validate_on_test or val_size=3, not both"),
        ({"val_size": 5}, "val_size=5 holds out 5 of the 5 rows of the task small and leaves none"),
        ({"instructions": "nowhere.json"}, "instructions='nowhere.json' is no readable JSON file: "),
        (
            {"template": "{prompt} {nothing}"},
            "train/big.jsonl:1: there is no column 'nothing' (a field of template)",
        ),
    ],
)
def test_mistakes(folder, kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        made(folder, **kwargs).train_dataloader()


def test_missing_instructions_files_and_keys(folder):
    file = folder / "some.json"
    file.write_text('{"big": ["A"], "mid": []}')
    with pytest.raises(ValueError, match=r"some\.json' has no list of texts for the task 'mid'"):
        made(folder, instructions=str(file))
    with pytest.raises(
        ValueError, match=re.escape(f"there is no .jsonl file in {folder / 'test' / 'train'}")
    ):
        made(folder / "test")
    with (folder / "train" / "small.jsonl").open("a") as stream:
        stream.write('{"input": "x"}\n')
    with pytest.raises(ValueError, match=re.escape("train/small.jsonl:6: there is no column 'output'")):
        made(folder)


def test_instruction_induction():
    data_folder = Path(__file__).parents[2] / "../shared/data/instruction_induction"
    if not data_folder.is_dir():
        pytest.skip("the instruction-induction data is not beside the repository")
    tasks = ["antonyms", "sum", "rhymes"]
    data = MultiTaskDataModule(
        str(data_folder),
        tasks,
        temperature=2.0,
        instructions=str(data_folder / "instructions.json"),
        examples_per_epoch=64,
        max_per_task_val=4,
        validate_on_test=True,
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert len(batch) == 8
    assert all("\n\nInput: " in prompt for prompt in batch.prompts)
    assert all(
        answer in answers for answer, answers in zip(batch.answers, batch.columns["answers"], strict=True)
    )
    assert Counter(task for batch in data.val_dataloader() for task in batch.tasks) == dict.fromkeys(tasks, 4)
