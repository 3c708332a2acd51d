"""An interrupted run equals an uninterrupted one, bit for bit: weights, optimiser, metrics, data order."""

from __future__ import annotations

import csv
import json
import os
import signal

import lightning.pytorch as lightning
import pytest
import torch
import yaml
from same import assert_same

from lightning_modules.cli import main

STEPS = 10


def spread(completions, **columns):
    """A reward that differs within about half of all groups, so that some steps have none to learn from."""
    return [sum(map(ord, text)) % 2 for text in completions]


class InterruptAt(lightning.Callback):
    """Presses Ctrl-C in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx + 1 == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def config(folder, model, module, **trainer) -> str:
    grpo = {
        "rewards": ["test_resume.spread"],
        "sampling": {"max_new_tokens": 12},
        "updates_per_rollout": 1,
    }
    written = {
        "seed_everything": 7,
        "model": {
            "class_path": module,
            "init_args": {
                "model": model,
                # Dropout draws from the global generator in the update, sampling in the rollout.
                "adapter": {
                    "class_path": "peft.LoraConfig",
                    "init_args": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1},
                },
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "lr_scheduler": {
                    "class_path": "torch.optim.lr_scheduler.LinearLR",
                    "init_args": {"total_iters": STEPS},
                },
                **(grpo if module == "GRPOModule" else {}),
            },
        },
        "data": {
            "class_path": "ArithmeticDataModule",
            # An epoch has 3 steps, the last of them filled up with first rows.
            "init_args": {"batch_size": 2, "train_size": 5, "val_size": 3},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "max_epochs": -1,
            "log_every_n_steps": 1,
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
                *trainer.pop("callbacks", []),
            ],
            **trainer,
        },
    }
    path = folder / "run.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(written))
    return str(path)


def metrics(folder) -> list[dict[str, str]]:
    rows = []
    for file in sorted(folder.glob("metrics*.csv"), key=lambda p: (p.name == "metrics.csv", p.name)):
        with file.open() as lines:
            rows += [
                {name: value for name, value in row.items() if value and "time/" not in name}
                for row in csv.DictReader(lines)
            ]
    return rows


@pytest.mark.parametrize(
    ("module", "step"), [("GRPOModule", 5), ("GRPOModule", 6), ("SFTModule", 5)], ids=str
)
def test_interrupted_run_equals_uninterrupted_run(tiny_model, tmp_path, module, step, capsys):
    """Step 5 lies inside an epoch; step 6 ends one, so that a validation is due when the signal comes."""
    table = [{"class_path": "RolloutTable"}] if module == "GRPOModule" else []
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert main(["fit", "-c", config(straight, tiny_model, module, callbacks=list(table))]) == 0

    interrupt = {"class_path": "test_resume.InterruptAt", "init_args": {"step": step}}
    assert main(["fit", "-c", config(broken, tiny_model, module, callbacks=[*table, interrupt])]) == 130
    checkpoint = broken / "checkpoints" / "interrupted.ckpt"
    assert f"--ckpt_path {checkpoint}" in capsys.readouterr().err
    assert torch.load(checkpoint, weights_only=True)["global_step"] == step
    again = config(broken, tiny_model, module, callbacks=list(table))
    assert main(["fit", "-c", again, "--ckpt_path", str(checkpoint)]) == 0

    one = torch.load(straight / "checkpoints" / "last.ckpt", weights_only=True)
    two = torch.load(broken / "checkpoints" / "last.ckpt", weights_only=True)
    assert one["global_step"] == STEPS
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "rng_states", "counters", "epoch"):
        assert_same(one[key], two[key], key)
    assert_same(
        one["loops"]["fit_loop"]["state_dict"]["combined_loader"],
        two["loops"]["fit_loop"]["state_dict"]["combined_loader"],
    )
    ours, theirs = metrics(broken), metrics(straight)
    assert len(theirs) >= STEPS
    assert ours == theirs
    if module == "GRPOModule":
        rollouts = [
            [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
            for folder in (straight, broken)
        ]
        assert rollouts[0] == rollouts[1]  # data order and every sampled word
        assert {row["step"] for row in rollouts[0]} == set(range(1, STEPS + 1))
        assert 0 < one["counters"]["skipped_steps"] < STEPS  # both kinds of steps occur


def test_adapter_only_checkpoint_is_small_and_holds_no_pickled_object(tiny_model, tmp_path):
    assert main(["fit", "-c", config(tmp_path, tiny_model, "GRPOModule", max_steps=1)]) == 0
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])
