"""Weights of half precision that are trained themselves: how many stand still is measured and said once."""

from __future__ import annotations

import re
import warnings
from functools import partial

import lightning.pytorch as lightning
import pytest
import torch
from peft import LoraConfig
from torch import nn

from datamodules.batches import TextBatch
from datamodules.loader import EvalLoader
from lightning_modules import SFTModule
from lightning_modules.half_precision import watch_half_precision

SAID = re.compile(
    r"Weights of (\w+) are trained themselves\. Measured at the first update: (\d+)% of those with"
)


def said(caught) -> list[tuple[str, ...]]:
    return [found.groups() for one in caught if (found := SAID.search(str(one.message)))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "optimizer",
    [partial(torch.optim.AdamW, eps=1e-4, weight_decay=0.0), torch.optim.SGD],
    ids=["adam", "sgd"],
)
def test_the_share_is_that_of_a_loop(dtype, optimizer):
    torch.manual_seed(0)
    layer = nn.Linear(40, 30).to(dtype)
    optim = optimizer(layer.parameters(), lr=1e-5)
    watch_half_precision(optim)
    counts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            # The first step has nothing to measure, and half of the columns never have.
            gradient = torch.randn(30, 40).to(dtype) * (torch.arange(40) < 20 * (step > 0))
            layer.weight.grad = gradient
            before = layer.weight.detach().clone()
            optim.step()
            pulled = gradient != 0
            counts.append((int(pulled.sum()), int((pulled & (layer.weight == before)).sum())))
    assert counts[0] == (0, 0)
    if dtype == torch.float32:
        assert said(caught) == []
    else:
        pulled, still = counts[1]
        assert still > 0.1 * pulled
        [(name, percent)] = said(caught)
        assert f"torch.{name}" == str(dtype)
        assert int(percent) == pytest.approx(100 * still / pulled, abs=0.51)


def rows() -> EvalLoader:
    def batch(uids):
        texts = [f"{uid}+1=" for uid in uids]
        return TextBatch(texts, ["x"] * len(uids), ["t"] * len(uids), list(uids), {}, [[] for _ in uids])

    return EvalLoader(batch, 6, 2)


@pytest.mark.parametrize(
    ("adapter", "dtype", "lr", "warns"),
    [
        (None, "bfloat16", 1e-5, True),
        (None, "bfloat16", 0.5, False),
        (None, "float32", 1e-5, False),
        (LoraConfig(r=2, target_modules="all-linear"), "bfloat16", 1e-5, False),
        # PEFT leaves whole modules in the type of the base.
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]), "bfloat16", 1e-5, True),
    ],
    ids=["full", "full, large steps", "full in float32", "lora", "lora and a whole module"],
)
def test_every_module_says_it(tiny_model, adapter, dtype, lr, warns):
    module = SFTModule(
        model=tiny_model,
        adapter=adapter,
        dtype=dtype,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, rows())
    assert len(said(caught)) == warns
