"""Validation with fixed completions; run as a program, on two gloo ranks, which test_validation.py compares with one.

What a row's completions say, and whether they are right, depends on its uid alone. Of the uids from 0 to 11 the
reward does not apply to 4 and 9, and to one completion only of 6.
"""

from __future__ import annotations

import json
import math
import random
import sys
from datetime import timedelta

import lightning.pytorch as lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from peft import LoraConfig

from datamodules.batches import TextBatch
from datamodules.loader import EvalLoader
from lightning_modules.grpo.rollout import Rollout, Scores, repeat_rows
from lightning_modules.grpo.validation import RolloutEvaluation
from lightning_modules.sampling import Completions, Sampling

# Per case the batches of uids of each of two ranks; one process gets all rows once, in order. Rows to fill up
# the last batch come twice, and a rank may have none.
CASES = {
    "even": ([[0, 2, 4], [6, 8, 10]], [[1, 3, 5], [7, 9, 11]]),
    "uneven": ([[0, 2], [4]], [[1], []]),
    "filled up": ([[0, 2], [4]], [[1, 3], [0]]),
    "all on one rank": ([[0, 1, 2, 3]], [[]]),
    "nothing applies": ([[4]], [[9]]),
}


def texts_of(uid: int, k: int) -> list[str]:
    """What the k completions of a row say."""
    draw = random.Random(uid)
    return [draw.choice(["", "one", " one\n", "two", "three"]) for _ in range(k)]


def success_of(uid: int, k: int) -> list[float]:
    """Whether they are right; `one` is, except where the reward does not apply."""
    right = [float(text.strip() == "one") for text in texts_of(uid, k)]
    if uid in (4, 9):
        return [math.nan] * k
    return [math.nan, *right[1:]] if uid == 6 else right


def length_of(uid: int, number: int) -> int:
    """Tokens of a completion; one of 3 or more is cut off."""
    return 1 + (uid + number) % 4


class FixedEval(RolloutEvaluation):
    def __init__(self, num_val_generations=4, reward_functions=(), answer=None, **kwargs):
        super().__init__(**kwargs)
        self.num_val_generations = num_val_generations
        self.val_sampling = Sampling(max_new_tokens=3)
        self.reward_functions = list(reward_functions)
        self.answer = answer

    def rollout(self, batch, num_generations, sampling):
        lengths = [length_of(uid, number) for uid in batch.uids for number in range(num_generations)]
        completions = Completions(
            [[1] * length for length in lengths],
            [text for uid in batch.uids for text in texts_of(uid, num_generations)],
            ["length" if length >= 3 else "stop" for length in lengths],
            [[0.0] * length for length in lengths],
        )
        return Rollout(
            repeat_rows(batch, num_generations), [[1]] * len(lengths), completions, num_generations
        )

    def score(self, rollout):
        k = rollout.group_size
        success = torch.tensor([one for uid in rollout.batch.uids[::k] for one in success_of(uid, k)])
        return Scores(success[:, None], success * 3 - 1, success, ["fixed"])


def text_batch(uids, task_of=lambda uid: "default") -> TextBatch:
    prompts = [f"prompt {uid}" for uid in uids]
    tasks = [task_of(uid) for uid in uids]
    return TextBatch(prompts, [""] * len(prompts), tasks, list(uids), {}, [[] for _ in uids])


def one_loader(batches, task_of=lambda uid: "default") -> EvalLoader:
    """A loader of the given batches; Lightning takes a list for several loaders."""
    return EvalLoader(lambda rows: text_batch(batches[rows[0]], task_of), len(batches), batch_size=1)


def by_kind(uid: int) -> str:
    """Three tasks, one of which has a slash in its name."""
    return ["even", "glue/odd", "third"][2 if uid % 3 == 0 else uid % 2]


def build(model: str, **arguments) -> FixedEval:
    lora = LoraConfig(r=2, target_modules="all-linear")
    return FixedEval(model=model, adapter=lora, **arguments)


def make_trainer(**options) -> lightning.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **options)


class PerRank(lightning.LightningDataModule):
    def __init__(self, batches_of_ranks):
        super().__init__()
        self.batches_of_ranks = batches_of_ranks

    def val_dataloader(self):
        return one_loader(self.batches_of_ranks[self.trainer.global_rank], by_kind)


def main(model: str, out: str) -> None:
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    trainer = make_trainer(devices=2, strategy=strategy)
    module = build(model)
    found = {}
    for name, batches in CASES.items():
        [found[name]] = trainer.validate(module, PerRank(batches), verbose=False)
    with open(f"{out}.{trainer.global_rank}", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
