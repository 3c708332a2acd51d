"""A run that waits for live groups when it is interrupted goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from test_resume import STEPS, assert_same, config, metrics

from lightning_modules.cli import main


def rare(completions, **columns):
    """Half of the completions of every fourth draw differ in it: most groups are dead."""
    return [float(sum(map(ord, text)) % 8 == 0) for text in completions]


def write(folder: Path, model: str, callbacks=()) -> str:
    path = Path(config(folder, model, "GRPOModule", callbacks=list(callbacks)))
    written = yaml.safe_load(path.read_text())
    arguments = written["model"]["init_args"]
    arguments["rewards"] = ["test_resampling_resume.rare"]
    arguments["resampling"] = {"live_groups": 3, "max_rollouts": 40}
    arguments["kl"] = {"coef": 0.1, "reference": {"class_path": "Snapshot", "init_args": {"every": 3}}}
    path.write_text(yaml.safe_dump(written))
    return str(path)


@pytest.mark.parametrize("step", [8, 11])
def test_an_interrupted_run_equals_an_uninterrupted_one(tiny_model, tmp_path, step, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert main(["fit", "-c", write(straight, tiny_model)]) == 0
    interrupt = {"class_path": "test_resume.InterruptAt", "init_args": {"step": step}}
    assert main(["fit", "-c", write(broken, tiny_model, [interrupt])]) == 130
    saved = torch.load(broken / "checkpoints" / "interrupted.ckpt", weights_only=True)
    [unused] = saved["unused_rollouts"]
    assert unused["pool"]["waiting"] or unused["pool"]["groups"] or unused["pool"]["drawn"]
    assert saved["global_step"] < STEPS
    again = write(broken, tiny_model)
    assert main(["fit", "-c", again, "--ckpt_path", str(broken / "checkpoints" / "interrupted.ckpt")]) == 0
    one, two = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (straight, broken)
    )
    assert one["global_step"] == STEPS
    for key in ("state_dict", "optimizer_states", "rng_states", "counters", "unused_rollouts"):
        assert_same(one[key], two[key], key)
    assert any(name.startswith("reference:") for name in one["state_dict"])
    assert metrics(broken) == metrics(straight)
