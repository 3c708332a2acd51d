"""Precisions of the Trainer: two work, and the others are refused in a line, before anything is loaded."""

from __future__ import annotations

import lightning.pytorch as lightning
import pytest
from lightning.pytorch.plugins import HalfPrecision
from small_runs import write_rows, write_run

from lightning_modules import SFTModule
from lightning_modules.cli import main
from lightning_modules.precision import check_precision


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


REFUSED = [
    ("SFTModule", "bf16-true", "model.dtype: bfloat16"),
    ("GRPOModule", "bf16-true", "model.dtype: bfloat16"),
    ("SFTModule", "16-true", "model.dtype: float16"),
    ("GRPOModule", "64-true", "Set trainer.precision: 32-true or bf16-mixed."),
    ("GRPOModule", "64", "Set trainer.precision: 32-true or bf16-mixed."),
    ("SFTModule", "16-mixed", "Set trainer.precision: 32-true or bf16-mixed."),
    ("GRPOModule", "16", "Set trainer.precision: 32-true or bf16-mixed."),
    ("SFTModule", "transformer-engine", "Set trainer.precision: 32-true or bf16-mixed."),
]


@pytest.mark.parametrize("command", ["fit", "plan"])
@pytest.mark.parametrize(("module", "precision", "remedy"), REFUSED)
def test_precisions_that_are_refused(tiny_model, tmp_path, capsys, command, module, precision, remedy):
    name = write_run(tiny_model, module=module)
    start = ["fit", "-c", name] if command == "fit" else ["plan", name]
    assert main([*start, "--trainer.precision", precision]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "quiver: error" in line]
    assert len(lines) == 1
    assert f"trainer.precision={precision} is not supported." in lines[0]
    assert remedy in lines[0]
    assert not (tmp_path / "run").exists()


def test_a_plugin_is_refused_too_and_nothing_is_loaded(tmp_path):
    """There is no model in the folder, which loading would say."""
    trainer = lightning.Trainer(plugins=HalfPrecision("bf16-true"), accelerator="cpu", barebones=True)
    module = SFTModule(model=str(tmp_path))
    with pytest.raises(ValueError, match=r"trainer\.precision=bf16-true is not supported"):
        trainer.validate(module, [0])


@pytest.mark.parametrize("precision", [None, 32, "32", "32-true", "bf16", "bf16-mixed"])
def test_precisions_that_work(precision):
    assert check_precision(precision) == str(precision).startswith("bf16")


@pytest.mark.parametrize(
    ("module", "more"),
    [("SparseAdapterModule", []), ("AdapterLibraryModule", ["--model.router", "UniformRouter"])],
)
def test_other_modules_refuse_them_before_they_look_for_a_model(tmp_path, capsys, module, more):
    write_rows("train.jsonl")
    data = ["--data", "JsonlDataModule", "--data.train_file", "train.jsonl"]
    arguments = ["fit", "--model", module, "--model.model", str(tmp_path / "none"), *more, *data]
    assert main([*arguments, "--trainer.accelerator", "cpu", "--trainer.precision", "bf16-true"]) == 1
    assert "trainer.precision=bf16-true is not supported." in capsys.readouterr().err
