"""Values written into weights of few digits: what is lost is measured on the real weights, and said once."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from sparse_models import CHOSEN, PHASES, load, setup, state, train

from lightning_modules.sparse import scores
from lightning_modules.sparse.adapter import SparseAdapter
from lightning_modules.sparse.expert import SparseExpert
from lightning_modules.sparse.schedules import OneShot, Static

SAID = re.compile(
    r"rounded to (\w+)\. Measured after the first update: (\d+)% of the (\d+) changed entries have not moved, "
    r"(\d+)% of the norm of the change arrives, and its relative error is (\d\.\d+)"
)


def said(caught) -> list[tuple[str, ...]]:
    return [found.groups() for one in caught if (found := SAID.search(str(one.message)))]


def trained_with_warnings(folder, steps=3, **options):
    """Return the warnings after each step, and the adapter."""
    model, adapter, optim = setup(folder, **options)
    heard = []
    for _ in range(steps):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, optim, 1)
        heard.append(said(caught))
    return heard, model, adapter


def lost(model, adapter, base, dtype):
    """Share of changed entries that stand still, and relative error, of the weights that the model computes with."""
    before, after = state(base), state(model)
    wanted, arrived = [], []
    for name, delta in adapter.deltas.items():
        chosen = delta.indices.long()
        wanted.append(delta.values.double())
        moved = after[name].to(dtype).double() - before[name].to(dtype).double()
        arrived.append(moved.flatten()[chosen])
        assert torch.equal(moved.flatten().count_nonzero(), arrived[-1].count_nonzero())
    wanted, arrived = torch.cat(wanted), torch.cat(arrived)
    changed = wanted != 0
    still = (arrived == 0) & changed
    return float(still.sum() / changed.sum()), float((arrived - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    "options",
    [CHOSEN, {"schedule": Static(0), "score": scores.random}, PHASES["dense"], PHASES["replaced"]],
    ids=["large weights", "random weights", "dense phase", "replaced"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_first_update_says_what_is_lost(tiny_model, options, dtype):
    lr = 1e-4 if dtype == torch.bfloat16 else 1e-5  # float16 has three binary digits more
    heard, model, adapter = trained_with_warnings(tiny_model, 1, dtype=dtype, lr=lr, **options)
    unmoved, error = lost(model, adapter, load(tiny_model, dtype), dtype)
    assert error > 0.05
    [(name, percent, changed, _, told)] = heard[0]
    assert f"torch.{name}" == str(dtype)
    assert int(percent) == pytest.approx(100 * unmoved, abs=0.51)
    assert float(told) == pytest.approx(error, abs=0.0051)
    assert int(changed) == sum(int(delta.values.count_nonzero()) for delta in adapter.deltas.values())
    measured = adapter.rounding.measure(adapter.weights)
    assert (measured.unmoved, measured.error) == pytest.approx((unmoved, error))


def test_it_is_said_once_and_again_once_after_a_resume(tiny_model):
    options = {"dtype": torch.bfloat16, "lr": 1e-4}
    heard, _, adapter = trained_with_warnings(tiny_model, 3, **options)
    assert [len(one) for one in heard] == [1, 0, 0]
    model, resumed, optim = setup(tiny_model, **options)
    resumed.load_state_dict(adapter.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optim, 3)
    assert len(said(caught)) == 1


def test_a_schedule_that_observes_first_is_measured_when_it_trains(tiny_model):
    options = {"schedule": Static(2), "score": scores.snip, "dtype": torch.bfloat16, "lr": 1e-4}
    assert [len(one) for one in trained_with_warnings(tiny_model, 4, **options)[0]] == [0, 0, 1, 0]


def test_nothing_is_said_where_nothing_is_lost(tiny_model):
    for options in ({"dtype": torch.float32, "lr": 1e-4}, {"dtype": torch.bfloat16, "lr": 0.5}):
        heard, _, adapter = trained_with_warnings(tiny_model, 2, **options)
        assert heard == [[], []]
        assert adapter.rounding.measure(adapter.weights).error < 0.05


@pytest.mark.parametrize("schedule", [Static(0), OneShot(9)], ids=["chosen", "dense"])
def test_a_float32_base_under_autocast_is_rounded_too(tiny_model, schedule):
    model, adapter, optim = setup(tiny_model, lr=1e-4, score=scores.random, schedule=schedule)
    with (
        warnings.catch_warnings(record=True) as caught,
        torch.autocast("cpu", torch.bfloat16),
    ):
        warnings.simplefilter("always")
        train(model, optim, 2)
    [(name, *_)] = said(caught)
    assert name == "bfloat16"
    assert any("trainer.precision: 32-true" in str(one.message) for one in caught)
    _, error = lost(model, adapter, load(tiny_model), torch.bfloat16)
    assert adapter.rounding.measure(adapter.weights).error == pytest.approx(error)


def test_an_expert_says_what_its_model_loses(tiny_model, tmp_path):
    model = load(tiny_model)
    adapter = SparseAdapter(density=0.2, **CHOSEN)
    adapter.attach(model)
    for weight in adapter.weights:
        weight.put(weight.indices, torch.full_like(weight.values, 1e-5))
    adapter.save(tmp_path / "small")
    for weight in adapter.weights:
        weight.put(weight.indices, torch.full_like(weight.values, 0.5))
    adapter.save(tmp_path / "large")
    with pytest.warns(UserWarning, match=r"small: bfloat16 keeps \d+\.\d% of the norm of its change"):
        expert = SparseExpert(tmp_path / "small").apply(load(tiny_model, torch.bfloat16))
    expert.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparseExpert(tmp_path / "small").apply(load(tiny_model))
        SparseExpert(tmp_path / "large").apply(load(tiny_model, torch.bfloat16))
