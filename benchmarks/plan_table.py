"""Plans 2-GRPO of 1.5B, 7B and 70B models on 1, 8, 64 and 512 GPUs, full fine-tuning and LoRA.

    python benchmarks/plan_table.py --folder FOLDER [--output docs/results/plan_table.jsonl]
    python benchmarks/plan_table.py --table docs/results/plan_table.jsonl

The first form writes FOLDER/MODEL/config.json (the shapes of Qwen2.5-1.5B, Qwen2.5-7B and Llama-3.1-70B, without
weights), FOLDER/MODEL-full.yaml, FOLDER/MODEL-lora.yaml and FOLDER/fsdp2.yaml, plans each in this process, and prints a
JSON line for each with the command that prints the same plan. The second form makes a table of such lines, and scales
rows of 64 and 512 ranks from those of 8 where they are missing.

Each rank draws two completions of 1,024 tokens for each of 8 prompts of 512 tokens, and trains with at most 8,192
tokens a forward pass and gradient checkpointing. One GPU trains in bf16-mixed precision; several are sharded, compute
in bfloat16 and exchange gradients in float32. Fully trained weights are float32, frozen ones below a LoRA bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

GIB = 2**30
DEVICES = (1, 8, 64, 512)
SHAPES = {
    "1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "70b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
LORA = {
    "class_path": "peft.LoraConfig",
    "init_args": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
}
SHARDED = {
    "class_path": "lightning_modules.fsdp2.FSDP2Strategy",
    "init_args": {"param_dtype": "bfloat16", "reduce_dtype": "float32"},
}


def write_configurations(folder: Path) -> None:
    """Write model folders and YAML files; JSON is YAML."""
    overlay = {"trainer": {"strategy": SHARDED, "precision": "32-true"}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fsdp2.yaml").write_text(json.dumps(overlay, indent=1))
    for name, shape in SHAPES.items():
        (folder / name).mkdir(exist_ok=True)
        config = {"max_position_embeddings": 32768, **shape}
        (folder / name / "config.json").write_text(json.dumps(config, indent=1))
        for learned, adapter in {"full": None, "lora": LORA}.items():
            module = {
                "model": name,
                "adapter": adapter,
                "dtype": "bfloat16" if adapter else "float32",
                "rewards": [{"class_path": "lightning_modules.grpo.rewards.NumericAnswer"}],
                "num_generations": 2,
                "sampling": {"max_new_tokens": 1024},
                "max_tokens_per_microbatch": 8192,
                "gradient_checkpointing": True,
            }
            run = {
                "model": {"class_path": "GRPOModule", "init_args": module},
                "data": {
                    "class_path": "JsonlDataModule",
                    "init_args": {"train_file": "train.jsonl", "batch_size": 8},
                },
                "trainer": {"accelerator": "gpu", "precision": "bf16-mixed"},
            }
            (folder / f"{name}-{learned}.yaml").write_text(json.dumps(run, indent=1))


def plans(folder: Path, models: list[str], devices: list[int]) -> list[dict]:
    """Plan each model, method and number of GPUs."""
    from lightning_modules.planning.command import make_plan

    os.chdir(folder)
    results = []
    for count in devices:
        for model in models:
            for learned in ("lora", "full"):
                files = [f"{model}-{learned}.yaml", *(["fsdp2.yaml"] if count > 1 else [])]
                lengths = ["--gpu", "H100-80GB", "--prompt_tokens", "512"]
                arguments = [*files, "--devices", str(count), *lengths]
                start = time.monotonic()
                facts = make_plan(arguments).data()
                row = {"benchmark": "plan_table", "size": model, "learned": learned}
                row["command"] = f"quiver plan {' '.join(arguments)}"
                row |= facts | {"model": model, "seconds": round(time.monotonic() - start)}
                print(json.dumps(row), flush=True)
                results.append(row)
    return results


def scaled(row: dict, devices: int) -> dict:
    """Return the row of another number of ranks: state is divided by it, (n - 1) / n of the same bytes is sent.

    Exact but for padding, because micro-batches follow each other and so the same state is there in all of a phase.
    """
    from lightning_modules.planning.gpus import find_gpu

    ratio = row["devices"] / devices
    phases = {}
    for name, kinds in row["phases"].items():
        divided = {
            kind: kinds[kind] for kind in ("weights", "gradients", "optimiser moments") if kind in kinds
        }
        shards = {kind: round(size * ratio) for kind, size in divided.items()}
        phases[name] = kinds | shards
        phases[name]["peak"] += sum(shards.values()) - sum(divided.values())
    share = (devices - 1) / devices / ((row["devices"] - 1) / row["devices"])
    peak = max(phase["peak"] for phase in phases.values())
    return row | {
        "devices": devices,
        "shards": devices,
        "scaled_from": row["devices"],
        "command": row["command"].replace(f"--devices {row['devices']}", f"--devices {devices}"),
        "phases": phases,
        "peak": peak,
        "sent_per_step": {name: round(size * share) for name, size in row["sent_per_step"].items()},
        "verdict": find_gpu(row["gpu"]).verdict(peak),
    }


def table(rows: list[dict]) -> str:
    """Return the rows as Markdown, those of 64 and 512 ranks scaled from 8 where they were not planned themselves."""
    have = {(row["size"], row["learned"], row["devices"]) for row in rows}
    rows = rows + [
        scaled(row, devices)
        for row in rows
        if row["devices"] == 8
        for devices in (64, 512)
        if (row["size"], row["learned"], devices) not in have
    ]
    lines = [
        "| model | learned | GPUs | state a rank | generate | update | sent a step | H100-80GB | command |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = {name: i for i, name in enumerate(SHAPES)}
    for row in sorted(rows, key=lambda r: (order[r["size"]], r["learned"], r["devices"])):
        phases = row["phases"]
        state = phases["decode"]["weights"] + phases["decode"].get("optimiser moments", 0)
        generate = max(phases[name]["peak"] for name in ("prefill", "decode"))
        update = max(phases[name]["peak"] for name in ("backward", "step"))
        command = (
            row["command"].removeprefix("quiver plan ").removesuffix(" --gpu H100-80GB --prompt_tokens 512")
        )
        cells = [
            row["size"],
            row["learned"],
            f"{row['devices']}",
            f"{state / GIB:.2f}",
            f"{generate / GIB:.1f}",
            f"{update / GIB:.1f}",
            f"{row['sent_per_step']['total'] / GIB:.1f}",
            row["verdict"],
            f"`{command}`",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--devices", nargs="+", type=int, default=DEVICES)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    if options.folder is None:
        parser.error("give --folder, where configurations are written to, or --table")
    output = options.output.resolve() if options.output else None
    write_configurations(options.folder)
    rows = plans(options.folder, options.models, options.devices)
    if output:
        output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
