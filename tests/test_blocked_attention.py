"""Attention in blocks: against its formula, and as the attention of real architectures beside torch's own."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM as Auto
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig

from lightning_modules import attention, blocked_attention
from lightning_modules.attention import prefer_blocks

HEADS, WIDTH, WIDTH_OF_VALUES = 6, 4, 5


def formula(query, key, value, scale, mask):
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    scores = query @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


def tensors(rows: int, queries: int, keys: int, key_heads: int, dtype=torch.float64):
    draw = torch.Generator().manual_seed(queries)
    shapes = [
        (rows, queries, HEADS, WIDTH),
        (rows, keys, key_heads, WIDTH),
        (rows, keys, key_heads, WIDTH_OF_VALUES),
    ]
    return [
        torch.randn(shape, generator=draw, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes
    ]


def causal(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def masks(rows: int, queries: int, keys: int) -> dict[str, torch.Tensor | None]:
    padded = causal(queries, keys).repeat(rows, 1, 1, 1)
    padded[1, :, :, :2] = False
    padded[1, :, :2, :3] = True  # queries that would see nothing
    window = causal(queries, keys).triu(keys - queries - 1)[None, None]
    by_head = causal(queries, keys).repeat(1, HEADS, 1, 1)
    by_head[0, 1, 1:, 0] = False
    return {"none": None, "padded": padded, "window": window, "by head": by_head}


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 8)])
@pytest.mark.parametrize(("block", "at_once"), [(2**20, 128), (1, 1), (200, 2)])
def test_values_and_gradients_are_those_of_the_formula(monkeypatch, key_heads, queries, keys, block, at_once):
    monkeypatch.setattr(blocked_attention, "_BLOCK", block)
    monkeypatch.setattr(blocked_attention, "_QUERIES", at_once)
    rows = 3
    for mask in masks(rows, queries, keys).values():
        inputs = tensors(rows, queries, keys, key_heads)
        found = blocked_attention.blocked_attention(*inputs, 0.3, mask)
        expected = formula(*inputs, 0.3, mask)
        torch.testing.assert_close(found, expected)
        weights = torch.randn_like(expected)
        of_found, of_expected = (torch.autograd.grad(one, inputs, weights) for one in (found, expected))
        # Gradients of keys and values are added up in float32.
        torch.testing.assert_close(of_found, of_expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 8), (300, 310)])
def test_causal_is_the_mask_of_that_name(queries, keys):
    inputs = tensors(2, queries, keys, 2)
    mask = causal(queries, keys).expand(2, 1, -1, -1)
    found = blocked_attention.blocked_attention(*inputs, 0.3, causal=True)
    expected = blocked_attention.blocked_attention(*inputs, 0.3, mask)
    torch.testing.assert_close(found, expected)
    of_found, of_expected = (torch.autograd.grad(one.sum(), inputs) for one in (found, expected))
    torch.testing.assert_close(of_found, of_expected)


@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_a_single_query_gives_what_the_formula_gives(key_heads):
    query, key, value = inputs = tensors(3, 1, 8, key_heads)
    mask = torch.rand(3, 1, 1, 8, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[:, :, :, 4] = True
    by_head = mask.repeat(1, HEADS, 1, 1)
    by_head[1, 2, 0, :4] = False
    # As a cache with room for more hands them out, and without gaps.
    rooms = [
        torch.cat([one, torch.full_like(one, 7.0)], dim=2).detach()[:, :, :8].requires_grad_()
        for one in (key, value)
    ]
    for keys, values in ([key, value], rooms):
        for allowed in (None, mask, by_head):
            found = blocked_attention.single_query_attention(query, keys, values, 0.3, allowed)
            expected = formula(query, keys, values, 0.3, allowed)
            torch.testing.assert_close(found, expected)
            of_found, of_expected = (
                torch.autograd.grad(one.square().sum(), (query, keys, values)) for one in (found, expected)
            )
            torch.testing.assert_close(of_found, of_expected)
    mask[2] = False
    found, one_block = (
        attend(*inputs, 0.3, mask)
        for attend in (blocked_attention.single_query_attention, blocked_attention.blocked_attention)
    )
    torch.testing.assert_close(found, one_block)
    assert found.isfinite().all()


def saved_bytes(run) -> int:
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _output = run()
    return sum(kept.values())


def test_what_is_kept_for_the_backward_pass_grows_with_the_length():
    def kept(length: int) -> int:
        inputs = tensors(1, length, length, 2)
        return saved_bytes(lambda: blocked_attention.blocked_attention(*inputs, 0.3, causal=True))

    assert kept(600) == 2 * kept(300) > 0


def test_float16_scores_are_scaled_before_they_are_rounded():
    query, key, value = (torch.full((1, 2, 4, 64), 40.0, dtype=torch.float16) for _ in range(3))
    output = blocked_attention.blocked_attention(query, key, value, 0.125, causal=True)
    torch.testing.assert_close(output, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 4])
def test_a_hidden_key_stays_hidden_however_large_its_score(dtype, queries):
    query = torch.full((1, 1, queries, 1), 200.0, dtype=dtype)
    key = torch.tensor([-100.0, 100.0], dtype=dtype).view(1, 1, 2, 1)  # scores 40000 apart
    value = torch.tensor([1.0, 100.0], dtype=dtype).view(1, 1, 2, 1)
    mask = torch.tensor([True, False]).view(1, 1, 1, 2)
    assert blocked_attention.blocked_attention(query, key, value, 1.0, mask).unique().tolist() == [1]
    if queries == 1:
        assert blocked_attention.single_query_attention(query, key, value, 1.0, mask).item() == 1


@pytest.mark.parametrize("queries", [1, 40])
def test_what_keys_have_in_common_costs_no_precision(queries):
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 64, generator=draw) for n in (queries, 40, 40))
    query, key = query + 2, key + 20  # as the biases of some models do
    half = [one.bfloat16() for one in (query, key, value)]
    truth = formula(*(one.float() for one in half), 0.125, None)
    attend = blocked_attention.single_query_attention if queries == 1 else blocked_attention.blocked_attention
    found = attend(*half, 0.125)
    assert float((found.float() - truth).norm() / truth.norm()) < 0.01
    eager = formula(*half, 0.125, None)  # whose scores, of about 320, are rounded to 2
    assert float((eager.float() - truth).norm() / truth.norm()) > 0.1


def test_a_query_that_sees_nothing_is_finite_and_changes_no_gradient_of_others():
    query, key, value = inputs = tensors(2, 4, 4, 2)
    mask = causal(4, 4).repeat(2, 1, 1, 1)
    mask[0, :, :2] = False
    output = blocked_attention.blocked_attention(query, key, value, 0.5, mask)
    assert output.isfinite().all()
    found = torch.autograd.grad(output[0, :, 2:].sum() + output[1].sum(), inputs)
    seen = formula(query[:1, :, 2:], key[:1], value[:1], 0.5, mask[:1, :, 2:]).sum()
    seen = seen + formula(query[1:], key[1:], value[1:], 0.5, mask[1:]).sum()
    torch.testing.assert_close(found, torch.autograd.grad(seen, inputs), rtol=1e-5, atol=1e-6)


def test_half_precision_is_about_as_close_to_float32_as_the_eager_attention_of_transformers():
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, heads, 300, 64, generator=draw).bfloat16() for heads in (9, 3, 3)]
    for one in inputs:
        one.requires_grad_()
    mask, weights = causal(300, 300)[None, None], torch.randn(2, 9, 300, 64, generator=draw)
    exact = [one.detach().float().requires_grad_() for one in inputs]
    truth = formula(*exact, 0.125, mask)
    wanted = [truth, *torch.autograd.grad(truth, exact, weights)]

    def errors(attend):
        output = attend(*inputs, 0.125, mask)
        found = [output, *torch.autograd.grad(output, inputs, weights.bfloat16())]
        return [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]

    for own, eager in zip(errors(blocked_attention.blocked_attention), errors(formula), strict=True):
        assert own < 1.2 * eager < 0.012


# ---------------------------------------------------------------------- in models

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2))


def mistral() -> nn.Module:
    config = MistralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, sliding_window=3)
    return Auto.from_config(config)


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0)
    )


def gradients(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    (logits.log_softmax(-1)[..., 3] * mask).sum().backward()
    found = torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])
    model.zero_grad()
    return logits.detach()[mask.bool()], found


@torch.no_grad()
def next_logits(model, ids, mask):
    """Logits after the last token, read by itself on top of a cache of the others."""
    cache = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
    return model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache).logits.float()


@pytest.fixture
def calls(monkeypatch) -> list:
    """Hears of calls of the blocks, and of their twin for single queries."""
    found: list = []

    def hear(name):
        plain = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, **k: found.append(name) or plain(*a, **k))

    hear("blocked_attention")
    hear("single_query_attention")
    return found


@pytest.mark.parametrize("make", [llama, mistral, gpt2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [True, False])
def test_models_give_what_they_give_by_sdpa(calls, make, dtype, padded):
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    ids = torch.randint(1, 64, (3, 150))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :140] = 0
    expected = gradients(model, ids, mask)
    assert not calls
    prefer_blocks(model)
    found = gradients(model, ids, mask)
    assert calls == ["blocked_attention"] * 2  # once a layer
    for own, torchs in zip(found, expected, strict=True):
        assert float((own - torchs).norm() / torchs.norm()) < 0.02
    calls.clear()
    other = make().to(dtype).eval()  # is not touched
    other.load_state_dict(model.state_dict())
    gradients(other, ids, mask)
    assert not calls
    found, expected = (next_logits(one, ids, mask) for one in (model, other))
    assert calls == ["blocked_attention"] * 2 + ["single_query_attention"] * 2
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_gradient_checkpointing_gives_the_same_gradients(calls):
    torch.manual_seed(0)
    model = llama().bfloat16().train()
    prefer_blocks(model)
    ids = torch.randint(1, 64, (2, 20))
    expected = gradients(model, ids, torch.ones_like(ids))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls.clear()
    found = gradients(model, ids, torch.ones_like(ids))
    assert len(calls) == 4
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_name_and_pickle_know_nothing_of_it():
    model = llama().bfloat16()
    prefer_blocks(model)
    assert model.config._attn_implementation == "sdpa"
    assert "quiver" not in model.config.to_json_string()
    again = pickle.loads(pickle.dumps(model))
    ids = torch.randint(1, 64, (2, 20))
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    "mask",
    [
        torch.rand(1, 1, 1, 5) < 0.7,
        torch.rand(3, 1, 1, 5) < 0.7,
        torch.rand(1, 4, 5, 5) < 0.7,
        torch.rand(5, 5) < 0.7,
    ],
    ids=lambda mask: str(tuple(mask.shape)),
)
def test_masks_of_any_shape(mask):
    layer = nn.Module()
    layer.num_key_value_groups, layer.is_causal = 2, True
    mask = mask | (torch.arange(5) == 2)
    half = [torch.randn(3, heads, 5, 8).bfloat16() for heads in (4, 2, 2)]
    expected, _ = attention._attend(layer, *half, mask)
    setattr(layer, attention._MARK, True)
    torch.testing.assert_close(attention._attend(layer, *half, mask)[0], expected, rtol=0.02, atol=0.02)


def test_what_blocks_do_not_do_is_left_to_sdpa(calls):
    layer = nn.Module()
    layer.num_key_value_groups = 2
    setattr(layer, attention._MARK, True)
    query, key, value = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    half = [one.bfloat16() for one in (query, key, value)]
    added = torch.zeros(1, 1, 5, 5, dtype=torch.bfloat16)
    attention._attend(layer, query, key, value, None)
    attention._attend(layer, *half, added)
    for type_ in (torch.bfloat16, torch.float32):
        attention._attend(layer, half[0][:, :, :1], *half[1:], added[:, :, :1].to(type_))
    with pytest.raises(RuntimeError, match="attn_mask dtype"):
        attention._attend(layer, half[0][:, :, :1], *half[1:], added[:, :, :1].long())
    attention._attend(layer, *half, None, dropout=0.5)
    attention._attend(layer, half[0][:, :, :3], *half[1:], None)
    attention._attend(layer, half[0], half[1][:1], half[2][:1], added > -1)
    attention._attend(layer, *half, None, position_bias=added)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention._attend(layer, *half, None)
    assert not calls
    attention._attend(layer, *half, None)
    attention._attend(layer, half[0][:, :, :1], *half[1:], None)
    attention._attend(layer, half[0][:, :, :1], *half[1:], added[:, :, :1] > -1)
    assert calls == ["blocked_attention"] + ["single_query_attention"] * 2
