"""A run that is killed at any moment, also while it writes a checkpoint, goes on to the same weights."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from parallel_runs import finish, run, start, strategy_options, write_config
from same import assert_same
from test_resume_ranks import saved

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


def test_two_ranks_killed_while_they_write_folders(tiny_model, tmp_path):
    """Both ranks of a sharded run die at once; some checkpoint folder is there, whole, and the run goes on from it."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    options = [*strategy_options("fsdp2", 2, save_distributed_checkpoint=True), "--trainer.max_steps=12"]
    arguments = ["fit", "-c", str(config("sparse", tiny_model, killed)), *options, "--ckpt_path", "latest"]
    draw = random.Random(3)
    for number in range(2):
        process = start(*arguments)
        seen = steps_seen(killed)
        while process.poll() is None and steps_seen(killed) < seen + 2:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.2))
        os.killpg(process.pid, signal.SIGKILL)
        print(finish(process)[-300:], sorted(p.name for p in (killed / "checkpoints").iterdir()))
        assert process.returncode == -signal.SIGKILL, number
    run(*arguments)
    run("fit", "-c", str(config("sparse", tiny_model, straight)), *options)
    one, two = saved(straight), saved(killed)
    for key in ("state_dict", "optimizer_states", "rng_states", "counters", "global_step"):
        assert_same(one[key], two[key], key)
    assert one["global_step"] == 12


def steps_seen(folder: Path) -> int:
    """The most steps that the name of a checkpoint folder says."""
    names = [place.name for place in (folder / "checkpoints").glob("epoch*.ckpt")]
    return max((int(name.split("step=")[1].split(".")[0].split("-")[0]) for name in names), default=0)
