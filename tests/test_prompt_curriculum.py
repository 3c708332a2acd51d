"""Prompts that teach more come more often, in proportion, and also after an interruption."""

from __future__ import annotations

import math
from collections import Counter

import lightning.pytorch as lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from callbacks import PromptCurriculum
from datamodules.base import TextDataModule
from datamodules.splits import weighted
from lightning_modules import GRPOModule
from lightning_modules.grpo.curriculum import PassRates, uncertainty
from lightning_modules.sampling import Sampling

ROWS = 32


class Numbers(TextDataModule):
    def rows(self, split):
        return [{"prompt": f"{i}?", "answer": str(i)} for i in range(ROWS)] if split == "train" else []


def by_row(completions, answer, **columns):
    """Rows below 24 always succeed; of the others every second completion does."""
    return [1.0 if int(row) < 24 or i % 2 else 0.0 for i, row in enumerate(answer)]


class Seen(lightning.Callback):
    def __init__(self):
        self.uids = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.uids += batch.uids


class SaveAt(lightning.Callback):
    """Saves once, in the middle of a run."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def run(model, epochs, *others, ckpt_path=None):
    lightning.seed_everything(1, verbose=False)
    module = GRPOModule(
        rewards=[by_row],
        model=model,
        adapter=LoraConfig(r=2, target_modules=["q_proj"]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        sampling=Sampling(max_new_tokens=2),
    )
    seen, curriculum = Seen(), PromptCurriculum()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen, curriculum, *others],
    )
    trainer.fit(module, Numbers(batch_size=8), ckpt_path=ckpt_path)
    return seen.uids, curriculum


def test_prompts_that_differ_come_more_often(tiny_model):
    uids, curriculum = run(tiny_model, 4)
    assert sorted(uids[:ROWS]) == list(range(ROWS))  # nothing is known in the first epoch
    assert all(curriculum.pass_rates[uid] > 0.8 for uid in range(24))
    counts = Counter(uid >= 24 for uid in uids[ROWS:])
    weights = [uncertainty(curriculum.pass_rates[uid]) for uid in range(ROWS)]
    expected = 3 * ROWS * sum(weights[24:]) / sum(weights)
    assert counts[True] > 1.5 * 3 * 8  # far more than their share
    assert abs(counts[True] - expected) < 12  # weights have moved a little since


def test_an_interrupted_run_sees_the_same_prompts(tiny_model, tmp_path):
    whole, _ = run(tiny_model, 3, SaveAt(6, tmp_path / "c.ckpt"))  # in the middle of the second epoch
    rest, curriculum = run(tiny_model, 3, ckpt_path=tmp_path / "c.ckpt")
    assert rest == whole[6 * 8 :]
    assert len(curriculum.pass_rates) == ROWS


@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=30).filter(lambda w: sum(w) > 0.1),
    key=st.integers(0, 10**6),
)
def test_entries_come_as_often_as_their_weight_says(weights, key):
    order = torch.arange(len(weights)) + 100
    counts = Counter(weighted(order, torch.tensor(weights), key).tolist())
    assert sum(counts.values()) == len(weights)
    for i, weight in enumerate(weights):
        share = weight / sum(weights) * len(weights)
        assert math.floor(share - 1e-4) <= counts[100 + i] <= math.ceil(share + 1e-4)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, math.nan]), max_size=4), max_size=6))
def test_pass_rates_are_decayed_means(visits):
    rates = PassRates(decay=0.5, prior=0.25)
    for one in visits:
        rates.observe(3, one)
    known = [[x for x in one if not math.isnan(x)] for one in visits]
    known = [one for one in known if one]
    ages = [0.5 ** (len(known) - 1 - i) for i in range(len(known))]
    passed = sum(age * sum(one) for age, one in zip(ages, known, strict=True))
    count = sum(age * len(one) for age, one in zip(ages, known, strict=True))
    assert rates[3] == pytest.approx((passed + 0.25) / (count + 1))
    assert rates[4] == 0.25


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), "3,.* weights for 32 training rows"),
        (-torch.ones(ROWS), "not negative"),
        (torch.zeros(ROWS), "not all 0"),
        (torch.full((ROWS,), math.nan), "finite"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Numbers().weigh_rows(weights)
