"""Every recipe: one gradient however rows are split and spread, and a real run through the CLI."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
from fixed_rollouts import first_gradients, loader
from recipes import RECIPES, build

from lightning_modules.cli import main

HERE = Path(__file__).parent
UIDS = [0, 1, 2, 3, 4, 5, 6, 7]


def gradients(recipe, model, uids=UIDS, **options):
    trainer = lightning.Trainer(barebones=True, accelerator="cpu", max_steps=1)
    return first_gradients(build(recipe, model, **options), trainer, loader(uids))


def assert_equal(ours, theirs, tolerance=1e-6):
    scale = max(float(g.abs().max()) for g in theirs)
    assert scale > 1e-4  # there is something to compare
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * max(scale, 1.0), rtol=0)


@pytest.fixture(scope="module")
def whole(tiny_model):
    """Each recipe's gradient from one micro-batch."""
    return {recipe: gradients(recipe, tiny_model, max_tokens_per_microbatch=100_000) for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("budget", [1, 150])
def test_accumulated_micro_batches_make_the_gradient_of_one_big_batch(tiny_model, whole, recipe, budget):
    assert_equal(gradients(recipe, tiny_model, max_tokens_per_microbatch=budget), whole[recipe])


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_order_of_rows_does_not_change_the_gradient(tiny_model, whole, recipe):
    assert_equal(gradients(recipe, tiny_model, [5, 2, 7, 0, 3, 6, 1, 4]), whole[recipe])


@pytest.mark.slow
@pytest.mark.parametrize("uids", [UIDS, [0, 1, 4, 5, 2, 3, 6, 7]], ids=["mixed", "one dead rank"])
def test_two_ranks_make_the_gradient_of_one(tiny_model, whole, tmp_path, uids):
    command = [
        sys.executable,
        str(HERE / "recipe_worker.py"),
        tiny_model,
        str(tmp_path / "out"),
        *map(str, uids),
    ]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = torch.load(tmp_path / f"out.{rank}", weights_only=True)
        for recipe in RECIPES:
            assert_equal(found[recipe], whole[recipe])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_three_steps_of_a_real_model(recipe, tmp_path, monkeypatch, capsys):
    """Three rollouts of SmolLM2 with all their updates. In float32: without AMX bfloat16 is slower on CPUs."""
    monkeypatch.chdir(tmp_path)
    updates = 2 if recipe in ("gspo", "cispo") else 1
    small = ["--data.batch_size", "2", "--data.train_size", "64", "--data.val_size", "2"]
    small += ["--trainer.max_steps", str(3 * updates), "--model.updates_per_rollout", str(updates)]
    small += ["--trainer.num_sanity_val_steps", "0", "--model.sampling.max_new_tokens", "4"]
    small += ["--model.adapter", "peft.LoraConfig", "--model.adapter.target_modules", "[q_proj]"]
    if recipe in ("two_rollouts_resampling", "dapo"):
        small += ["--model.resampling.live_groups", "1", "--model.resampling.max_rollouts", "8"]
    small += ["--model.num_generations", "2"]
    small += ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "log"]
    assert main(["fit", "-c", f"grpo/{recipe}.yaml", "-c", "trainer/cpu.yaml", *small]) == 0
    assert "Plan" in capsys.readouterr().out
    with next(Path("log").rglob("metrics.csv")).open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["train/reward"]]
    # Lightning writes the last values again for batches that log none, so count what only an update changes.
    assert len({row["train/tokens"] for row in rows}) == 3
    saved = torch.load(next(Path().rglob("*.ckpt")), weights_only=True)
    assert saved["global_step"] == 3 * updates
    assert all(one.isfinite().all() for one in saved["state_dict"].values())
    assert list(Path().rglob("adapter_config.json"))
