"""Times Arrow's prototypes of 256 experts on all linear layers of SmolLM2-135M, ours and PEFT's 15 power steps.

    OMP_NUM_THREADS=2 python benchmarks/prototypes.py

Random factors of rank 8. Prints one JSON line: seconds for all 7 x 30 layers (each kind of layer is measured once and
counts thirty times), and the worst cosine to the true singular vector over 20 experts of each kind, found by a singular
value decomposition of the whole change in float64.
"""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version

import machine  # noqa: F401  (sets how long OpenMP's threads spin, before torch is imported)
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer

from lightning_modules.library.prototypes import arrow_prototypes

EXPERTS, RANK, LAYERS, CHECKED = 256, 8, 30, 20
SHAPES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
SHAPES |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}  # (out, in)


class Config:
    """What PEFT's layer reads."""

    top_k, router_temperature, use_gks, rng_seed = 1, 1.0, False, 0
    task_adapter_names, gks_adapter_names = [], []


def main() -> None:
    """Print the line."""
    torch.manual_seed(0)
    seconds = {"ours": 0.0, "peft": 0.0}
    worst = {"ours": 1.0, "peft": 1.0}
    for height, width in SHAPES.values():
        A, B = torch.randn(EXPERTS, RANK, width) / width**0.5, torch.randn(EXPERTS, height, RANK)
        peft = ArrowLoraLinearLayer(width, Config)
        found = {}
        start = time.perf_counter()
        found["ours"] = arrow_prototypes(A, B)
        middle = time.perf_counter()
        found["peft"] = torch.stack(
            [peft.top_right_singular_vec_from_BA(a, b) for a, b in zip(A, B, strict=True)]
        )
        end = time.perf_counter()
        seconds["ours"] += LAYERS * (middle - start)
        seconds["peft"] += LAYERS * (end - middle)
        for e in range(CHECKED):
            true = torch.linalg.svd(B[e].double() @ A[e].double(), full_matrices=False)[2][0]
            for key, vectors in found.items():
                worst[key] = min(worst[key], abs(float(vectors[e].double() @ true)))
    line = {f"{key}_s": round(value, 2) for key, value in seconds.items()}
    line |= {f"{key}_worst_cosine": round(value, 8) for key, value in worst.items()}
    line |= {"experts": EXPERTS, "threads": torch.get_num_threads()}
    line |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    print(json.dumps(line | {name: version(name) for name in ("torch", "peft")}))


if __name__ == "__main__":
    main()
