"""RolloutTable, LearningCurve and HeldOutGain in real runs, through crashes and resumes."""

from __future__ import annotations

import json
import math
import re

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig
from PIL import Image

from callbacks import HeldOutGain, LearningCurve, RolloutTable
from datamodules import ArithmeticDataModule
from lightning_modules import GRPOModule, SFTModule
from lightning_modules.grpo.evaluation import mean_interval, paired_gain
from lightning_modules.grpo.scoring import Scoring
from lightning_modules.sampling import Sampling

G, PROMPTS, STEPS = 2, 3, 6


def picky(completions, answer, log_extra, **columns):
    """A reward of 0 to 6 that says nothing about sums that end in 5, and logs awkward values."""
    log_extra("note", [f"caf\u00e9\u2028{i}\x85" for i in range(len(completions))])
    log_extra("odd", [np.float64("nan"), {"x": np.arange(2)}] * (len(completions) // 2))
    return [
        None if gold.endswith("5") else float(sum(map(ord, text)) % 7)
        for text, gold in zip(completions, answer, strict=True)
    ]


class Crash(lightning.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx + 1 == self.step:
            raise RuntimeError("crash")


class Outputs(lightning.Callback):
    """Keeps what the steps returned."""

    def __init__(self):
        self.train, self.validations = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.train.append(outputs)

    def on_validation_start(self, *_):
        self.validations.append({})

    def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
        uids = outputs["rollout"].batch.uids[:: outputs["rollout"].group_size]
        self.validations[-1] |= dict(zip(uids, outputs["success"].float().mean(1).tolist(), strict=True))


def fit(model, folder, *callbacks, ckpt_path=None, module=None, **options):
    """Train for 6 steps with a checkpoint after each second one; validate every third."""
    lightning.seed_everything(5, verbose=False)
    module = module or GRPOModule(
        rewards=[picky],
        scoring=Scoring(success=3),
        model=model,
        adapter=LoraConfig(r=4, target_modules="all-linear"),
        num_generations=G,
        num_val_generations=2,
        sampling=Sampling(max_new_tokens=12, temperature=2.0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
    )
    options = {"num_sanity_val_steps": -1, "val_check_interval": 3, **options}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[
            *callbacks,
            ModelCheckpoint(
                folder / "checkpoints", filename="{step}", every_n_train_steps=2, save_top_k=-1, monitor=None
            ),
        ],
        **options,
    )
    data = ArithmeticDataModule(batch_size=PROMPTS, train_size=PROMPTS * STEPS, val_size=8, val_batch_size=5)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def crash_and_resume(model, folder, make, spoil=lambda: None):
    """Crash in step 6, after the checkpoint of step 4 and before the one of step 6; then go on."""
    with pytest.raises(RuntimeError, match="crash"):
        fit(model, folder, *make(), Crash(STEPS))
    spoil()
    callbacks = make()
    fit(model, folder, *callbacks, ckpt_path=str(folder / "checkpoints" / "step=4.ckpt"))
    return callbacks


def read(file) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = file.read_bytes().split(b"\n")
    assert lines.pop() == b""
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.fixture(scope="module")
def straight(tiny_model, tmp_path_factory):
    """An uninterrupted run: its folder, what its steps returned, its learning curve."""
    folder = tmp_path_factory.mktemp("straight")
    outputs, curve = Outputs(), LearningCurve(window=2)
    fit(tiny_model, folder, RolloutTable(groups_per_step=2), curve, outputs)
    return folder, outputs, curve


def test_rollouts_are_whole_groups_of_each_step(straight):
    folder, outputs, _ = straight
    rows = read(folder / "rollouts.jsonl")
    assert len(rows) == STEPS * 2 * G
    for step, output in enumerate(outputs.train, start=1):
        ours = [row for row in rows if row["step"] == step]
        rollout = output["rollout"]
        assert [row["completion"] for row in ours] == rollout.completions.texts[: 2 * G]
        assert [row["tokens"] for row in ours] == [len(ids) for ids in rollout.completions.token_ids[: 2 * G]]
        assert [row["uid"] for row in ours] == rollout.batch.uids[: 2 * G]
        for group in (ours[:G], ours[G:]):
            assert len({row["uid"] for row in group}) == 1
        advantages = [row["advantage"] for row in ours]
        assert advantages == pytest.approx(output["advantages"][: 2 * G].tolist(), abs=1e-6)
        total = [None if math.isnan(x) else x for x in output["scores"].total[: 2 * G].tolist()]
        assert [row["reward"] for row in ours] == total
        assert [row["reward/picky"] for row in ours] == total
    assert {row["reward"] is None for row in rows} == {True, False}
    assert len({row["advantage"] for row in rows}) > 2
    assert {row["finish"] for row in rows} == {"stop", "length"}
    assert rows[0]["note"] == "caf\u00e9\u20280\x85"
    assert rows[0]["odd"] is None
    assert rows[1]["odd"] == {"x": [0, 1]}


def test_a_resumed_run_continues_the_rollouts(tiny_model, tmp_path, straight):
    def half_a_line():
        with (tmp_path / "rollouts.jsonl").open("ab") as file:
            file.write('{"step": 6, "completion": "caf\u00e9'.encode()[:-1])  # ends inside a character

    crash_and_resume(tiny_model, tmp_path, lambda: [RolloutTable(groups_per_step=2)], half_a_line)
    assert (tmp_path / "rollouts.jsonl").read_bytes() == (straight[0] / "rollouts.jsonl").read_bytes()
    assert not (tmp_path / "rollouts.1.jsonl").exists()


def test_a_second_run_keeps_the_files_of_the_first(tiny_model, tmp_path):
    for _ in range(2):
        fit(tiny_model, tmp_path, RolloutTable(groups_per_step=99), LearningCurve(), max_steps=1)
    first, second = (read(tmp_path / name) for name in ("rollouts.1.jsonl", "rollouts.jsonl"))
    assert len(first) == PROMPTS * G  # no more groups than there are
    assert second == first  # the same seed
    for name in ("learning_curve.1.png", "learning_curve.png"):
        assert Image.open(tmp_path / name).format == "PNG"


@pytest.mark.parametrize("name", ["groups_per_step", "table_every_n_steps"])
def test_rollout_table_refuses_zero(name):
    with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
        RolloutTable(**{name: 0})


def test_the_learning_curve_continues(tiny_model, tmp_path, straight):
    folder, outputs, whole = straight
    [resumed] = crash_and_resume(tiny_model, tmp_path, lambda: [LearningCurve(window=2)])
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.state_dict()["steps"] == list(range(1, STEPS + 1))
    lengths = [output["rollout"].lengths.float().mean().item() for output in outputs.train]
    assert whole.state_dict()["values"]["train/completion_length"] == pytest.approx(lengths)
    assert (tmp_path / "learning_curve.png").read_bytes() == (folder / "learning_curve.png").read_bytes()


def test_the_learning_curve_names_what_is_wrong(monkeypatch):
    with pytest.raises(ValueError, match="window=0: must be at least 1"):
        LearningCurve(window=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'lightning-quiver\[plots\]'"):
        LearningCurve()


def printed(before, after) -> list[str]:
    uids = sorted(before)
    first, last = [before[uid] for uid in uids], [after[uid] for uid in uids]
    intervals = (mean_interval(first), mean_interval(last), paired_gain(first, last))
    return [f"{m:.3f}  [{low:.3f}, {high:.3f}]" for m, low, high in intervals]


def test_held_out_gain(tiny_model, tmp_path, capsys):
    outputs = Outputs()
    fit(tiny_model, tmp_path, HeldOutGain(), outputs)
    before, _, after = outputs.validations  # sanity check, step 3, step 6
    assert len(before) == 8
    assert before != after
    out = capsys.readouterr().out
    assert "Held-out accuracy over 8 prompts" in out
    assert re.findall(r"(?:before training|after training|gain) +(.*\])", out) == printed(before, after)


def test_a_resumed_run_keeps_the_accuracy_from_before_training(tiny_model, tmp_path, capsys):
    kept = []

    def make():
        kept.append(Outputs())
        return [HeldOutGain(), kept[-1]]

    crash_and_resume(tiny_model, tmp_path, make)
    before, after = kept[0].validations[0], kept[1].validations[-1]
    lines = re.findall(r"(?:before training|after training|gain) +(.*\])", capsys.readouterr().out)
    assert lines == printed(before, after)  # once: the crashed part claims nothing


@pytest.mark.parametrize("batches", [0, 2])
def test_held_out_gain_needs_the_whole_validation_set(tiny_model, tmp_path, batches):
    with pytest.raises(ValueError, match=f"only {batches} batches. Set trainer.num_sanity_val_steps: -1"):
        fit(tiny_model, tmp_path, HeldOutGain(), num_sanity_val_steps=batches)


def test_held_out_gain_names_a_module_that_has_no_success(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"SFTModule does not return them.*Use it with GRPOModule"):
        fit(tiny_model, tmp_path, HeldOutGain(), module=SFTModule(model=tiny_model))
