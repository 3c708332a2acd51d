"""Times a library of 1,000 adapters: adding one, listing all.

    python benchmarks/library_store.py [--adapters 1000]

The library is filled with small adapters through `AdapterLibrary.add`; what is timed then is adding one of rank 8 on q
and v of SmolLM2-135M (1.9 MB) ten times, opening the library, and the whole of `quiver library list` beside
`quiver library list` of an empty library, which is its start-up. Prints one JSON line; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lightning_modules.library.publish import write_expert
from lightning_modules.library.store import AdapterLibrary


def adapter(folder: Path, layers: int) -> Path:
    """Write an adapter."""
    folder.mkdir()
    shapes = [
        (f"model.layers.{i}.self_attn.{p}_proj", out)
        for i in range(layers)
        for p, out in (("q", 576), ("v", 192))
    ]
    write_expert(
        folder, {name: (torch.randn(8, 576), torch.randn(out, 8), 2.0) for name, out in shapes}, "base"
    )
    return folder


def seconds(call, repeats: int) -> float:
    """Median of some calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=1000)
    count = parser.parse_args().adapters
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        small, large = adapter(root / "small", 1), adapter(root / "large", 30)
        library = AdapterLibrary(root / "library", create=True)
        AdapterLibrary(root / "empty", create=True)
        for number in range(count):
            library.add(small, f"expert_{number}", tasks=[f"task_{number}"])
        added = iter(range(100))
        add = seconds(lambda: library.add(large, f"large_{next(added)}", tasks=["one"]), 10)
        opened = seconds(lambda: len(AdapterLibrary(root / "library")), 10)
        script = "import sys; from lightning_modules.cli import main; sys.exit(main(sys.argv[1:]))"

        def show(name: str) -> None:
            command = [sys.executable, "-c", script, "library", "list", str(root / name)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        line = {
            "adapters": count,
            "add_ms": round(add * 1e3, 1),
            "open_ms": round(opened * 1e3, 1),
            "list_s": round(seconds(lambda: show("library"), 3), 2),
            "list_empty_s": round(seconds(lambda: show("empty"), 3), 2),
            "index_kb": (root / "library" / "index.json").stat().st_size // 1024,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        line["list_after_startup_s"] = round(line["list_s"] - line["list_empty_s"], 2)
        print(json.dumps(line))


if __name__ == "__main__":
    main()
