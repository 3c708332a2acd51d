"""Runs the demo for several seeds and prints one JSON line per seed.

    python benchmarks/demo_seeds.py 1 2 3 >> docs/results/demo.jsonl

The seed moves the adapter's first weights, every sampled token, and which questions are held out.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "lightning")


def main(seeds: list[str]) -> None:
    """Run the demo once per seed, each in a folder of its own."""
    quiver = Path(sys.executable).with_name("quiver")
    for seed in seeds:
        arguments = ["fit", "-c", "grpo/demo.yaml", "--seed_everything", seed, "--data.seed", seed]
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            subprocess.run([quiver, *arguments], cwd=folder, check=True, stdout=sys.stderr)
            seconds = time.perf_counter() - start
            result = json.loads((Path(folder) / "runs/demo/held_out_gain.json").read_text())
        record = {
            "command": " ".join(["quiver", *arguments]),
            "seed": int(seed),
            **result,
            "seconds": round(seconds),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
            "python": platform.python_version(),
            "versions": {name: version(name) for name in PACKAGES},
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["1", "2", "3"])
