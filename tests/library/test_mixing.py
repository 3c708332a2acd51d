"""Mixing and dispatch against loops over rows, positions and experts, values and gradients.

Shapes: B rows, S positions, E experts, k chosen ones, r rank.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.library import mixing
from lightning_modules.library.dispatch import GroupedDispatch, LoopedDispatch, TiledDispatch, dispatch
from lightning_modules.library.layers import routed_lora
from lightning_modules.library.mixing import Routing, factor_mixing, output_mixing

B, E, R, IN, OUT = 3, 7, 3, 8, 12


def weights_of(form: str, S: int) -> tuple[Routing, torch.Tensor]:
    """A routing of some form, and the same as weights of all experts for every token (B, S, E)."""
    if form == "shared":
        weight = torch.rand(E)
        return Routing(weight), weight.expand(B, S, E)
    if form == "rows":
        weight = torch.rand(B, E)
        return Routing(weight), weight[:, None].expand(B, S, E)
    if form == "tokens":
        weight = torch.rand(B, S, E)
        return Routing(weight), weight
    if form == "chosen by row":
        index, weight = torch.stack([torch.randperm(E)[:2] for _ in range(B)]), torch.rand(B, 2)
        return Routing(weight, index), torch.zeros(B, E).scatter(1, index, weight)[:, None].expand(B, S, E)
    index = torch.stack([torch.randperm(E)[:2] for _ in range(B * S)]).view(B, S, 2)
    if form == "chosen by token, uneven":
        index[..., 0] = torch.where(index[..., 1] == 4, 0, 4)
    weight = torch.rand(B, S, 2)
    return Routing(weight, index), torch.zeros(B, S, E).scatter(2, index, weight)


def by_loop(x, A, B_, dense, factors: bool):
    rows = []
    for b in range(len(x)):
        for s in range(x.shape[1]):
            w = dense[b, s]
            if factors:
                change = sum(w[e] * B_[e] for e in range(E)) @ sum(w[e] * A[e] for e in range(E))
            else:
                change = sum(w[e] * B_[e] @ A[e] for e in range(E))
            rows.append(change @ x[b, s])
    return torch.stack(rows).view(len(x), x.shape[1], -1)


@pytest.mark.parametrize("few", [0, 512], ids=["sorted", "all at once"])
@pytest.mark.parametrize("S", [1, 5, 40])
@pytest.mark.parametrize("mix", [output_mixing, factor_mixing])
@pytest.mark.parametrize(
    "form", ["shared", "rows", "tokens", "chosen by row", "chosen by token", "chosen by token, uneven"]
)
def test_every_form_equals_the_loop(form, mix, S, few, monkeypatch):
    monkeypatch.setattr(mixing, "_FEW_FLOAT32", few)
    torch.manual_seed(0)
    x, A, B_ = torch.randn(B, S, IN), torch.randn(E, R, IN), torch.randn(E, OUT, R)
    A[1, 2:], B_[1, :, 2:] = 0, 0  # a lower rank, filled up
    routing, dense = weights_of(form, S)
    weight = routing.weight.requires_grad_()
    leaves = [one.requires_grad_() for one in (x, A, B_)]
    expected_dense = dense if form == "tokens" else None
    got = mix(x, A, B_, routing)
    expected = by_loop(x, A, B_, dense, mix is factor_mixing)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    seed = torch.randn_like(got)
    ours = torch.autograd.grad(got, leaves, seed, retain_graph=True)
    theirs = torch.autograd.grad(expected, leaves, seed, retain_graph=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    if expected_dense is not None:
        torch.testing.assert_close(
            torch.autograd.grad(got, weight, seed)[0], torch.autograd.grad(expected, weight, seed)[0],
            rtol=1e-3, atol=1e-3,
        )  # fmt: skip


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_mix_parts_of_the_factors(heads):
    torch.manual_seed(0)
    x, A, B_ = torch.randn(B, 5, IN), torch.randn(E, R, IN), torch.randn(E, OUT, R)
    weight = torch.rand(B, heads, E)
    got = factor_mixing(x, A, B_, Routing(weight, heads=True))
    for b in range(B):
        parts_A = [sum(weight[b, h, e] * A[e].chunk(heads, 1)[h] for e in range(E)) for h in range(heads)]
        parts_B = [sum(weight[b, h, e] * B_[e].chunk(heads, 0)[h] for e in range(E)) for h in range(heads)]
        expected = x[b] @ torch.cat(parts_A, 1).T @ torch.cat(parts_B, 0).T
        torch.testing.assert_close(got[b], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Use factor_mixing"):
        output_mixing(x, A, B_, Routing(weight, heads=True))


@given(
    st.integers(1, 40), st.integers(1, 60), st.sampled_from([1, 3, 8]), st.integers(1, 4), st.integers(0, 10**6),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_ways_of_sending_pairs_agree(num_experts, tokens, rank, k, seed, uneven):
    torch.manual_seed(seed)
    x, A, B_ = torch.randn(tokens, 6), torch.randn(num_experts, rank, 6), torch.randn(num_experts, 10, rank)
    index = torch.randint(0, max(1, num_experts // 5) if uneven else num_experts, (tokens, k))  # repeats too
    weight = torch.rand(tokens, k)
    expected = torch.stack(
        [
            sum(weight[t, j] * B_[index[t, j]] @ (A[index[t, j]] @ x[t]) for j in range(k))
            for t in range(tokens)
        ]
    )
    for way in (LoopedDispatch, TiledDispatch, GroupedDispatch):
        sent = way(index, num_experts)
        codes = sent.down(x, A) * weight.flatten()[sent.order, None]
        torch.testing.assert_close(sent.up(codes, B_), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(routed_lora(x, A, B_, index, weight), expected, rtol=1e-4, atol=1e-4)


def test_shapes_choose_the_way():
    def way(tokens, num_experts, width, even=True):
        index = torch.arange(tokens * 4).view(tokens, 4) % (num_experts if even else 2)
        return type(dispatch(index, num_experts, torch.zeros(tokens, width)))

    assert way(1, 64, 576) is LoopedDispatch
    assert way(512, 64, 576) is TiledDispatch
    assert way(512, 64, 576, even=False) is GroupedDispatch
    assert way(512, 64, 2048) is GroupedDispatch
    assert way(16, 100, 576) is GroupedDispatch


def test_extra_memory_stays_within_three_copies_of_the_pairs():
    import sys

    from conftest import REPOSITORY

    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    from routing import LiveElements

    for num_experts, tokens, width in ((64, 512, 96), (512, 300, 96), (300, 8, 64), (64, 1, 64)):
        x, A, B_ = (
            torch.randn(tokens, width),
            torch.randn(num_experts, 8, width),
            torch.randn(num_experts, width, 8),
        )
        index, weight = torch.randint(0, num_experts, (tokens, 4)), torch.rand(tokens, 4)
        with torch.no_grad(), LiveElements() as memory:
            routed_lora(x, A, B_, index, weight)
        assert 0 < memory.peak <= 3 * tokens * 4 * (8 + 2 * width), (num_experts, tokens, width)
