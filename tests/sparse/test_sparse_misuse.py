"""What users do to a model that carries a sparse adapter, and what must come of it."""

from __future__ import annotations

import copy

import pytest
import torch
from sparse_models import IDS, PHASES, load, loss_of, setup, state, train, trained
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_modules.sparse import scores
from lightning_modules.sparse.adapter import SparseAdapter
from lightning_modules.sparse.expert import SparseExpert
from lightning_modules.sparse.schedules import FirstEpochs, GrowAndDrop, OneShot, Static


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("phase", ["chosen", "dense", "kept"])
def test_save_pretrained_writes_the_changed_model(tiny_model, tmp_path, phase):
    model, _, optim = setup(tiny_model, **PHASES[phase])
    train(model, optim)
    assert not [name for name in model.state_dict() if "sparse" in name]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_weights_are_not_loaded_under_an_adapter(tiny_model):
    model, adapter, optim = setup(tiny_model, schedule=GrowAndDrop(2, 99))
    train(model, optim)
    snapshot, before = state(model), logits(model)
    with pytest.raises(ValueError, match=r"carries a sparse adapter.*adapter.load_state_dict"):
        model.load_state_dict(snapshot)
    assert torch.equal(logits(model), before)
    adapter.remove()
    model.load_state_dict(snapshot)
    assert torch.equal(logits(model), before)


def test_a_module_takes_one_adapter(tiny_model):
    model, adapter, _ = setup(tiny_model)
    base = {name: weight.clone() for name, weight in load(tiny_model).named_parameters()}
    with pytest.raises(ValueError, match="that no other adapter or hook has taken over"):
        SparseAdapter().attach(model)
    adapter.remove()
    assert all(torch.equal(weight, base[name]) for name, weight in model.named_parameters())
    wrapped = model.model.layers[0].self_attn.q_proj
    wrapped.forward = lambda x, original=wrapped.forward: 2 * original(x)
    with pytest.raises(ValueError, match="taken over"):
        SparseAdapter(["q_proj"]).attach(model)


def test_what_was_trainable_is_so_again(tiny_model):
    model = load(tiny_model)
    model.lm_head.weight.requires_grad_(False)
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert set(before.values()) == {True, False}
    with pytest.raises(ValueError, match="matches nothing"):
        SparseAdapter("nothing").attach(model)
    with pytest.raises(ValueError, match="zero everywhere"):
        SparseAdapter(score=scores.delta_magnitude, schedule=Static(0)).attach(model)
    adapter = SparseAdapter()
    adapter.attach(model)
    adapter.remove()
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == before


def test_an_expert_leaves_a_model_that_has_moved(tiny_model, tmp_path):
    model, adapter, optim = setup(tiny_model)
    train(model, optim)
    adapter.save(tmp_path / "expert")
    model = load(tiny_model)
    base = logits(model.double())
    model.float()
    expert = SparseExpert(tmp_path / "expert").apply(model)
    model.double()
    assert not torch.equal(logits(model), base)
    expert.remove()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("factor", [float("nan"), 1000.0])
def test_gradients_of_a_step_that_was_not_made_do_not_count(tiny_model, factor):
    indices = []
    for skips in (False, True):
        model, adapter, optim = setup(tiny_model, schedule=Static(1), score=scores.snip)
        if skips:
            (factor * loss_of(model, IDS.flip(1))).backward()
            optim.zero_grad()
        train(model, optim, steps=2)
        indices.append([weight.indices for weight in adapter.weights])
    assert all(map(torch.equal, *indices))


def test_a_copy_of_the_model_trains(tiny_model):
    model, _, _ = setup(tiny_model)
    twin = copy.deepcopy(model)
    before = logits(model)
    optim = torch.optim.SGD(trained(twin), lr=1.0)
    loss_of(twin).backward()
    optim.step()
    assert not torch.equal(logits(twin), before)
    assert torch.equal(logits(model), before)


def test_an_optimizer_must_train_all_of_it(tiny_model):
    model = load(tiny_model)
    adapter = SparseAdapter(schedule=OneShot(4))
    adapter.attach(model)
    with pytest.raises(ValueError, match=r"does not train 13 of 14 weights of the sparse adapter"):
        adapter.watch(torch.optim.SGD(trained(model)[:1], lr=1.0))


def test_training_without_watch_warns(tiny_model):
    model = load(tiny_model)
    SparseAdapter(schedule=Static(1)).attach(model)
    with pytest.warns(UserWarning, match="No optimiser is watched"):
        loss_of(model)


def test_attach_within_inference_mode(tiny_model):
    model = load(tiny_model)
    adapter = SparseAdapter(score=scores.random, schedule=Static(0))
    with torch.inference_mode():
        adapter.attach(model)
    adapter.watch(optim := torch.optim.SGD(trained(model), lr=1.0))
    train(model, optim, steps=1)
    assert adapter.weights[0].values.any()


def test_values_cast_after_the_start_are_refused(tiny_model):
    model, _, optim = setup(tiny_model)
    model.to(torch.bfloat16)
    loss_of(model).backward()
    with pytest.raises(ValueError, match="must stay float32"):
        optim.step()


@pytest.mark.parametrize("structure", ["element", "row", "column"])
@pytest.mark.parametrize("schedule", [Static(0), OneShot(9)])
def test_one_vector_as_input(structure, schedule):
    layer = nn.Sequential(nn.Linear(6, 8))
    adapter = SparseAdapter(["0"], 0.5, scores.random, structure, schedule=schedule)
    adapter.attach(layer)
    layer(torch.randn(6)).sum().backward()
    assert adapter.weights[0].values.grad.any()


@pytest.mark.parametrize(
    ("written", "steps", "read"),
    [
        ({"schedule": OneShot(4)}, 3, {"schedule": Static(2)}),
        ({"schedule": OneShot(8)}, 5, {"schedule": OneShot(4)}),
        ({"schedule": Static(4)}, 2, {"schedule": Static(1)}),
        ({"schedule": Static(4)}, 2, {"schedule": OneShot(8)}),
    ],
)
def test_a_checkpoint_that_would_never_choose_is_refused(tiny_model, written, steps, read):
    model, adapter, optim = setup(tiny_model, score=scores.snip, **written)
    train(model, optim, steps=steps)
    _, other, _ = setup(tiny_model, score=scores.snip, **read)
    before = other.state_dict()["schedule"].clone()
    with pytest.raises(ValueError, match="would never choose any from there"):
        other.load_state_dict(adapter.state_dict())
    assert torch.equal(other.state_dict()["schedule"], before)


@pytest.mark.parametrize("structure", ["element", "row", "column", "block"])
def test_a_checkpoint_of_another_density_is_refused(tiny_model, structure):
    _, adapter, _ = setup(tiny_model, structure=structure, density=0.5)
    _, other, _ = setup(tiny_model, structure=structure, density=0.1)
    with pytest.raises(ValueError, match=r"trains \d+ units .* but density=0.1"):
        other.load_state_dict(adapter.state_dict())
    setup(tiny_model, structure=structure, density=0.5)[1].load_state_dict(adapter.state_dict())


def test_a_resumed_run_knows_its_epoch(tiny_model):
    options = {"schedule": FirstEpochs(2), "score": scores.snip, "structure": "row"}
    model, adapter, optim = setup(tiny_model, **options)
    train(model, optim, steps=2)
    adapter.selection.prepare(epoch=1)
    assert not adapter.weights[0].observing
    _, other, _ = setup(tiny_model, **options)
    other.load_state_dict(adapter.state_dict())
    assert not other.weights[0].observing


def test_a_broken_expression_is_named(tiny_model):
    with pytest.raises(ValueError, match=r"target_modules='\(q_proj' is no regular expression"):
        SparseAdapter("(q_proj").attach(load(tiny_model))


def test_a_damaged_checkpoint_is_refused(tiny_model):
    _, adapter, _ = setup(tiny_model)
    state = {name: tensor for name, tensor in adapter.state_dict().items() if not name.endswith("indices")}
    with pytest.raises(ValueError, match=r"\d+ values for a weight of \d+ entries"):
        adapter.load_state_dict(state)
    full = {w.name + ".values": torch.zeros(w.weight.numel()) for w in adapter.weights}
    with pytest.raises(ValueError, match="lacks the indices of a choice"):
        adapter.load_state_dict({**full, "schedule": state["schedule"]})
