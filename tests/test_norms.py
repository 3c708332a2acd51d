"""RMS norm that keeps its input: against its formula, and in place of the norms of real architectures."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from saved import saved_bytes
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Olmo2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_modules import SFTModule
from lightning_modules.norms import LeanRMSNorm, make_norms_lean, rms_norm

EPSILON = 1e-3
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def formula(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def parts(dtype: torch.dtype, of_weight: torch.dtype | None = None):
    draw = torch.Generator().manual_seed(1)
    x, upstream = (torch.randn(3, 7, 40, generator=draw).to(dtype) for _ in range(2))
    weight = torch.randn(40, generator=draw).to(of_weight or dtype)
    return x.requires_grad_(), weight.requires_grad_(), upstream


def of_llama(x, weight):
    norm = LlamaRMSNorm(len(weight), EPSILON)
    norm.weight = torch.nn.Parameter(weight.detach().clone())
    return norm(x), norm.weight


@pytest.mark.parametrize(
    ("dtype", "of_weight"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_output_is_that_of_llama_to_the_bit_and_gradients_to_rounding(dtype, of_weight):
    x, weight, upstream = parts(dtype, of_weight)
    expected, weight_of_llama = of_llama(x, weight)
    found = rms_norm(x, weight, EPSILON)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, EPSILON), expected)
    upstream = upstream.to(expected.dtype)
    of_found = torch.autograd.grad(found, (x, weight), upstream)
    of_expected = torch.autograd.grad(expected, (x, weight_of_llama), upstream)
    truth = torch.autograd.grad(
        formula(*(wide := [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()])),
        wide,
        upstream.double(),
    )
    for one, other, exact in zip(of_found, of_expected, truth, strict=True):
        assert one.dtype == other.dtype
        error, error_of_llama = (float((g.double() - exact).norm() / exact.norm()) for g in (one, other))
        assert error < max(1e-6, 1.05 * error_of_llama)


@given(
    rows=st.integers(0, 4),
    features=st.integers(1, 9),
    size=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_are_those_of_the_formula(rows, features, size, seed):
    draw = torch.Generator().manual_seed(seed)
    x, upstream = (torch.randn(rows, features, generator=draw) for _ in range(2))
    inputs = [(x * size).requires_grad_(), torch.randn(features, generator=draw).requires_grad_()]
    found, expected = rms_norm(*inputs, EPSILON), formula(*inputs)
    torch.testing.assert_close(found, expected)
    of_found, of_expected = (torch.autograd.grad(one, inputs, upstream) for one in (found, expected))
    scale = max(1e-3, float(upstream.norm()) / size)  # what a gradient of x may cancel from
    torch.testing.assert_close(of_found[0], of_expected[0], rtol=1e-4, atol=1e-4 * scale)
    torch.testing.assert_close(of_found[1], of_expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learns", [(True, False), (False, True)])
def test_gradients_reach_what_requires_them_and_nothing_else(learns):
    tensors = parts(torch.float32)[:2]
    for tensor, learned in zip(tensors, learns, strict=True):
        tensor.requires_grad_(learned)
    rms_norm(*tensors, EPSILON).square().sum().backward()
    found = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    formula(*tensors).square().sum().backward()
    for tensor, gradient, learned in zip(tensors, found, learns, strict=True):
        assert (gradient is not None) == learned
        if learned:
            torch.testing.assert_close(gradient, tensor.grad, rtol=1e-4, atol=1e-5)


def test_keeps_the_input_and_a_number_for_each_token():
    x, weight, _ = parts(torch.bfloat16)
    kept = saved_bytes(lambda: rms_norm(x, weight, EPSILON))
    assert sum(kept.values()) == 2 * x.numel() + 2 * weight.numel() + 4 * x.numel() // x.shape[-1]


def small(config):
    model = AutoModelForCausalLM.from_config(config(**SMALL), dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LlamaConfig, "LeanRMSNorm"),
        (Qwen3Config, "LeanRMSNorm"),
        (Gemma2Config, "Gemma2RMSNorm"),  # adds 1 to the weight
        (Olmo2Config, "Olmo2RMSNorm"),  # rounds after the weight
    ],
)
def test_replaces_the_norms_that_compute_the_same(config, kind):
    model = small(config)
    ids = torch.arange(60).view(2, 30)
    expected, names = model(ids).logits, set(model.state_dict())
    make_norms_lean(model)
    assert {type(module).__name__ for module in model.modules() if "Norm" in type(module).__name__} == {kind}
    assert set(model.state_dict()) == names
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(ids).logits, expected)


def test_hooks_stay():
    norm = LlamaRMSNorm(4)
    norm.register_forward_hook(lambda module, inputs, output: output + 1)
    x = torch.randn(2, 4)
    expected = norm(x)
    make_norms_lean(norm)
    assert isinstance(norm, LeanRMSNorm)
    assert torch.equal(norm(x), expected)


def test_modules_have_them(tiny_model):
    module = SFTModule(model=str(tiny_model))
    module.configure_model()
    kinds = {type(part).__name__ for part in module.modules() if "Norm" in type(part).__name__}
    assert kinds == {"LeanRMSNorm"}
