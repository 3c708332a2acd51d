"""What may be trained, and what is refused without a trace."""

from __future__ import annotations

import math

import pytest
import torch
from sparse_models import (
    CHOSEN,
    assert_equal_states,
    load,
    loss_of,
    setup,
    state,
    trained,
)
from torch import nn

from lightning_modules.sparse import scores
from lightning_modules.sparse.adapter import SparseAdapter
from lightning_modules.sparse.schedules import FirstEpochs, GrowAndDrop, OneShot, Static
from lightning_modules.sparse.targets import find_targets


def test_the_three_forms_of_target_modules(tiny_model):
    model = load(tiny_model)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert len(linears) == 14
    assert find_targets(model, "all-linear") == linears
    assert find_targets(model, ["q_proj", "layers.1.mlp.up_proj"]) == [
        n for n in linears if n.endswith("q_proj") or n.endswith("1.mlp.up_proj")
    ]
    assert find_targets(model, r".*\.1\..*(q|k)_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    ]
    adapter = SparseAdapter(["q_proj"], **CHOSEN)
    adapter.attach(model)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == [f"model.layers.{i}.self_attn.q_proj.sparse_values" for i in (0, 1)]
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert find_targets(plain, "all-linear") == ["0", "2"]


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "nope"], r"nothing in the model is called \['nope'\]. Its linear layers are down_proj"),
        ("q_proj", "target_modules='q_proj' matches nothing in the model"),
        ([], "matches nothing"),
        (["input_layernorm"], "input_layernorm is a LlamaRMSNorm. Sparse adapters train plain"),
        (["mlp"], "mlp is a LlamaMLP"),
        ("extra", "extra is a Scaled"),
        ("norm", "norm is a LayerNorm"),
        ("renormed", "renormed is a Embedding"),
        ("whole", "whole is a Linear"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_no_trace(tiny_model, targets, message):
    model = load(tiny_model)
    if isinstance(targets, str) and targets != "q_proj":
        model.extra, model.norm = Scaled(2, 2), nn.LayerNorm(2)
        model.renormed = nn.Embedding(4, 2, max_norm=1.0)
        model.whole = nn.Linear(2, 2)
        model.whole.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        SparseAdapter(targets, **CHOSEN).attach(model)
    assert_equal_states(state(model), before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("budget", ["layer", "global"])
def test_scores_without_an_order_leave_the_model_as_it_was(tiny_model, budget):
    def broken(weight, delta, gradient):
        return weight * math.nan

    model = load(tiny_model)
    before = state(model)
    for score, message in (
        (scores.signed_sensitivity, "score=signed_sensitivity is zero everywhere in .* Scores that multiply"),
        (broken, r"1024 of 1024 scores are NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseAdapter(score=score, schedule=Static(0), budget=budget).attach(model)
        assert_equal_states(state(model), before)
        assert not any("forward" in vars(module) for module in model.modules())
        assert not model._forward_pre_hooks
    SparseAdapter(**CHOSEN, budget=budget).attach(model)  # it still can be adapted


@pytest.mark.parametrize("bad", ["zero", "nan"])
def test_a_choice_in_training_that_fails_says_why(tiny_model, bad):
    score = scores.signed_sensitivity if bad == "zero" else scores.snip
    model, adapter, optim = setup(tiny_model, schedule=Static(1), score=score)
    before = {name: delta.indices.clone() for name, delta in adapter.deltas.items()}
    loss = loss_of(model) * (math.nan if bad == "nan" else 1)
    loss.backward()
    with pytest.raises(ValueError, match="scores are NaN" if bad == "nan" else "zero everywhere"):
        optim.step()
    for name, delta in adapter.deltas.items():
        assert torch.equal(delta.indices, before[name])
        assert not adapter.selection.was_chosen


def test_values_in_low_precision_are_refused(tiny_model):
    model = load(tiny_model)
    adapter = SparseAdapter(**CHOSEN)
    adapter.attach(model)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"must stay float32. Set trainer.precision: 32-true"):
        adapter.watch(torch.optim.SGD(trained(model), lr=1))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"density": 0}, "density=0"),
        ({"density": 1.5}, "density=1.5"),
        ({"structure": "ring"}, "structure='ring'"),
        ({"structure": "block", "block": 0}, "block=0"),
        ({"budget": "galaxy"}, "budget='galaxy'"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        SparseAdapter(**option)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Static(-1),
        lambda: OneShot(0),
        lambda: OneShot(5, batches=0),
        lambda: FirstEpochs(0),
        lambda: FirstEpochs(epochs=0),
        lambda: GrowAndDrop(every=0),
        lambda: GrowAndDrop(fraction=0),
        lambda: GrowAndDrop(fraction=1.1),
    ],
)
def test_schedules_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()
