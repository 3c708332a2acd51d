"""Rewards that never apply, and what reward functions log, in real runs."""

from __future__ import annotations

import csv
import json
import sys
import warnings

import lightning.pytorch as lightning
import pytest
from lightning.pytorch.loggers import CSVLogger
from small_runs import LORA, write_run

from callbacks import HeldOutGain, RolloutTable
from datamodules import ArithmeticDataModule
from lightning_modules import GRPOModule
from lightning_modules.cli import main
from lightning_modules.grpo.metrics import OWN_METRICS, free_name
from lightning_modules.grpo.rollout_file import RolloutFile
from lightning_modules.grpo.scoring import Scoring
from lightning_modules.sampling import Sampling

HALF = "\ud83d"


def never(completions, **columns):
    return [None] * len(completions)


def lengths(completions, **columns):
    return [len(one) for one in completions]


def chatty(completions, log_extra, log_metric, **columns):
    """Logs under names that a run has itself, and half a surrogate pair."""
    for name in ("step", "reward", "uid", "reward/chatty", "advantage", "own"):
        log_extra(name, [f"{name}{HALF}"] * len(completions))
    for name in ("loss", "reward", "judged", "time/score"):
        log_metric(name, 123)
    completions.clear()
    return lengths(["a", "bb"]) * (columns["completion_ids"].__len__() // 2)


def leaves(text):
    sys.exit(0)


def fit(model, folder, rewards, *callbacks, steps=2, scoring=None, **options):
    module = GRPOModule(
        rewards=rewards,
        scoring=scoring or Scoring(),
        model=model,
        adapter=None,
        sampling=Sampling(max_new_tokens=3),
    )
    data = ArithmeticDataModule(max_operand=9, train_size=32, val_size=4, batch_size=2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=list(callbacks),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"num_sanity_val_steps": 0, "limit_val_batches": 0, **options},
    )
    trainer.fit(module, data)
    return trainer


def logged(folder):
    with (folder / "metrics.csv").open() as lines:
        return [row for row in csv.DictReader(lines) if row.get("train/reward") is not None]


def test_a_reward_that_never_applies_is_said_counted_and_said_again(tiny_model, tmp_path, capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            tiny_model,
            tmp_path,
            [never, lengths],
            HeldOutGain(),
            num_sanity_val_steps=-1,
            limit_val_batches=1.0,
            val_check_interval=2,
        )
    said = [str(one.message) for one in caught if "has a reward from" in str(one.message)]
    assert len(said) == 2
    assert said[0].startswith(
        "None of the completions of 4 prompts in validation has a reward from reward function 'never'"
    )
    assert said[1].startswith(
        "None of the 4 completions of the first step has a reward from reward function 'never'."
    )
    out = capsys.readouterr().out
    assert "judged no completion of 4 of 4 prompts" in out
    assert out.splitlines()[-2:] == [
        "No completion in validation had a reward from reward function 'never'.",
        "No completion in training had a reward from reward function 'never'.",
    ]
    first, *_ = [row for row in logged(tmp_path) if row["train/reward"]]
    assert [
        float(first[f"train/{name}"]) for name in ("no_reward", "no_reward/never", "no_reward/lengths")
    ] == [0, 1, 0]
    assert any(row["val/no_reward/never"] == "1.0" for row in logged(tmp_path))


def test_a_run_without_any_reward_stops(tiny_model, tmp_path, capsys):
    with pytest.raises(
        ValueError, match=r"No completion of 3 steps in a row had a reward from reward function 'never'"
    ):
        fit(tiny_model, tmp_path, [never], steps=9, scoring=Scoring(patience=3))
    fit(tiny_model, tmp_path / "short", [never])
    assert capsys.readouterr().out.splitlines()[-1] == "Nothing was learned from rewards."


def test_what_a_reward_logs_replaces_nothing_of_ours(tiny_model, tmp_path):
    with pytest.warns(UserWarning, match=r"log_metric\('loss'\) has the name of a metric of this run"):
        trainer = fit(tiny_model, tmp_path, [chatty], RolloutTable())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert (
        metrics["train/judged"]
        == metrics["train/log_metric/loss"]
        == metrics["train/log_metric/reward"]
        == 123
    )
    assert "train/loss" not in metrics
    assert metrics["train/reward"] == 1.5
    assert metrics["train/time/score"] < 123
    # What a run logs is what a reward function may not.
    ours = {name.split("/")[1] for name in metrics if name.startswith("train/")} - {"judged", "log_metric"}
    assert ours <= OWN_METRICS
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4
    for row in rows:
        assert row["reward"] == row["reward/chatty"] in (1, 2)
        assert row["own"] == f"own{HALF}"
        assert row["log_extra/step"] == f"step{HALF}"
        assert row["log_extra/reward/chatty"] == f"reward/chatty{HALF}"
    reader = RolloutFile(tmp_path / "rollouts.jsonl")
    assert [one.reward for one in reader] == [row["reward"] for row in rows]
    assert main(["rollouts", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("name", "free"),
    [
        ("judged", "judged"),
        ("reward/mine", "log_metric/reward/mine"),
        ("sums/mean@4", "log_metric/sums/mean@4"),
    ],
)
def test_names_of_metrics(name, free):
    assert free_name(name) == free


def test_a_hook_of_the_user_that_exits_is_an_error(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = {
        "scoring": {"answer": "test_missing_rewards.leaves"},
        "num_val_generations": 2,
        "adapter": LORA,
    }
    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(__file__).parent))
    file = write_run(tiny_model, init_args=settings)
    assert main(["validate", "-c", file]) == 1
    assert "called sys.exit(0) during `quiver validate`" in capsys.readouterr().err
