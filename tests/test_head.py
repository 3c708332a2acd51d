"""The chunked head equals the plain one: values, gradients, types, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from lightning_modules.head import scored_logprobs
from lightning_modules.logprobs import token_entropy, token_logprobs

INPUTS = ["hidden", "weight", "bias"]


def inputs(N, H, V, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ids = torch.randint(0, V, (N,), generator=generator)
    return {"hidden": normal(N, H), "weight": normal(V, H), "bias": normal(V)}, ids


def plain(hidden, weight, bias, ids, temperature):
    """The obvious twin: all logits at once, through the functions of the plain path."""
    logits = torch.nn.functional.linear(hidden, weight, bias)[None] / (temperature or 1.0)
    return token_logprobs(logits, ids[None])[0], token_entropy(logits)[0]


def gradients(function, tensors, trained, weights, entropy_weights):
    """Gradients of a weighted sum of both results."""
    leaves = {name: tensor.clone().requires_grad_(name in trained) for name, tensor in tensors.items()}
    logprobs, entropy = function(**leaves)
    loss = (logprobs * weights).sum()
    if entropy_weights is not None:
        loss = loss + (entropy * entropy_weights).sum()
    loss.backward()
    assert all(leaves[name].grad is None for name in leaves if name not in trained)
    return [leaves[name].grad for name in trained]


def assert_relative(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert b.norm() > 0
        assert ((a - b).float().norm() / b.float().norm()).item() < tolerance


@given(
    N=st.integers(1, 9),
    H=st.integers(1, 7),
    V=st.integers(2, 12),
    chunk=st.integers(1, 120),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_values_equal_the_plain_head_in_any_chunks(N, H, V, chunk, temperature, seed):
    tensors, ids = inputs(N, H, V, seed=seed)
    ours = scored_logprobs(*tensors.values(), ids, temperature=temperature, chunk=chunk)
    for a, b in zip(ours, plain(*tensors.values(), ids, temperature), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [["hidden"], ["weight"], ["bias"], ["hidden", "weight"], INPUTS])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("chunk", [1, 90, 10_000])
def test_gradients_equal_those_of_the_plain_head(trained, entropy_gradient, chunk):
    tensors, ids = inputs(17, 6, 30)
    weights, entropy_weights = torch.randn(2, 17)

    def ours(hidden, weight, bias):
        return scored_logprobs(
            hidden, weight, bias, ids, temperature=0.8, chunk=chunk, entropy_gradient=entropy_gradient
        )

    def theirs(hidden, weight, bias):
        return plain(hidden, weight, bias, ids, 0.8)

    upstream = (weights, entropy_weights if entropy_gradient else None)
    assert_relative(
        gradients(ours, tensors, trained, *upstream), gradients(theirs, tensors, trained, *upstream), 1e-5
    )


@pytest.mark.parametrize("trained", [["hidden"], INPUTS])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("block", [1, 7, 21])
def test_gradcheck_in_float64(trained, entropy_gradient, block, monkeypatch):
    monkeypatch.setattr("lightning_modules.head._BLOCK", block)
    tensors, ids = inputs(6, 3, 7, torch.float64)
    leaves = [tensor.requires_grad_(name in trained) for name, tensor in tensors.items()]

    def both(hidden, weight, bias):
        found = scored_logprobs(
            hidden, weight, bias, ids, temperature=1.3, chunk=28, entropy_gradient=entropy_gradient
        )
        return found if entropy_gradient else found[0]

    assert gradcheck(both, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confident_rows_keep_their_precision(dtype):
    """Log-probabilities near 0, and small ones beside a large logit, against float64."""
    logits = torch.tensor([[40.0, 25.0, 0.0, -30.0], [300.0, 298.0, -300.0, 0.0]])
    ids = torch.tensor([0, 2])
    leaf = logits.to(dtype).requires_grad_()
    logprobs, entropy = scored_logprobs(leaf, torch.eye(4, dtype=dtype), None, ids, temperature=1.0)
    logprobs.sum().backward()
    exact = leaf.detach().double().requires_grad_()
    every = exact.log_softmax(1)
    every.gather(1, ids[:, None]).sum().backward()
    torch.testing.assert_close(logprobs.double(), every.gather(1, ids[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(every.exp() * every).sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2**-8, atol=1e-7)


def test_the_entropy_carries_a_gradient_only_if_asked():
    tensors, ids = inputs(4, 3, 5)
    tensors["hidden"].requires_grad_()
    logprobs, entropy = scored_logprobs(*tensors.values(), ids, temperature=1.0)
    assert logprobs.requires_grad
    assert not entropy.requires_grad


@pytest.mark.parametrize("trained", [["hidden"], ["hidden", "weight"]])
def test_bfloat16_hidden_states_are_reduced_in_float32(trained):
    tensors, ids = inputs(40, 16, 300, torch.bfloat16)
    logits = torch.nn.functional.linear(*tensors.values())
    logprobs, entropy = scored_logprobs(*tensors.values(), ids, temperature=1.0, chunk=3000)
    every = logits.float().log_softmax(-1)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, every.gather(1, ids[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(every.exp() * every).sum(1), atol=1e-5, rtol=1e-5)

    def ours(**leaves):
        return scored_logprobs(**{f"{k}_{s}": leaves[k] for k, s in SUFFIXES}, ids_N=ids, temperature=1.0)

    def theirs(hidden, weight, bias):
        return plain(hidden, weight, bias, ids, 1.0)

    upstream = (torch.randn(40), None)
    a, b = gradients(ours, tensors, trained, *upstream), gradients(theirs, tensors, trained, *upstream)
    assert_relative(a, b, 2e-2)  # gradients are bfloat16


SUFFIXES = [("hidden", "NH"), ("weight", "VH"), ("bias", "V")]


def test_autocast_makes_the_logits_of_the_plain_head_under_autocast():
    tensors, ids = inputs(12, 16, 40)
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = scored_logprobs(*tensors.values(), ids, temperature=1.0)
        theirs, _ = plain(*tensors.values(), ids, 1.0)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [["hidden"], INPUTS])
def test_nothing_of_the_size_of_the_logits_is_kept(trained):
    N, H, V = 50, 4, 200
    tensors, ids = inputs(N, H, V)
    leaves = [tensor.requires_grad_(name in trained) for name, tensor in tensors.items()]
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scored_logprobs(*leaves, ids, temperature=1.0, chunk=400)
    assert kept
    assert max(kept) <= max(V * H, N * H)


def test_a_chunk_of_nothing_is_refused():
    tensors, ids = inputs(2, 3, 5)
    with pytest.raises(ValueError, match="chunk=0"):
        scored_logprobs(*tensors.values(), ids, temperature=1.0, chunk=0)
