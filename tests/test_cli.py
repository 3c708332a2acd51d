"""The command line, through the door that users take."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from small_runs import quiver, start_quiver, write_run

from lightning_modules.cli import main

CONFIGS = REPOSITORY / "configs"
NAMES = sorted(file.relative_to(CONFIGS).as_posix() for file in CONFIGS.rglob("*.yaml"))
OVERLAYS = [name for name in NAMES if "model" not in yaml.safe_load((CONFIGS / name).read_text())]
ROLLOUTS = {"class_path": "RolloutTable"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Each test runs in an empty folder that is not the repository; main appends it to sys.path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def printed(capsys):
    """`quiver fit ... --print_config`, parsed."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["fit", *arguments, "--print_config"])
        captured = capsys.readouterr()
        assert stop.value.code == 0, captured.err
        return yaml.safe_load(captured.out)

    return run


def rollouts(folder="run"):
    return [json.loads(line) for line in Path(folder, "rollouts.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- start


@pytest.mark.parametrize("argument", ["--help", "configs"])
def test_light_commands_do_not_import_lightning(argument):
    script = str(Path(sys.executable).parent / "quiver")
    code, out, err = quiver(argument, command=[sys.executable, "-X", "importtime", script])
    assert code == 0
    imported = {line.rsplit("|", 1)[-1].strip() for line in err.splitlines() if "|" in line}
    assert "lightning_modules.cli" in imported
    assert not {"torch", "lightning", "lightning.pytorch", "transformers"} & imported
    if argument == "--help":
        for command in ("fit", "validate", "test", "predict", "configs", "export"):
            assert f"\n  {command} " in out
        return
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    titles = {name: (CONFIGS / name).read_text().splitlines()[0].removeprefix("# ") for name in NAMES}
    assert lines == titles


def test_unknown_command(capsys):
    assert main(["fitt"]) == 2
    assert capsys.readouterr().err == "quiver: error: unknown command 'fitt'. Did you mean fit?\n"


@pytest.mark.parametrize(
    ("command", "short"), [("rollouts run", "--summar"), ("library list folder", "--as_js")]
)
def test_options_of_commands_cannot_be_abbreviated(command, short):
    code, _, err = quiver(*command.split(), short, "true")
    assert code == 2
    assert f"unrecognized arguments: {short} true" in err


def test_local_files_shadow_nothing(tmp_path):
    for name in ("json.py", "callbacks.py", "datamodules/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise RuntimeError('shadowed')")
    code, out, err = quiver("fit", "-c", "grpo/demo.yaml", "--print_config")
    assert code == 0, err
    assert yaml.safe_load(out)["model"]["class_path"] == "lightning_modules.GRPOModule"


@pytest.mark.parametrize("package", ["callbacks", "datamodules"])
def test_foreign_package_is_named(tmp_path, package):
    foreign = tmp_path / "site" / package
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("")
    code, _, err = quiver("fit", "-c", "grpo/demo.yaml", PYTHONPATH=[str(foreign.parent)])
    assert code == 1
    assert err.startswith(f"quiver: error: The package {package!r} is {foreign}, not quiver's own in ")
    assert err.count("\n") == 1


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OVERLAYS])
def test_full_configuration_parses(name, printed):
    written = yaml.safe_load((CONFIGS / name).read_text())
    config = printed("-c", name)
    assert config["model"]["class_path"].endswith(written["model"]["class_path"])
    assert config["data"]["class_path"].endswith(written["data"]["class_path"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_wins_over_what_precedes_it(name, printed):
    overlay = yaml.safe_load((CONFIGS / name).read_text())["trainer"]
    config = printed("-c", "grpo/demo.yaml", "-c", name)
    assert config["model"]["class_path"] == "lightning_modules.GRPOModule"
    for key, value in overlay.items():
        if key == "logger":
            assert [one["class_path"] for one in config["trainer"][key]] == [
                one["class_path"] for one in value
            ]
        elif key == "callbacks+":
            added = [one["class_path"].rpartition(".")[2] for one in config["trainer"]["callbacks"]]
            assert added[-len(value) :] == [one["class_path"] for one in value]
            assert len(added) > len(value)
        elif isinstance(value, dict):  # printed with every default
            shown = config["trainer"][key]
            assert shown["class_path"].endswith(value["class_path"].rpartition(".")[2])
            assert shown["init_args"] | value["init_args"] == shown["init_args"]
        else:
            assert config["trainer"][key] == value


def test_option_wins_over_files_and_the_later_file_over_the_earlier(tmp_path, printed):
    (tmp_path / "mine.yaml").write_text("trainer: {max_epochs: 2}")
    stack = ["-c", "configs/grpo/demo.yaml", "-c", "mine.yaml"]
    assert printed(*stack)["trainer"]["max_epochs"] == 2
    assert printed(*stack, "--trainer.max_epochs", "3")["trainer"]["max_epochs"] == 3
    assert printed("-c", "mine.yaml", "-c", "grpo/demo.yaml")["trainer"]["max_epochs"] == 1


def test_own_file_wins_over_one_of_ours(tmp_path, printed):
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "demo.yaml").write_text("seed_everything: 99")
    assert printed("-c", "grpo/demo.yaml")["seed_everything"] == 99


def test_environment(printed, monkeypatch):
    monkeypatch.setenv("QUIVER_FIT__TRAINER__MAX_STEPS", "7")
    monkeypatch.setenv("QUIVER_FIT__CONFIG", "grpo/demo.yaml")
    trainer = printed()["trainer"]
    assert (trainer["max_steps"], trainer["max_epochs"]) == (7, 1)
    monkeypatch.setenv("QUIVER_FIT__TRAINER__MAX_EPOCHS", "5")
    assert printed("-c", "grpo/demo.yaml")["trainer"]["max_epochs"] == 1, "a -c file wins"
    assert printed("--trainer.max_steps", "8")["trainer"]["max_steps"] == 8


# ---------------------------------------------------------------- runs


def test_own_module_and_reward_in_the_current_folder(tmp_path, tiny_model, capsys):
    (tmp_path / "mymodule.py").write_text(
        "from lightning_modules import GRPOModule\n"
        "class MyGRPO(GRPOModule):\n"
        "    def advantages(self, scores, rollout):\n"
        "        return scores.total + 100\n"
        "def my_reward(completions, answer, **columns):\n"
        "    return [len(gold) + 0.5 for gold in answer]\n"
    )
    rewards = ["mymodule.my_reward"]
    name = write_run(
        tiny_model, module="mymodule.MyGRPO", init_args={"rewards": rewards}, callbacks=[ROLLOUTS]
    )
    assert main(["fit", "-c", name]) == 0, capsys.readouterr().err
    assert sys.path[-1] == str(tmp_path)
    rows = rollouts()
    assert {row["step"] for row in rows} == {1, 2}
    assert all((row["reward/my_reward"], row["advantage"]) == (1.5, 101.5) for row in rows)


def test_reward_of_trl_runs_unchanged(tiny_model, capsys):
    rewards = ["trl.rewards.think_format_reward", "small_runs.spread"]
    data = {"conversational": True}
    name = write_run(tiny_model, init_args={"rewards": rewards}, data=data, callbacks=[ROLLOUTS])
    assert main(["fit", "-c", name]) == 0, capsys.readouterr().err
    assert rollouts()[-1]["step"] >= 2, "a step whose groups are all equal makes no update"
    assert {row["reward/think_format_reward"] for row in rollouts()} == {0.0}


@pytest.mark.parametrize("module", ["GRPOModule", "SFTModule"])
def test_validate_test_and_predict(module, tiny_model, capsys):
    name = write_run(tiny_model, module=module)
    for command, metric in (("validate", "val/"), ("test", "test/"), ("predict", "")):
        assert main([command, "-c", name]) == 0, capsys.readouterr().err
        assert metric in capsys.readouterr().out
    assert not Path("run").exists()


def test_yaml_wins_over_hyper_parameters_in_a_checkpoint(tiny_model, capsys):
    saver = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": "saved", "every_n_train_steps": 1, "save_last": True},
    }
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5}}
    first = write_run(
        tiny_model,
        name="first.yaml",
        init_args={"optimizer": adamw},
        enable_checkpointing=True,
        max_steps=1,
        callbacks=[saver],
    )
    assert main(["fit", "-c", first]) == 0, capsys.readouterr().err
    saved = torch.load("saved/last.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["optimizer"]["init_args"]["lr"] == 0.5
    changed = {
        "num_generations": 4,
        "num_val_generations": 3,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.25}},
    }
    second = write_run(tiny_model, init_args=changed, callbacks=[ROLLOUTS], max_steps=3)
    assert main(["fit", "-c", second, "--ckpt_path", "saved/last.ckpt"]) == 0, capsys.readouterr().err
    per_prompt = [row["uid"] for row in rollouts() if row["step"] == 2]
    assert len(per_prompt) == 4 * len(set(per_prompt))
    written = yaml.safe_load(Path("run/config.yaml").read_text())["model"]["init_args"]
    assert written["optimizer"]["init_args"]["lr"] == 0.25
    assert main(["validate", "-c", second, "--ckpt_path", "saved/last.ckpt"]) == 0
    assert "val/mean@3" in capsys.readouterr().out


def test_two_offline_wandb_runs_share_a_folder(tiny_model):
    logger = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"save_dir": "run", "offline": True, "project": "quiver"},
    }
    name = write_run(tiny_model, logger=[logger], max_steps=1)
    for _ in range(2):
        code, _, err = quiver("fit", "-c", name)
        assert code == 0, err
    assert len(list(Path("run/wandb").glob("offline-run-*"))) == 2
    assert {file.name for file in Path("run").glob("config*.yaml")} == {"config.yaml", "config.1.yaml"}


def test_ctrl_c_saves_a_checkpoint_that_resumes(tiny_model, capsys):
    name = write_run(tiny_model, max_steps=100_000, callbacks=[ROLLOUTS])
    process = start_quiver("fit", "-c", name)
    deadline = time.monotonic() + 120
    table = Path("run/rollouts.jsonl")
    while process.poll() is None and time.monotonic() < deadline:
        if table.exists() and len(table.read_text().splitlines()) > 4:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.05)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    [checkpoint] = [line.split()[-1] for line in err.splitlines() if "Go on with: --ckpt_path" in line]
    done = torch.load(checkpoint, weights_only=True)["global_step"]
    last = rollouts()[-1]["step"]
    resume = ["--ckpt_path", checkpoint, "--trainer.max_steps", str(done + 2)]
    assert main(["fit", "-c", name, *resume]) == 0, capsys.readouterr().err
    steps = [row["step"] for row in rollouts()]
    assert steps == sorted(steps)
    assert set(steps) == set(range(1, max(steps) + 1))
    assert max(steps) >= last + 2
