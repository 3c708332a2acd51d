"""Runs for test_contrast_view.py: a tiny policy, rewards, and a measurement on one rank or two when started."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig

from callbacks import ContrastView
from datamodules import ArithmeticDataModule
from lightning_modules import GRPOModule
from lightning_modules.grpo.scoring import Scoring
from lightning_modules.sampling import Sampling

STEPS, PROMPTS, TEMPERATURE = 4, 4, 2.0


def parity(completions, log_metric, **columns):
    """1 for about half of all completions; logs how many it saw."""
    log_metric("seen", len(completions))
    return [float(sum(map(ord, text)) % 2) for text in completions]


def moody(completions, log_metric, **columns):
    """Rewards that depend on the state of every random generator."""
    luck = random.random() + np.random.rand() + float(torch.rand(()))
    plain = parity(completions, log_metric)
    return [reward + luck * len(text) for reward, text in zip(plain, completions, strict=True)]


def never(completions, **columns):
    return [0.0] * len(completions)


def unknown(completions, **columns):
    return [None] * len(completions)


def build(model, *, reward=parity, lr=0.05, **options) -> GRPOModule:
    lightning.seed_everything(5, verbose=False)
    options.setdefault("adapter", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return GRPOModule(
        rewards=[reward],
        scoring=Scoring(success=1),
        model=model,
        sampling=Sampling(max_new_tokens=12, temperature=TEMPERATURE),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
        **options,
    )


def fit(module, folder, *callbacks, ckpt_path=None, steps=STEPS, batch_size=PROMPTS, **options):
    """Train with a checkpoint after each step."""
    checkpoint = ModelCheckpoint(
        folder / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1, monitor=None
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[*callbacks, checkpoint],
        **options,
    )
    data = ArithmeticDataModule(
        batch_size=batch_size, train_size=PROMPTS * steps, val_size=4, val_batch_size=4
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def view(**options) -> ContrastView:
    small = {"every_n_steps": 2, "prompts": 3, "completions": 8, "sizes": (2, 4, 8), "sketch_dim": 512}
    return ContrastView(**{**small, **options})


def read(file) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]


def measure_once(model, folder, ranks) -> None:
    """One measurement over all prompts of a step, before which the policy does not move."""
    share = PROMPTS // int(ranks)
    fit(
        build(model, lr=0.0),
        Path(folder),
        view(steps=[1], prompts=share),
        steps=1,
        batch_size=share,
        devices=int(ranks),
        strategy="auto" if int(ranks) == 1 else "ddp",
    )


if __name__ == "__main__":
    measure_once(*sys.argv[1:])
