"""A loss or gradient that is NaN or infinite never reaches the weights."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from parallel_runs import learned, run, strategy_options, write_config

from lightning_modules import SFTModule
from lightning_modules.cli import main


class Spoiled(SFTModule):
    """Its loss is NaN in steps 2 and 3, on the last rank alone."""

    def row_weights(self, batch, tokens_B):
        weights = super().row_weights(batch, tokens_B)
        last = self.global_rank == self.trainer.world_size - 1
        return weights * float("nan") if self.global_step in (1, 2) and last else weights


def options(folder: Path, model: str, allowed: int) -> list[str]:
    config = write_config("sft_lora", model, folder)
    text = config.read_text().replace("class_path: SFTModule", "class_path: test_nonfinite_updates.Spoiled")
    config.write_text(text)
    return ["fit", "-c", str(config), f"--model.max_skipped_updates={allowed}"]


def counts(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    return [float(row["train/nonfinite_updates"]) for row in rows if row["train/nonfinite_updates"]]


def test_the_run_stops_with_the_weights_as_they_were(tiny_model, tmp_path, capsys):
    assert main(options(tmp_path, tiny_model, 0)) == 1
    err = capsys.readouterr().err
    assert "The gradient is not finite" in err
    assert "max_skipped_updates" in err


def test_skipped_updates_are_counted_and_change_nothing(tiny_model, tmp_path):
    assert main([*options(tmp_path / "a", tiny_model, 2)]) == 0
    assert counts(tmp_path / "a") == [0, 1, 2, 2, 2]
    checkpoint = torch.load(tmp_path / "a" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    assert checkpoint["counters"]["nonfinite_updates"] == 2
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
    assert main([*options(tmp_path / "b", tiny_model, 2), "--trainer.max_steps=3"]) == 0
    assert main([*options(tmp_path / "c", tiny_model, 2), "--trainer.max_steps=1"]) == 0
    one, three = learned(tmp_path / "c"), learned(tmp_path / "b")
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_one_more_in_a_row_stops(tiny_model, tmp_path, capsys):
    assert main(options(tmp_path, tiny_model, 1)) == 1
    assert "for the 2. time in a row" in capsys.readouterr().err


@pytest.mark.slow
def test_all_ranks_leave_out_the_same_update(tiny_model, tmp_path):
    """NaN on one rank of a sharded model."""
    run(*options(tmp_path, tiny_model, 2), *strategy_options("fsdp2", 2))
    assert counts(tmp_path) == [0, 1, 2, 2, 2]
    assert all(tensor.isfinite().all() for tensor in learned(tmp_path).values())
