"""Every sparse recipe trains from its YAML and leaves an adapter that loads."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from transformers import AutoModelForCausalLM

from lightning_modules.cli import main
from lightning_modules.sparse.expert import SparseExpert

RECIPES = sorted(file.stem for file in (REPOSITORY / "configs" / "sparse").glob("*.yaml"))
SOONER = {
    "paper": ["--model.schedule.every", "2"],
    "grow_and_drop": ["--model.schedule.every", "2", "--model.schedule.steps", "5"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for part in ("train", "test"):
        for task in ("more", "less"):
            file = Path("tasks", part, f"{task}.jsonl")
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"input": str(i), "output": str(i + 1 if task == "more" else i - 1)} for i in range(20)]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["--data.folder", "tasks", "--data.examples_per_epoch", "48", "--data.batch_size", "8"]
    if recipe == "grpo":
        own = ["--data.train_size", "48", "--data.batch_size", "8", "--data.val_size", "4"]
        # Any digit of the random model earns something, so that groups are alive.
        own += ["--model.rewards", "[small_runs.spread]"]
    small = ["--model.model", tiny_model, "--model.dtype", "float32", "--trainer.max_epochs", "1"]
    small += ["--trainer.enable_progress_bar", "false", *SOONER.get(recipe, [])]
    assert main(["fit", "-c", f"sparse/{recipe}.yaml", *small, *own]) == 0
    folder = Path("runs/sparse", recipe)
    assert {"metrics.csv", "config.yaml", "sparse_density.csv", "sparse_density.png"} <= {
        file.name for file in folder.iterdir()
    }
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    expert = SparseExpert(folder / "adapter").apply(model)
    for name, delta in expert.deltas.items():
        if recipe not in ("row", "block"):
            assert len(delta.indices) == math.floor(0.05 * before[name].numel())
        changed = (model.get_parameter(name) != before[name]).flatten().nonzero().flatten()
        assert len(changed) > 0, f"{name} was not trained"
        assert set(changed.tolist()) <= set(delta.indices.tolist())
    untouched = before.keys() - expert.deltas.keys()
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in untouched)
