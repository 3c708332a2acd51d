"""Runs of every module through the command line, under any strategy and number of processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from small_runs import own_environment

STEPS = 5
ROWS = 8  # of a step, over all ranks
CASES = ["sft_lora", "sft_full", "grpo_lora", "grpo_full", "sparse", "sparse_dense", "library", "poly"]


def lora(**more):
    return {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "target_modules": "all-linear", **more}}


def spread(completions, **columns):
    """A reward that differs within about half of all groups."""
    return [sum(map(ord, text)) % 2 for text in completions]


def spread_unless_dead(completions, task, **columns):
    """The same, but for rows of the task `dead`, whose completions are all alike."""
    alive = spread(completions)
    return [0 if name == "dead" else value for name, value in zip(task, alive, strict=True)]


def module_of(case: str) -> tuple[str, dict]:
    """Class and arguments of a case."""
    if case.startswith("sft"):
        return "SFTModule", {
            "adapter": lora() if case == "sft_lora" else None,
            "max_tokens_per_microbatch": 60,
        }
    if case.startswith("grpo"):
        kl = {"adapter": lora(), "kl": {"coef": 0.1}} if case == "grpo_lora" else {"adapter": None}
        return "GRPOModule", {
            "rewards": ["parallel_runs.spread"],
            "sampling": {"max_new_tokens": 8},
            "max_tokens_per_microbatch": 90,
            **kl,
        }
    if case.startswith("sparse"):
        places = "lightning_modules.sparse.schedules."
        schedule = {"class_path": places + "Static", "init_args": {"batches": 2}}
        if case == "sparse_dense":
            schedule = {"class_path": places + "FirstEpochs", "init_args": {"every": 2, "epochs": 2}}
        score = "signed_sensitivity" if case == "sparse_dense" else "snip"
        return "SparseAdapterModule", {
            "density": 0.1,
            "schedule": schedule,
            "score": f"lightning_modules.sparse.scores.{score}",
        }
    router = {"class_path": "TaskRouter" if case == "library" else "PolyRouter"}
    more = (
        {}
        if case == "library"
        else {"experts": 3, "mixing": "lightning_modules.library.mixing.factor_mixing"}
    )
    return "AdapterLibraryModule", {"router": router, "rank": 4, **more}


def write_config(case: str, model: str, folder: Path, **trainer) -> Path:
    """Write `run.yaml` for one process into a folder."""
    name, arguments = module_of(case)
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in (("train", 28), ("val", 6)):
        rows = [
            {
                "question": f"{'x' * (i * 7 % 23)} {i} + {i % 5}",
                "answer": str(i + i % 5),
                "task": f"task_{i % 3}",
            }
            for i in range(size)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "seed_everything": 1,
        "model": {
            "class_path": name,
            "init_args": {
                "model": model,
                # SGD: Adam turns differences of rounding into steps of full size. Momentum is state to be kept.
                "optimizer": {
                    "class_path": "torch.optim.SGD",
                    "init_args": {
                        "lr": {"sft_full": 0.05, "grpo_lora": 5.0, "grpo_full": 0.5}.get(case, 0.1),
                        "momentum": 0.9,
                    },
                },
                **arguments,
            },
        },
        "data": {
            "class_path": "JsonlDataModule",
            "init_args": {
                "train_file": str(folder / "train.jsonl"),
                "val_file": str(folder / "val.jsonl"),
                "prompt_column": "question",
                "task_column": "task",
                "batch_size": ROWS,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": STEPS,
            "max_epochs": -1,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "", "version": ""},
            },
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": str(folder / "checkpoints"), "save_last": True},
                },
                {"class_path": "AdapterExport"},
            ],
            **trainer,
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def strategy_options(strategy: str, processes: int, **init_args) -> list[str]:
    """Options that run a configuration on so many processes."""
    path = {"fsdp2": "lightning_modules.FSDP2Strategy", "ddp": "lightning.pytorch.strategies.DDPStrategy"}[
        strategy
    ]
    wait = {"timeout": 180.0} if strategy == "fsdp2" else {}
    text = json.dumps({"class_path": path, "init_args": {**wait, **init_args}})
    return [
        f"--trainer.strategy={text}",
        f"--trainer.devices={processes}",
        f"--data.batch_size={ROWS // processes}",
    ]


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start `quiver` in a session of its own, so that all its ranks can be ended."""
    script = str(Path(sys.executable).parent / "quiver")
    path = os.pathsep.join([str(Path(__file__).parent), environment.pop("PYTHONPATH", "")])
    return subprocess.Popen(
        [script, *arguments],
        env={**own_environment(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 400) -> str:
    """Wait for a run and return what it printed; a run that hangs is ended and fails."""
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        raise AssertionError(f"the run hung:\n{out}") from None
    return out


def run(*arguments: str, timeout: float = 400, **environment: str) -> str:
    """Run `quiver` to a good end."""
    process = start(*arguments, **environment)
    out = finish(process, timeout)
    assert process.returncode == 0, out
    return out


def columns(folder: Path, *names: str) -> list[tuple[float, ...]]:
    """Metrics of each training step."""
    with (folder / "metrics.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row.get(names[0])]
    return [tuple(float(row[name]) for name in names) for row in rows]


def learned(folder: Path) -> dict[str, torch.Tensor]:
    """What the last checkpoint of a run holds."""
    file = folder / "checkpoints" / "last.ckpt"
    return torch.load(file, map_location="cpu", weights_only=True)["state_dict"]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file that a run has exported."""
    found = {}
    for file in sorted((folder / "adapter").rglob("*.safetensors")):
        place = file.relative_to(folder).as_posix()
        found |= {f"{place}: {name}": tensor for name, tensor in load_file(file).items()}
    return found


def assert_equal_runs(ours: Path, theirs: Path, case: str, tolerance: float = 1e-5) -> float:
    """Compare losses of all steps, and final weights; return the largest difference."""
    metric = "train/reward" if case.startswith("grpo") else "train/loss"
    a, b = (torch.tensor(columns(folder, metric, "train/grad_norm")) for folder in (ours, theirs))
    assert len(a) == STEPS
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    one = learned(ours) | exported(ours)
    two = learned(theirs) | exported(theirs)
    assert one.keys() == two.keys()
    assert len(exported(ours)) > 0
    worst = 0.0
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
        worst = (
            max(worst, float((one[name].double() - two[name].double()).abs().max()))
            if one[name].numel()
            else worst
        )
    return worst
