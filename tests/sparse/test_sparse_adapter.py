"""SparseAdapter in ordinary training loops: accumulation, ties, checkpointing, optimiser state."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from sparse_models import (
    CHOSEN,
    IDS,
    assert_equal_states,
    load,
    loss_of,
    setup,
    state,
    train,
    trained,
)
from torch import nn

from lightning_modules.sparse import scores
from lightning_modules.sparse.schedules import GrowAndDrop, OneShot, Static


@pytest.mark.parametrize(
    "options",
    [
        CHOSEN,
        {"schedule": Static(1), "score": scores.snip},
        {"schedule": OneShot(2), "score": scores.gradient_magnitude},
    ],
    ids=["chosen", "observing", "dense"],
)
def test_two_halves_make_the_gradient_and_the_choice_of_the_whole(tiny_model, options):
    results = []
    for parts in ([IDS], [IDS[:1], IDS[1:]]):
        # A choice from equal gradients up to rounding may differ where scores are almost equal; SGD does not
        # blow rounding up, as Adam does.
        model, adapter, optim = setup(tiny_model, optimizer=torch.optim.SGD, density=0.02, **options)
        for _ in range(3):
            optim.zero_grad()
            for part in parts:
                (loss_of(model, part) / len(parts)).backward()
            norm = torch.nn.utils.clip_grad_norm_(trained(model), 0.05)
            optim.step()
        assert norm > 0.05  # it is clipped
        results.append((adapter.deltas, norm))
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=1e-4)
    for name, whole in results[0][0].items():
        halves = results[1][0][name]
        assert torch.equal(whole.indices, halves.indices)
        torch.testing.assert_close(whole.values, halves.values, atol=1e-6, rtol=0)
    assert any(delta.values.abs().max() > 1e-4 for delta in results[0][0].values())


def test_clipping_sees_the_norm_of_the_chosen_entries(tiny_model):
    model, adapter, _ = setup(tiny_model)
    loss_of(model).backward()
    reference = load(tiny_model)
    loss_of(reference).backward()
    expected = torch.cat(
        [reference.get_parameter(w.name).grad.flatten()[w.indices.long()] for w in adapter.weights]
    )
    norm = torch.nn.utils.clip_grad_norm_(trained(model), 0.1)
    torch.testing.assert_close(norm, expected.norm())
    clipped = torch.cat([w.values.grad for w in adapter.weights])
    torch.testing.assert_close(clipped, expected * 0.1 / expected.norm(), rtol=1e-4, atol=1e-7)


def test_a_bfloat16_base_rounds_what_is_written_not_what_is_learned(tiny_model):
    model, adapter, optim = setup(tiny_model, dtype=torch.bfloat16, optimizer=torch.optim.SGD)
    base = load(tiny_model, torch.bfloat16)
    before = state(base)
    for weight in adapter.weights:
        assert weight.values.dtype == torch.float32
    for _ in range(3):
        train(model, optim, 1)
        for weight in adapter.weights:
            expected = before[weight.name].clone()
            at = weight.indices.long()
            expected.view(-1)[at] = (expected.view(-1)[at].float() + weight.values.detach()).bfloat16()
            assert torch.equal(weight.weight, expected)
            assert weight.weight.dtype == torch.bfloat16
    # Updates far below the precision of bfloat16 show nothing in the weight, but add up.
    adapter.remove()
    model, adapter, _ = setup(tiny_model, dtype=torch.bfloat16)
    small = torch.optim.SGD(trained(model), lr=1.0)
    adapter.watch(small)
    weight = adapter.weights[0]
    for i in range(1, 201):
        for one in adapter.weights:
            one.values.grad = torch.full_like(one.values, -(2.0**-16))
        small.step()
        assert torch.equal(weight.values.detach(), torch.full_like(weight.values, i * 2.0**-16))
        if i == 1:
            assert torch.equal(weight.weight, before[weight.name])
    assert not torch.equal(weight.weight, before[weight.name])
    adapter.remove()
    assert_equal_states(state(model), before)


def test_a_tied_weight_gets_its_gradient_through_embedding_and_head(tiny_model):
    for targets in (["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]):
        model, adapter, _ = setup(tiny_model, target_modules=targets)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        [weight] = adapter.weights
        reference = load(tiny_model)
        loss_of(reference).backward()
        loss_of(model).backward()
        expected = reference.lm_head.weight.grad.flatten()[weight.indices.long()]
        torch.testing.assert_close(weight.values.grad, expected)
    detached = load(tiny_model)
    detached.lm_head.weight = nn.Parameter(detached.lm_head.weight.detach().clone())
    loss_of(detached).backward()
    for one in (detached.lm_head, detached.model.embed_tokens):  # neither path alone is the whole
        alone = one.weight.grad.flatten()[weight.indices.long()]
        assert (alone - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options", [CHOSEN, {"schedule": Static(2)}, {"schedule": OneShot(9)}], ids=["chosen", "static", "dense"]
)
def test_gradient_checkpointing_makes_equal_gradients(tiny_model, options):
    results = []
    for checkpointing in (False, True):
        model, adapter, optim = setup(tiny_model, optimizer=torch.optim.SGD, **options)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        train(model, optim, 1)
        optim.zero_grad()
        loss_of(model).backward()
        observed = [weight.observed for weight in adapter.weights if weight.observed is not None]
        assert len(observed) == (14 if options["schedule"] == Static(2) else 0)
        results.append([p.grad for p in trained(model)] + [w.detach() for w in trained(model)] + observed)
    assert any(one.abs().max() > 0 for one in results[0])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [CHOSEN, {"schedule": OneShot(9)}], ids=["chosen", "dense"])
def test_gradient_checkpointing_keeps_no_inputs_of_layers(tiny_model, options):
    alive = {}
    for checkpointing in (False, True):
        model, _, _ = setup(tiny_model, **options)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = []
        layers = [m for n, m in model.named_modules() if n.endswith("down_proj")]
        for layer in layers:
            layer.register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(weakref.ref(args[0]))
            )
        loss = loss_of(model)
        gc.collect()
        alive[checkpointing] = sum(one() is not None for one in inputs)
        loss.backward()
    assert alive == {False: 2, True: 0}


def test_optimiser_state_has_the_size_of_the_values(tiny_model):
    model, adapter, optim = setup(tiny_model, density=0.05)
    train(model, optim, 1)
    count = sum(max(1, w.weight.numel() * 5 // 100) for w in adapter.weights)
    assert count == sum(len(w.values) for w in adapter.weights)
    moments = [t for s in optim.state.values() for t in s.values() if t.dim()]
    assert sum(t.numel() * t.element_size() for t in moments) == 2 * 4 * count
    assert len(optim.state) == len(adapter.weights) == 14
    held = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if "sparse" in n)
    assert held == 2 * 4 * count  # indices and base entries


@pytest.mark.parametrize("phase", ["replaced", "dense to chosen"])
def test_moments_follow_their_entries(tiny_model, phase):
    schedule = GrowAndDrop(2, 99, fraction=0.5) if phase == "replaced" else OneShot(2)
    model, adapter, optim = setup(
        tiny_model, target_modules=["q_proj"], density=0.2, schedule=schedule, score=scores.gradient_magnitude
    )
    train(model, optim, 1)
    spread = []
    # What the optimiser holds just before the choice: it runs after the optimiser's own step.
    own = adapter.selection.after_step

    def after_step(*arguments):
        for weight in adapter.weights:
            size, indices = weight.weight.numel(), weight.delta.indices.long()
            moment = {k: v for k, v in optim.state[weight.values].items() if k != "step"}
            spread.append({k: torch.zeros(size).index_copy(0, indices, v) for k, v in moment.items()})
        held.update({w.name: set(w.delta.indices.tolist()) for w in adapter.weights})
        own(*arguments)

    held: dict = {}
    adapter.selection.after_step = after_step
    train(model, optim, 1)
    for weight, before in zip(adapter.weights, spread, strict=True):
        now = optim.state[weight.values]
        kept = torch.tensor([i in held[weight.name] for i in weight.indices.tolist()])
        assert kept.any()
        assert kept.all() == (phase != "replaced")
        assert now["step"] == 2
        for name, expected in before.items():
            moment = now[name]
            assert moment.shape == weight.values.shape
            assert torch.equal(moment[kept], expected[weight.indices.long()][kept])
            assert moment[kept].any()
            assert not moment[~kept].any()
    assert set(optim.state) == {w.values for w in adapter.weights} == set(optim.param_groups[0]["params"])
    train(model, optim, 1)
    assert all(optim.state[w.values]["step"] == 3 for w in adapter.weights)


def test_a_closure_is_as_good_as_a_plain_step(tiny_model):
    results = []
    for use in ("plain", "argument", "keyword"):
        model, adapter, optim = setup(tiny_model, schedule=Static(2), score=scores.snip)

        def closure(model=model, optim=optim):
            optim.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        losses = []
        for _ in range(4):
            if use == "plain":
                losses.append(closure())
                optim.step()
            else:
                losses.append(optim.step(closure) if use == "argument" else optim.step(closure=closure))
        results.append((losses, adapter.deltas))
    for losses, deltas in results[1:]:
        assert losses == results[0][0]
        for name, delta in deltas.items():
            assert torch.equal(delta.indices, results[0][1][name].indices)
            assert torch.equal(delta.values, results[0][1][name].values)
    assert any(delta.values.any() for delta in deltas.values())


class Hidden(torch.optim.Optimizer):
    """Writes past autograd's version counter, as optimisers with kernels of their own do."""

    def __init__(self, parameters, lr) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=group["lr"])


def test_an_optimiser_that_writes_past_the_version_counter_is_noticed(tiny_model):
    results = []
    for optimizer in (torch.optim.SGD, Hidden):
        model, _, optim = setup(tiny_model, optimizer=optimizer, lr=0.1)
        train(model, optim)
        results.append(state(model))
    assert_equal_states(*results)
