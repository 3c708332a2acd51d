"""Routers score in float32, whatever the model computes in: a token goes where its numbers say."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.library.dispatch import GroupedDispatch, grouped_product
from lightning_modules.library.experts import Experts
from lightning_modules.library.layers import LoraStack
from lightning_modules.library.routers.learned import LinearRouter, PhatgooseGates
from lightning_modules.library.routers.token import (
    ArrowRouter,
    CentroidRouter,
    PhatgooseRouter,
    SpectralRouter,
)

E, R, IN, T = 32, 4, 96, 400
NAMES = tuple(f"e{i}" for i in range(E))


class Kept(dict):
    root = "here"

    def find_arrays(self, name, kind, settings):
        return self.get(name)

    def put_arrays(self, *_):
        pass


@pytest.fixture(scope="module")
def experts():
    torch.manual_seed(0)
    stack = LoraStack(
        torch.randn(E, R, IN), torch.randn(E, IN, R), torch.ones(E), torch.ones(E, dtype=torch.bool), [R] * E,
        trained=False,
    )  # fmt: skip
    tasks = {name: (name,) for name in NAMES}
    new = Experts(NAMES, tasks, {"layer": stack})
    vectors = torch.nn.functional.normalize(torch.randn(E, IN), dim=1)
    kept = Kept({name: {"layer": vector} for name, vector in zip(NAMES, vectors, strict=True)})
    return new, Experts(NAMES, tasks, {"layer": stack}, kept)


def exact(router, x):
    """Scores in float64, from the arrays in float32."""
    x = x.double()
    if isinstance(router, SpectralRouter):
        return torch.einsum("bsi,eri->bser", x, router.own.double()).norm(dim=-1)
    if isinstance(router, LinearRouter):
        return x @ router.weights.detach().double().T
    table = router.own.double()
    if isinstance(router, PhatgooseRouter):
        x, table = (torch.nn.functional.layer_norm(one, (IN,)) for one in (x, table))
    product = x @ table.T
    return product.abs() if isinstance(router, ArrowRouter) else product


@pytest.mark.parametrize("way", ["bfloat16", "cast", "autocast"])
@pytest.mark.parametrize("make", [ArrowRouter, SpectralRouter, CentroidRouter, PhatgooseRouter, LinearRouter])
def test_the_chosen_are_those_of_float64(experts, make, way):
    torch.manual_seed(1)
    router = make(top_k=4)
    router.prepare(experts[make in (CentroidRouter, PhatgooseRouter)])
    own = router.for_layer("layer")
    x = torch.randn(1, T, IN).to(torch.bfloat16)
    if way == "cast" and make is not LinearRouter:  # its weights are parameters, for the trainer to cast
        own = own.to(torch.bfloat16)
        assert own.own.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        routing = own(x.float() if way == "autocast" else x, None)
    assert routing.weight.dtype == torch.float32
    best = exact(own, x).topk(4).indices.sort().values
    assert torch.equal(routing.index.sort().values, best)


def test_this_input_tells_types_apart(experts):
    """In bfloat16 other experts are chosen, so the test above can fail."""
    torch.manual_seed(1)
    router = ArrowRouter(4)
    router.prepare(experts[0])
    own = router.for_layer("layer")
    x = torch.randn(1, T, IN).to(torch.bfloat16)
    rough = (x @ own.own.to(x.dtype).T).abs().topk(4).indices.sort().values
    share = float((rough != exact(own, x).topk(4).indices.sort().values).any(-1).float().mean())
    print(f"top-4 sets that differ when scores are bfloat16: {share:.1%}")
    assert share > 0.01


def test_gates_weigh_in_float32(experts):
    torch.manual_seed(1)
    router = PhatgooseGates()
    router.prepare(experts[0])
    own = router.for_layer("layer")
    torch.nn.init.normal_(own.gates, std=0.2)
    x, rows = torch.randn(2, 50, IN).to(torch.bfloat16), torch.tensor([3, 7])
    expected = torch.einsum("bsi,bi->bs", x.double(), own.gates.detach()[rows].double()).sigmoid()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            weight = own(x, rows).weight[..., 0]
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- experts without tokens


@pytest.mark.parametrize("width", [16, 18])  # a multiple of 16 bytes, and none
def test_gradients_of_experts_without_tokens_are_zero_whatever_the_kernel_leaves(width, monkeypatch):
    """A grouped product that leaves groups without rows as memory was (pytorch#172439, NVIDIA sm_100)."""
    real = torch.nn.functional.grouped_mm

    def leaves_memory(left, right, *, offs):
        result = real(left, right, offs=offs)
        if left.dim() == right.dim() == 2:
            empty = offs.diff(prepend=offs.new_zeros(1)) == 0
            result = torch.where(empty[:, None, None], torch.nan, result)
        return result

    monkeypatch.setattr("lightning_modules.library.dispatch.functional.grouped_mm", leaves_memory)
    torch.manual_seed(0)
    index = torch.tensor([[4, 1], [1, 4], [4, 2]])  # the first, the last and one in between stay without
    x = torch.randn(3, width, requires_grad=True)
    A = torch.randn(7, 4, width, requires_grad=True)
    B = torch.randn(7, 10, 4, requires_grad=True)
    sent = GroupedDispatch(index, 7)
    seed = torch.randn(3, 10)
    got = torch.autograd.grad(sent.up(sent.down(x, A), B), (x, A, B), seed)
    plain = sum(torch.einsum("tor,tri,ti->to", B[index[:, k]], A[index[:, k]], x) for k in range(2))
    for one, other in zip(got, torch.autograd.grad(plain, (x, A, B), seed), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    absent = [0, 3, 5, 6]
    assert not got[1][absent].any()
    assert not got[2][absent].any()


def test_frozen_weights_get_no_gradient():
    values, weights = torch.randn(5, 8, requires_grad=True), torch.randn(2, 8, 8)
    grouped_product(values, weights, torch.tensor([2, 5], dtype=torch.int32)).sum().backward()
    assert values.grad is not None
    assert weights.grad is None
