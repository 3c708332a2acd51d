"""Shared prompts and the chunked head equal plain padded rows: values and gradients, whatever is trained."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MistralConfig, Qwen2Config

from lightning_modules import prefix
from lightning_modules.adapters import FullFineTuning, PeftAdapter
from lightning_modules.headless import can_chunk, chunked_logprobs
from lightning_modules.logprobs import completion_logits, token_entropy, token_logprobs
from lightning_modules.microbatches import completion_passes, pad_pairs, pad_rows
from lightning_modules.prefix import (
    can_share,
    plan_shared_micro_batches,
    prompt_keys,
    share_prompts,
    shared_logprobs,
)
from lightning_modules.sparse.adapter import SparseAdapter
from lightning_modules.sparse.schedules import Static
from lightning_modules.sparse.scores import random

CPU = torch.device("cpu")
TINY = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
SMALL = TINY | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}
# Ragged, of different group sizes, one prompt alone, and one that comes back after another.
PROMPTS = [[5, 6, 7, 8, 9]] * 3 + [[11, 12]] + [[5, 6, 7, 8, 9]] + [[3] * 9] * 2
COMPLETIONS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [2, 2], [9, 8, 7], [1], [30, 31, 32, 33]]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def lora(model):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return PeftAdapter(config).attach(model)


def full(model):
    return FullFineTuning().attach(model)


def sparse(model):
    adapter = SparseAdapter(density=0.2, score=random, schedule=Static(batches=0))
    model = adapter.attach(model)
    for weight in adapter.weights:
        torch.nn.init.normal_(
            weight.values, std=0.1
        )  # not written yet: the forward hook of the model does it
    return model


ADAPTERS = {"lora": lora, "full": full, "sparse": sparse}


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)  # else attention is uniform and distributions are flat
    return model


def plain(model, prompts, completions, temperature=1.0):
    """The twin: whole padded rows, all logits."""
    ids, attention, mask = pad_pairs(prompts, completions, pad_token_id=0, device=CPU)
    T = mask.shape[1]
    logits = completion_logits(model, ids, attention, T, temperature)
    return token_logprobs(logits, ids[:, -T:]) * mask, token_entropy(logits) * mask


def chunked(model, prompts, completions, temperature=1.0, entropy_gradient=True):
    rows = pad_rows(prompts, completions, pad_token_id=0, device=CPU)
    return chunked_logprobs(model, rows, temperature=temperature, entropy_gradient=entropy_gradient)


def shared(model, prompts, completions, temperature=1.0, entropy_gradient=True):
    rows = share_prompts(prompts, completions, pad_token_id=0, device=CPU)
    return shared_logprobs(model, rows, temperature=temperature, entropy_gradient=entropy_gradient)


def values_and_gradients(function, model, prompts, completions, **options):
    logprobs, entropy = function(model, prompts, completions, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(2, *logprobs.shape, generator=generator)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = (logprobs * upstream[0]).sum() + 0.1 * (entropy * upstream[1]).sum()
    return logprobs.detach(), entropy.detach(), torch.autograd.grad(loss, trained)


def assert_twins(function, model, prompts, completions, gradient_tolerance=1e-5, **options):
    ours = values_and_gradients(function, model, prompts, completions, **options)
    theirs = values_and_gradients(plain, model, prompts, completions, **options)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-4, rtol=0)
    flat = [torch.cat([gradient.flatten() for gradient in one[2]]) for one in (ours, theirs)]
    assert flat[1].norm() > 1e-2  # there is something to compare
    assert (flat[0] - flat[1]).norm() < gradient_tolerance * flat[1].norm()


@pytest.mark.parametrize("function", [chunked, shared])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("training", [True, False])
def test_equals_plain_rows(tiny_model, function, adapter, training):
    model = ADAPTERS[adapter](load(tiny_model)).train(training)
    assert can_share(model) is None
    assert model.training is training
    assert_twins(function, model, PROMPTS, COMPLETIONS, temperature=0.7)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_completions_in_passes_by_their_lengths_equal_plain_rows(tiny_model, monkeypatch, adapter):
    monkeypatch.setattr(prefix, "_SPARED_CPU", 1)
    model = ADAPTERS[adapter](load(tiny_model))
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    lengths = [len(ids) for ids in COMPLETIONS]
    passes = completion_passes(lengths, 1)
    assert len(passes) == len(set(lengths)) > 2
    shared(model, PROMPTS, COMPLETIONS)
    assert len(runs) == 1 + len(passes)
    assert_twins(shared, model, PROMPTS, COMPLETIONS, temperature=0.7)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 60))
def test_a_further_pass_spares_what_it_must(lengths, spared):
    passes = completion_passes(lengths, spared)
    assert sorted(row for rows in passes for row in rows) == list(range(len(lengths)))
    padded = [len(rows) * max(lengths[row] for row in rows) for rows in passes]
    assert sum(padded) <= len(lengths) * max(lengths) - spared * (len(passes) - 1)
    for rows in passes:  # and none that would spare as much is left out
        ordered = sorted((lengths[row] for row in rows), reverse=True)
        assert all((ordered[0] - length) * (len(rows) - i) < spared for i, length in enumerate(ordered))


@pytest.mark.parametrize("completions", [[[4], [9]], [[4, 5], [9]]])
def test_single_tokens(tiny_model, completions):
    assert_twins(shared, lora(load(tiny_model)), [[1, 2, 3]] * 2, completions)


def test_one_token_alone_still_runs_both_passes_forward_and_backward(tiny_model):
    """A rank that has a filler row only must run as many passes as the others under sharding."""
    model = lora(load(tiny_model))
    layer = model.get_base_model().model.layers[0]
    passes = {"forward": 0, "backward": 0}
    layer.register_forward_hook(lambda *_: passes.update(forward=passes["forward"] + 1))
    layer.register_full_backward_hook(lambda *_: passes.update(backward=passes["backward"] + 1))
    model.enable_input_require_grads()
    shared(model, [[3]], [[4]])[0].sum().backward()
    assert passes == {"forward": 2, "backward": 2}


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SMALL, tie_word_embeddings=False),
        GPT2Config(vocab_size=60, n_layer=2, n_head=4, n_embd=32, n_positions=24),
    ],
    ids=["qwen2", "gpt2"],
)
@pytest.mark.parametrize("function", [chunked, shared])
def test_other_architectures(config, function):
    model = full(random_model(config).eval())  # GPT-2 has dropout
    assert can_share(model) is None
    assert_twins(function, model, PROMPTS, COMPLETIONS)


@pytest.fixture(scope="module")
def tiny_lora(tiny_model):
    return lora(load(tiny_model))


tokens = st.integers(1, 250)
groups = st.lists(
    st.tuples(
        st.lists(tokens, min_size=1, max_size=9),
        st.lists(st.lists(tokens, min_size=1, max_size=7), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=4,
)


@given(groups=groups, order=st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_equals_plain_rows_of_any_shape_in_any_order(tiny_lora, groups, order):
    rows = [(prompt, completion) for prompt, completions in groups for completion in completions]
    order.shuffle(rows)
    prompts, completions = zip(*rows, strict=True)
    assert_twins(shared, tiny_lora, prompts, completions, gradient_tolerance=5e-5)


def test_each_distinct_prompt_is_forwarded_once(tiny_model):
    model = load(tiny_model)
    seen = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    shared(model, PROMPTS, COMPLETIONS)
    assert seen == [(3, 9), (7, 5)]


def test_without_gradient_nothing_is_recorded(tiny_model):
    with torch.no_grad():
        logprobs, entropy = shared(lora(load(tiny_model)), PROMPTS, COMPLETIONS)
    assert not logprobs.requires_grad
    assert not entropy.requires_grad


def test_rows_are_announced_before_each_pass_and_kinds_keep_prompts_apart(tiny_model, monkeypatch):
    heard = []
    rows = share_prompts(
        [[1, 2]] * 4, [[3]] * 4, pad_token_id=0, device=CPU, kinds=["task a", "task b", "task a", "task b"]
    )
    assert rows.rows_of_prompt == [[0, 2], [1, 3]]
    shared_logprobs(load(tiny_model), rows, temperature=1.0, announce=lambda one: heard.append(list(one)))
    assert heard == [[0, 1], [0, 1, 2, 3]]
    monkeypatch.setattr(prefix, "_SPARED_CPU", 1)
    heard.clear()
    rows = share_prompts([[1, 2]] * 3, [[3], [4] * 5, [3] * 2], pad_token_id=0, device=CPU)
    shared_logprobs(load(tiny_model), rows, temperature=1.0, announce=lambda one: heard.append(list(one)))
    assert heard == [[0], [1], [2], [0], [0, 1, 2]]  # the longest first, and all in the end


def test_the_head_is_itself_again_after_a_pass_that_failed(tiny_model):
    model = load(tiny_model)
    with pytest.raises(IndexError):
        shared(model, [[10_000]], [[1]])
    assert "forward" not in vars(model.get_output_embeddings())
    assert can_share(model) is None


def test_empty_rows_are_refused():
    for prompts, completions in ([[]], [[1]]), ([[1]], [[]]), ([], []):
        with pytest.raises(ValueError, match="at least one token"):
            share_prompts(prompts, completions, pad_token_id=0, device=CPU)


# ---------------------------------------------------------------------- what cannot


def test_gradient_checkpointing_steps_aside_and_the_chunked_head_does_not(tiny_model):
    model = load(tiny_model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert "gradient checkpointing" in can_share(model)
    assert can_chunk(model) is None
    assert_twins(chunked, full(model).train(), PROMPTS, COMPLETIONS)


def test_sliding_windows_step_aside():
    model = random_model(MistralConfig(**SMALL, sliding_window=4))
    assert "DynamicSlidingWindowLayer" in can_share(model)
    assert can_chunk(model) is None


def test_a_soft_cap_after_the_head_steps_aside():
    model = random_model(Gemma2Config(**SMALL, final_logit_softcapping=2.0))
    assert "after the head" in can_chunk(model)
    assert "after the head" in can_share(model)


def test_an_adapter_in_the_head_steps_aside(tiny_model):
    model = get_peft_model(load(tiny_model), LoraConfig(r=2, target_modules=["lm_head"]))
    assert "plain linear layer" in can_share(model)
    model = SparseAdapter(["lm_head"], density=0.1, score=random, schedule=Static(batches=0)).attach(
        load(tiny_model)
    )
    assert "plain linear layer" in can_share(model)


def test_no_transformers_model_steps_aside():
    assert "no transformers model" in can_share(torch.nn.Linear(2, 2))


# ---------------------------------------------------------------------- micro-batches


@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20)), min_size=1, max_size=30),
    max_tokens=st.integers(1, 120),
)
@settings(max_examples=200, deadline=None)
def test_plans_keep_the_budget_and_prompts_together(rows, max_tokens):
    keys = prompt_keys([[number] * (3 * number + 1) for number, _ in rows])
    lengths = [(3 * number + 1, completion) for number, completion in rows]
    plan = plan_shared_micro_batches(keys, lengths, max_tokens)
    assert sorted(row for part in plan for row in part) == list(range(len(rows)))

    def size(part):
        distinct = len({keys[row] for row in part})
        return distinct * max(lengths[row][0] for row in part) + len(part) * max(
            lengths[row][1] for row in part
        )

    assert all(size(part) <= max_tokens or len(part) == 1 for part in plan)
    for key in set(keys):
        members = [row for row in range(len(rows)) if keys[row] == key]
        parts = [part for part in plan if any(keys[row] == key for row in part)]
        if size(members) <= max_tokens:
            assert len(parts) == 1  # in pieces only where it must be
