"""Sparse adapters train, switch off, come off and go in where torch allows deterministic operations alone."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
from sparse_models import IDS, PHASES, assert_equal_states, load, setup, state, train

from lightning_modules.cli import main
from lightning_modules.sparse import scores
from lightning_modules.sparse.expert import SparseExpert
from lightning_modules.sparse.schedules import GrowAndDrop, OneShot

SPARSE = Path(__file__).resolve().parents[2] / "lightning_modules" / "sparse"


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(tiny_model, folder, **options):
    model, adapter, optim = setup(tiny_model, **options)
    train(model, optim, 4)
    with torch.no_grad():
        learned = model(input_ids=IDS).logits
        with adapter.disabled():
            base = model(input_ids=IDS).logits
        assert not torch.equal(base, learned)
        adapter.save(folder)
        adapter.remove()
        assert_equal_states(state(model), state(load(tiny_model)))
        expert = SparseExpert(folder).apply(model)
        assert torch.equal(model(input_ids=IDS).logits, learned)
        expert.remove()
        assert_equal_states(state(model), state(load(tiny_model)))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("budget", ["layer", "global"])
@pytest.mark.parametrize("structure", ["element", "row", "column", "block"])
def test_every_structure_and_budget(tiny_model, tmp_path, structure, budget):
    schedule = {"schedule": OneShot(2), "score": scores.sensitivity}
    check(
        tiny_model, tmp_path / "expert", structure=structure, budget=budget, block=4, density=0.2, **schedule
    )


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("phase", sorted(PHASES.keys() - {"observing", "dense"}))
def test_every_schedule(tiny_model, tmp_path, phase):
    options = {**PHASES[phase]}
    if phase == "replaced":
        options["schedule"] = GrowAndDrop(2, 99, fraction=0.5)
    check(tiny_model, tmp_path / "expert", **options)


def test_the_trainer_option(tiny_model, tmp_path, monkeypatch):
    from test_sparse_training import config

    monkeypatch.chdir(tmp_path)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for name in ("static", "first_epochs"):
            file = config(tmp_path / name, tiny_model, name, deterministic=True)
            assert main(["fit", "-c", file]) == 0
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before)
        lightning.seed_everything(0, verbose=False)


def test_nothing_is_called_that_is_not_deterministic_on_gpus():
    """Operations that torch refuses on GPUs are not called: put_, kthvalue, histc, median, a cumsum of floats."""
    for file in SPARSE.glob("*.py"):
        calls = {
            node.func.attr
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert not calls & {"put_", "kthvalue", "histc", "median"}, file
