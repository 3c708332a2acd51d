"""The base model comes back bit for bit: disabled, removed, in every phase."""

from __future__ import annotations

import pytest
import torch
from sparse_models import (
    IDS,
    PHASES,
    assert_equal_states,
    load,
    loss_of,
    setup,
    state,
    train,
    trained,
)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_disabled_and_removed_it_is_the_base_model_bit_for_bit(tiny_model, phase, dtype):
    base = load(tiny_model, dtype)
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
    model, adapter, optim = setup(tiny_model, dtype=dtype, lr=0.05, **PHASES[phase])
    train(model, optim)
    with torch.no_grad():
        learned = model(input_ids=IDS).logits
    assert torch.equal(learned, expected) == (phase == "observing")

    def is_base():
        with torch.no_grad():
            return torch.equal(model(input_ids=IDS).logits, expected)

    with adapter.disabled():
        assert is_base()
        assert_equal_states({n: w for n, w in state(model).items() if n in state(base)}, state(base))
        with adapter.disabled():
            assert is_base()
        assert is_base()
    with pytest.raises(RuntimeError, match="inside"), adapter.disabled():
        raise RuntimeError("inside")
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, learned)

    adapter.remove()
    assert_equal_states(state(model), state(base))
    assert is_base()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in base.named_parameters()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in base.named_buffers()]
    assert not any("forward" in vars(module) for module in model.modules())
    assert not model._forward_pre_hooks
    model.requires_grad_(True)
    loss_of(model).backward()
    loss_of(base).backward()
    for ours, theirs in zip(model.parameters(), base.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("phase", ["chosen", "dense", "replaced"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_disabled_between_a_forward_pass_and_its_backward_pass(tiny_model, phase, checkpointing):
    """As a KL term does; and a forward pass inside has gradients of nothing that is trained."""
    results = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model, adapter, optim = setup(tiny_model, lr=0.05, **PHASES[phase])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        train(model, optim)
        optim.zero_grad()
        loss = loss_of(model)
        if interrupted:
            with torch.no_grad(), adapter.disabled():
                assert not torch.equal(loss_of(model), loss)
        loss.backward()
        results.append([p.grad.clone() for p in trained(model)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert max(g.abs().max() for g in results[0]) > 1e-3


def test_generation_equals_that_of_a_model_with_the_change_added(tiny_model):
    for phase in ("chosen", "dense", "kept"):
        model, adapter, optim = setup(tiny_model, lr=0.2, **PHASES[phase])
        train(model, optim, 5)
        merged = load(tiny_model).eval()
        with torch.no_grad():
            for name, delta in adapter.deltas.items():
                merged.get_parameter(name).add_(delta.dense())
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(IDS)
        ours = model.eval().generate(IDS, attention_mask=mask, **options)
        assert torch.equal(ours, merged.generate(IDS, attention_mask=mask, **options))
        with adapter.disabled():
            assert not torch.equal(ours, model.generate(IDS, attention_mask=mask, **options))
