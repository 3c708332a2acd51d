"""Times the start of the command line: medians of five, in the same minute, as JSON lines.

python benchmarks/startup.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

QUIVER = str(Path(sys.executable).with_name("quiver"))
COMMANDS = {
    "quiver --help": [QUIVER, "--help"],
    "quiver fit -c configs/grpo/demo.yaml --print_config": [
        QUIVER,
        "fit",
        "-c",
        "grpo/demo.yaml",
        "--print_config",
    ],
    "import lightning.pytorch.cli": [sys.executable, "-c", "import lightning.pytorch.cli"],
}


def seconds(command: list[str]) -> float:
    """Run a command once and return its wall-clock time."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Alternate between the commands, so that a busy moment meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(5):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(
            json.dumps(
                {"command": name, "median_s": round(median, 3), "times_s": [round(t, 3) for t in times[name]]}
            )
        )
    _, configured, imported = medians.values()
    print(json.dumps({"ratio of --print_config to the import": round(configured / imported, 2)}))


if __name__ == "__main__":
    main()
