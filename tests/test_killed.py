"""A run that is killed at any moment, also while it writes a checkpoint, goes on to the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from parallel_runs import write_config
from test_resume_ranks import assert_same, saved

from lightning_modules.cli import main

pytestmark = pytest.mark.slow

STEPS = 120
KILLS = 20


def config(case: str, model: str, folder: Path, *, every: int = 1, **trainer) -> Path:
    """A run that saves after every step."""
    path = write_config(case, model, folder, max_steps=STEPS, **trainer)
    values = yaml.safe_load(path.read_text())
    values["trainer"]["callbacks"][0]["init_args"] |= {"every_n_train_steps": every, "save_top_k": 1}
    values["trainer"]["limit_val_batches"] = 0
    path.write_text(yaml.safe_dump(values))
    return path


def test_killed_at_twenty_moments(tiny_model, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    worker = [sys.executable, str(Path(__file__).with_name("kill_worker.py"))]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    result = subprocess.run(
        [*worker, str(config("sft_lora", tiny_model, killed)), str(KILLS), "7"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    print(result.stdout)
    log = Path(f"{killed / 'run.yaml'}.log")
    assert "last run ended with 0" in result.stdout, result.stdout + result.stderr + log.read_text()[-3000:]
    assert f"kills {KILLS}" in result.stdout
    assert main(["fit", "-c", str(config("sft_lora", tiny_model, straight))]) == 0
    one, two = saved(straight), saved(killed)
    for key in ("state_dict", "optimizer_states", "rng_states", "counters", "global_step"):
        assert_same(one[key], two[key], key)
    assert one["global_step"] == STEPS
    left = [place.name for place in (killed / "checkpoints").iterdir()]
    assert not [name for name in left if name.startswith(".") and "ckpt" in name], left
