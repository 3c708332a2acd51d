"""One of two gloo processes that compute the gradients of some recipes; started by test_recipes."""

from __future__ import annotations

import sys
from datetime import timedelta

import lightning.pytorch as lightning
import torch
from ddp_worker import PerRankLoader
from fixed_rollouts import first_gradients
from lightning.pytorch.strategies import DDPStrategy
from recipes import RECIPES, build


def main(model: str, out: str, *uids: str) -> None:
    found = {}
    for recipe in RECIPES:
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=120)),
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        module = build(recipe, model, max_tokens_per_microbatch=100)
        found[recipe] = first_gradients(module, trainer, PerRankLoader(list(map(int, uids))))
    torch.save(found, f"{out}.{trainer.global_rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
