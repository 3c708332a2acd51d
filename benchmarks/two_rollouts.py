r"""Compares group sizes on a small model trained here: equal rollouts, equal prompts, equal time, five seeds.

    OMP_NUM_THREADS=1 python benchmarks/two_rollouts.py --out docs/results/two_rollouts.jsonl \
        --report docs/results/two_rollouts.md

A Llama of 0.1 million parameters first learns to add two numbers below 50 from answers of which many are wrong, more
for some prompts than for others: it then answers right with a probability between about 0.03 and 0.8, by prompt.
GRPO shall make it answer right always. An update has 128 rollouts, from 8 prompts x 16 to 64 x 2; clip 0.2/0.28,
population std and ten warm-up updates, as in arXiv 2510.00977. Each group size is first tried with four learning rates
(half the updates, a seed of its own); the best at equal rollouts counts. A run that is in the file already is not
repeated, so an interrupted study goes on; processes may share the work with --arms and --seeds. Time is measured last,
in one run of each group size: the processor time of its one thread, which others on the machine hardly move.
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
from importlib.metadata import version
from pathlib import Path

import machine  # noqa: F401  (sets how long OpenMP's threads spin, before torch is imported)

OPERAND, HELD_OUT, ROLLOUTS, UPDATES, EVERY = 50, 250, 128, 384, 8
RATES, GRID_SEED, TIMING_SEED = (2.0e-4, 4.0e-4, 8.0e-4, 1.6e-3), 0, -1
SEEDS = (1, 2, 3, 4, 5)
# Name: group size, and live groups of an update where dead ones are replaced.
ARMS: dict[str, tuple[int, int | None]] = {
    "16": (16, None),
    "8": (8, None),
    "4": (4, None),
    "2": (2, None),
    "2 + resampling": (2, 64),
}
BASE = Path("runs/two_rollouts/base")
CHARACTERS = "0123456789+="


def wrong_share(a: int, b: int) -> float:
    """Share of wrong answers that the base model sees of a prompt: 0.2 to 0.97."""
    return 0.2 + 0.77 * ((7 * a + 3 * b) % 11) / 10


def main() -> None:
    """Run what is missing, or write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not BASE.exists():
        make_base()
    trials = [(arm, GRID_SEED, lr, UPDATES // 2) for arm in options.arms for lr in RATES]
    for cell in trials:
        run(cell, options.out)
    best = best_rates(read(options.out))
    for seed in options.seeds:
        for arm in options.arms:
            run((arm, seed, best[arm], UPDATES), options.out)
    if options.report is not None:
        from two_rollouts_report import write_report

        for arm in options.arms:
            run((arm, TIMING_SEED, best[arm], UPDATES), options.out)
        write_report(read(options.out), options.report)


def read(path: Path) -> list[dict]:
    """The records of a file, none of a missing one."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def late_accuracy(record: dict) -> float:
    """Mean accuracy over the last quarter of a run, which one lucky measurement does not decide."""
    curve = record["curve"]
    return statistics.fmean(point[4] for point in curve[-len(curve) // 4 :])


def best_rates(records: list[dict]) -> dict[str, float]:
    """The learning rate of each arm that did best in the trials."""
    trials = [one for one in records if one["seed"] == GRID_SEED]
    return {
        arm: max((one for one in trials if one["arm"] == arm), key=late_accuracy)["lr"]
        for arm in {one["arm"] for one in trials}
    }


def run(cell: tuple[str, int, float, int], out: Path) -> None:
    """Train and write down, unless it was done."""
    arm, seed, lr, updates = cell
    if any((one["arm"], one["seed"], one["lr"], one["updates"]) == cell for one in read(out)):
        return
    record = train(arm, seed, lr, updates)
    with out.open("a") as file:
        file.write(json.dumps(record) + "\n")
    last = record["curve"][-1]
    print(f"{arm:16} seed {seed}, lr {lr:g}: {record['curve'][0][4]:.3f} -> {last[4]:.3f}", flush=True)


def make_tokenizer():
    """One token per character, and one that ends the answer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<end>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def make_base() -> None:
    """Train the starting policy and write it, once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    steps = 6000
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        a, b = torch.randint(OPERAND, (2, 128)).tolist()
        flip, shift = torch.rand(128).tolist(), torch.randint(1, 10, (128,)).tolist()
        # A wrong answer is off by 1 to 9, so that it is not told from a right one by its form.
        sums = [
            x + y + (s if x + y < OPERAND else -s) * (f < wrong_share(x, y))
            for x, y, f, s in zip(a, b, flip, shift, strict=True)
        ]
        texts = [f"{x:02d}+{y:02d}={z:02d}" for x, y, z in zip(a, b, sums, strict=True)]
        ids = torch.tensor([[*row, 0] for row in tokenizer(texts)["input_ids"]])
        labels = ids.clone()
        labels[:, :6] = -100
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 250 == 249:
            print(f"base, step {step + 1}: loss {loss.item():.3f}", flush=True)
    aside = BASE.with_name("base.part")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(BASE)


def train(arm: str, seed: int, lr: float, updates: int) -> dict:
    """One run; returns its learning curve."""
    import lightning.pytorch as lightning
    import torch

    from datamodules.base import TextDataModule
    from lightning_modules import ClippedSurrogate, GRPOModule
    from lightning_modules.grpo.compute import match_compute
    from lightning_modules.grpo.resampling import Resampling
    from lightning_modules.grpo.rewards import NumericAnswer
    from lightning_modules.sampling import GenerateSampler, Sampling

    class Additions(TextDataModule):
        """All additions of two numbers, some of them held out, the same ones for every run."""

        def rows(self, split):
            rows = [
                {"prompt": f"{a:02d}+{b:02d}=", "answer": str(a + b)}
                for a in range(OPERAND)
                for b in range(OPERAND)
            ]
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
            chosen = order[:HELD_OUT] if split == "val" else order[HELD_OUT:] if split == "train" else []
            return [rows[i] for i in chosen]

    class Curve(lightning.Callback):
        """Held-out accuracy over updates, prompts, rollouts and seconds of training, without those of measuring."""

        def __init__(self):
            self.points, self.prompts, self.seconds = [], 0, 0.0

        def on_train_batch_start(self, *_):
            self.start = time.process_time()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.seconds += time.process_time() - self.start
            self.prompts += len(batch.prompts)

        def on_validation_end(self, trainer, module):
            accuracy = float(trainer.callback_metrics["val/mean@8"])
            rollouts = self.prompts * module.num_generations
            seconds = round(self.seconds, 2) if seed == TIMING_SEED else None
            self.points.append([trainer.global_step, self.prompts, rollouts, seconds, round(accuracy, 4)])

    group_size, live = ARMS[arm]
    matched = match_compute(ROLLOUTS // 16, 16, lr, to=group_size)
    lightning.seed_everything(max(seed, 0), verbose=False)
    module = GRPOModule(
        model=str(BASE),
        rewards=[NumericAnswer()],
        chat_template=False,
        num_generations=group_size,
        sampling=Sampling(max_new_tokens=3),
        sampler=GenerateSampler(max_rows=4096),
        policy_loss=ClippedSurrogate((0.2, 0.28)),
        resampling=None if live is None else Resampling(live, max_rollouts=8 * ROLLOUTS),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10),
        num_val_generations=8,
    )
    data = Additions(batch_size=matched.prompts, val_batch_size=HELD_OUT, seed=max(seed, 0))
    curve = Curve()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=updates,
        val_check_interval=EVERY,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[curve],
    )
    start = time.perf_counter()
    trainer.fit(module, data)
    return {
        "command": "python benchmarks/two_rollouts.py",
        "arm": arm,
        "seed": seed,
        "lr": lr,
        "prompts_per_update": matched.prompts,
        "updates": updates,
        "columns": ["updates", "prompts", "rollouts", "seconds", "mean@8"],
        "curve": curve.points,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "lightning")},
    }


if __name__ == "__main__":
    main()
