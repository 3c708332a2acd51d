"""Writes small runs as a user would: JSONL rows and a YAML file in the current folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401  its log handler takes the stderr of now, which must outlive a test's
import yaml

QUIET = {
    "accelerator": "cpu",
    "max_steps": 2,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "default_root_dir": "run",
}
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "target_modules": "all-linear"}}
ADDITIONS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(3)]


def spread(completions, **columns):
    """A reward that differs within almost every group."""
    return [sum(map(ord, str(text))) % 7 for text in completions]


def write_rows(path, rows=ADDITIONS) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(model, *, name="run.yaml", module="GRPOModule", init_args=None, data=None, **trainer) -> str:
    """Write train.jsonl and a YAML file to the current folder; return the file's name."""
    own = {} if module == "SFTModule" else {"rewards": ["small_runs.spread"]}
    own["sampling"] = {"max_new_tokens": 4}
    write_rows("train.jsonl")
    files = dict.fromkeys(("train_file", "val_file", "test_file"), "train.jsonl")
    config = {
        "seed_everything": 1,
        "model": {
            "class_path": module,
            "init_args": {"model": model, "adapter": LORA, **own, **(init_args or {})},
        },
        "data": {"class_path": "JsonlDataModule", "init_args": {**files, "batch_size": 2, **(data or {})}},
        "trainer": {**QUIET, "num_sanity_val_steps": 0, **trainer},
    }
    Path(name).write_text(yaml.safe_dump(config), encoding="utf-8")
    return name


def quiet_line(capfd) -> str:
    """Return the last line of stderr, which is an error's only one."""
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return said.rstrip("\n").split("\n")[-1].removeprefix("quiver: error: ")


def own_environment() -> dict[str, str]:
    """The environment without the W&B service of this process, which would work in this process's folder."""
    return {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}


def start_quiver(*arguments, command=None, **environment) -> subprocess.Popen[str]:
    """Start the console script in the current folder."""
    script = str(Path(sys.executable).parent / "quiver")
    path = os.pathsep.join([*environment.pop("PYTHONPATH", []), str(Path(__file__).parent)])
    return subprocess.Popen(
        [*(command or [script]), *arguments],
        env={**own_environment(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def quiver(*arguments, **options) -> tuple[int, str, str]:
    """Run the console script; return exit code, stdout and stderr."""
    process = start_quiver(*arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err
