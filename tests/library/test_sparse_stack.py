"""Sparse experts are routed without becoming dense, and do what their dense changes do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_modules.library.adapter import RoutedAdapter
from lightning_modules.library.layers import LoraStack, RoutedLinear, RoutingState
from lightning_modules.library.mixing import Routing, factor_mixing, output_mixing
from lightning_modules.library.publish import write_expert
from lightning_modules.library.routers.fixed import TaskRouter, UniformRouter, WeightsRouter
from lightning_modules.library.routers.poly import PolyRouter
from lightning_modules.library.routers.token import ArrowRouter, SpectralRouter
from lightning_modules.library.sparse_stack import SparseStack
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.sparse.delta import SparseDelta
from lightning_modules.sparse.expert import SparseExpert
from lightning_modules.sparse.storage import write_sparse

B, S, IN, OUT, E, K = 3, 5, 12, 8, 4, 2
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def random_delta(shape, density=0.2, seed=0, size=1.0) -> SparseDelta:
    generator = torch.Generator().manual_seed(seed)
    count = shape[0] * shape[1]
    indices = torch.randperm(count, generator=generator)[: max(1, int(density * count))].sort().values
    return SparseDelta(indices.int(), size * torch.randn(len(indices), generator=generator), tuple(shape))


@pytest.fixture
def deltas():
    made = [random_delta((OUT, IN), seed=seed) for seed in range(E)]
    made[2] = None
    return made


def test_an_expert_that_skips_the_layer_lies_where_the_others_do(deltas):
    """Models are built while another device is the default one; experts come from files."""
    with torch.device("meta"):
        stack = SparseStack(deltas, (OUT, IN))
    assert {buffer.device.type for buffer in stack.buffers()} == {"cpu"}
    x, routing = torch.randn(B, S, IN), Routing(torch.randn(E))
    expected = SparseStack(deltas, (OUT, IN))(x, routing, output_mixing)
    assert torch.equal(stack(x, routing, output_mixing), expected)


def dense(deltas) -> torch.Tensor:
    return torch.stack([torch.zeros(OUT, IN) if delta is None else delta.dense() for delta in deltas])


def forms():
    torch.manual_seed(3)
    index_BSK = torch.rand(B, S, E).topk(K).indices
    return {
        "shared": Routing(torch.randn(E)),
        "shared, some": Routing(torch.randn(K), torch.tensor([3, 1])),
        "per row": Routing(torch.randn(B, E)),
        "per row, some": Routing(torch.randn(B, K), index_BSK[:, 0]),
        "per token": Routing(torch.randn(B, S, E)),
        "per token, some": Routing(torch.randn(B, S, K), index_BSK),
    }


def by_loop(x, dW, routing):
    """sum_e w_e dW_e x, one token at a time."""
    result = []
    for b in range(B):
        for s in range(S):
            at = {1: (), 2: (b,), 3: (b, s)}[routing.weight.dim()]
            index = range(E) if routing.index is None else routing.index[at].tolist()
            result.append(sum(w * dW[e] @ x[b, s] for w, e in zip(routing.weight[at], index, strict=True)))
    return torch.stack(result).view(B, S, OUT)


@pytest.mark.parametrize("form", forms())
def test_equals_the_dense_change(deltas, form):
    routing = forms()[form]
    stack, dW = SparseStack(deltas, (OUT, IN)), dense(deltas)
    x = torch.randn(B, S, IN)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    w1, w2 = routing.weight.clone().requires_grad_(), routing.weight.clone().requires_grad_()
    got = stack(x1, replace(routing, weight=w1), output_mixing)
    expected = by_loop(x2, dW, replace(routing, weight=w2))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    seed = torch.randn_like(got)
    got.backward(seed)
    expected.backward(seed)
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w1.grad, w2.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", forms())
def test_equals_lora_experts_of_the_same_change(deltas, form):
    dW = dense(deltas)
    lora = LoraStack(
        torch.eye(IN).expand(E, IN, IN).clone(), dW, torch.ones(E), torch.ones(E, dtype=torch.bool), [IN] * E,
        trained=False,
    )  # fmt: skip
    x = torch.randn(B, S, IN)
    routing = forms()[form]
    got = SparseStack(deltas, (OUT, IN))(x, routing, output_mixing)
    torch.testing.assert_close(got, lora(x, routing, output_mixing), rtol=1e-5, atol=1e-5)


def test_low_precision_and_checkpointing(deltas):
    stack, dW, routing = SparseStack(deltas, (OUT, IN)), dense(deltas), forms()["per token, some"]
    x = torch.randn(B, S, IN)
    got = stack(x.bfloat16(), routing, output_mixing)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), by_loop(x.bfloat16().float(), dW, routing), rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        x1 = x.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(
            stack, x1, routing, output_mixing, use_reentrant=False
        ).sum().backward()
    x2 = x.clone().requires_grad_()
    by_loop(x2, dW, routing).sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-5, atol=1e-5)


def test_nothing_is_made_dense(deltas):
    wide = SparseStack([random_delta((300, 400), density=0.01)], (300, 400))
    kept = sum(buffer.numel() for buffer in wide.buffers())
    assert kept < 4 * 1200 + 800
    assert not list(wide.parameters())
    assert not wide.state_dict()


def test_prototypes_equal_the_dense_svd(deltas):
    got = SparseStack(deltas, (OUT, IN)).prototypes()
    for number, dW in enumerate(dense(deltas)):
        if deltas[number] is None:
            assert not got[number].any()
            continue
        v = torch.linalg.svd(dW, full_matrices=False)[2][0]
        assert float(got[number][got[number].abs().argmax()]) > 0
        assert abs(float(v @ got[number])) == pytest.approx(1, abs=1e-5)
    for shape in ((60, 40), (40, 60), (1, 7), (7, 1), (2, 5)):
        delta = random_delta(shape, density=0.1)
        v = torch.linalg.svd(delta.dense(), full_matrices=False)[2][0]
        assert abs(float(v @ SparseStack([delta], shape).prototypes()[0])) == pytest.approx(1, abs=1e-5)


def test_values_of_zero_have_no_direction():
    delta = random_delta((60, 40))
    assert not SparseStack([delta._replace(values=delta.values * 0)], (60, 40)).prototypes().any()


def test_refusals(deltas):
    stack = SparseStack(deltas, (OUT, IN))
    x = torch.randn(B, S, IN)
    with pytest.raises(ValueError, match="factor_mixing: sparse experts have no factors"):
        stack(x, Routing(torch.ones(E)), factor_mixing)
    with pytest.raises(ValueError, match="without heads"):
        stack(x, Routing(torch.ones(B, 2, E), heads=True), output_mixing)
    with pytest.raises(ValueError, match="ArrowRouter"):
        stack.spectra()
    with pytest.raises(ValueError, match="no expert changes this layer"):
        SparseStack([None, None], (OUT, IN))
    with pytest.raises(ValueError, match=r"expert 0 has shape \(8, 12\), and the weight \(12, 8\)"):
        SparseStack(deltas, (IN, OUT))


# ---------------------------------------------------------------------- in the tiny Llama


def base(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


def add_sparse(library, tmp_path, model, name, seed, layers=LAYERS) -> None:
    folder = tmp_path / f"made_{name}"
    folder.mkdir()
    weights = {f"{layer}.weight": model.get_parameter(f"{layer}.weight") for layer in layers}
    deltas = [(weight, random_delta(value.shape, seed=seed, size=0.3)) for weight, value in weights.items()]
    write_sparse(folder, deltas, {})
    library.add(folder, name, tasks=[f"task_{name}"])


def add_lora(library, tmp_path, model, name) -> None:
    folder = tmp_path / f"made_{name}"
    folder.mkdir()
    weight = model.get_parameter(f"{LAYERS[0]}.weight")
    write_expert(
        folder, {LAYERS[0]: (torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2), 1.0)}, None
    )
    library.add(folder, name, tasks=[name])


@pytest.fixture
def library(tiny_model, tmp_path):
    made = AdapterLibrary(tmp_path / "library", create=True)
    model = base(tiny_model)
    add_sparse(made, tmp_path, model, "first", 1)
    add_sparse(made, tmp_path, model, "second", 2, LAYERS[:1])
    add_sparse(made, tmp_path, model, "third", 3)
    return made


IDS = torch.arange(1, 25).view(2, 12)


@pytest.mark.parametrize(
    "router",
    [
        UniformRouter(),
        WeightsRouter({"first": 1.0}),
        TaskRouter(),
        ArrowRouter(top_k=1),
        PolyRouter(["task_first"]),
    ],
    ids=lambda router: type(router).__name__,
)
def test_one_expert_through_any_router_equals_it_applied(tiny_model, library, router):
    applied = base(tiny_model)
    expert = SparseExpert(library["first"].folder).apply(applied)
    model = base(tiny_model)
    adapter = RoutedAdapter(router, str(library.root), ["first"])
    routed = adapter.attach(model)
    adapter.route(["task_first"] * 2, ["", ""])
    torch.testing.assert_close(routed(IDS).logits, applied(IDS).logits, rtol=1e-5, atol=1e-5)
    expert.remove()
    assert not torch.allclose(routed(IDS).logits, applied(IDS).logits, atol=1e-3)
    with adapter.disabled():
        torch.testing.assert_close(routed(IDS).logits, applied(IDS).logits)
    assert adapter.expert_parameters() == [
        parameter for layer in adapter.layers.values() for parameter in layer.router.per_expert_parameters()
    ]


def test_arrow_equals_a_loop(tiny_model, library):
    adapter = RoutedAdapter(ArrowRouter(top_k=2), str(library.root))
    adapter.attach(base(tiny_model))
    layer = adapter.layers[LAYERS[0]]
    x = torch.randn(B, S, layer.base_layer.in_features)
    dW = [library[name].open() for name in library]
    for expert in dW:
        expert.fit(base(tiny_model))
    dW = [expert.delta(f"{LAYERS[0]}.weight").dense() for expert in dW]
    v = [torch.linalg.svd(one, full_matrices=False)[2][0] for one in dW]
    got = layer(x) - layer.base_layer(x)
    for b in range(B):
        for s in range(S):
            scores = torch.stack([(x[b, s] @ one).abs() for one in v])
            best = scores.topk(2)
            expected = sum(
                w * dW[e] @ x[b, s]
                for w, e in zip(best.values.softmax(0), best.indices.tolist(), strict=True)
            )
            torch.testing.assert_close(got[b, s], expected, rtol=1e-4, atol=1e-5)


def test_arrow_passes_over_an_absent_expert(tiny_model, library):
    adapter = RoutedAdapter(ArrowRouter(top_k=1), str(library.root))
    adapter.attach(base(tiny_model))
    layer = adapter.layers[LAYERS[1]]
    assert layer.experts.present.tolist() == [True, False, True]
    routing = layer.router(torch.randn(B, S, layer.base_layer.in_features), None)
    assert not (routing.index == 1).any()


def test_what_cannot_be_routed(tiny_model, tmp_path, library):
    model = base(tiny_model)
    add_lora(library, tmp_path, model, "low_rank")
    root = str(library.root)
    with pytest.raises(
        ValueError, match=r"'first' is sparse and 'low_rank' is a LoRA.*experts: \[low_rank\]"
    ):
        RoutedAdapter(UniformRouter(), root).attach(model)
    with pytest.raises(ValueError, match="subtract: is for LoRA experts"):
        RoutedAdapter(UniformRouter(), root, ["first", "second"], subtract=["third"]).attach(base(tiny_model))
    with pytest.raises(ValueError, match="subtract: is for LoRA experts"):
        RoutedAdapter(UniformRouter(), root, ["low_rank"], subtract=["third"]).attach(base(tiny_model))
    with pytest.raises(ValueError, match="SparseAdapterModule"):
        RoutedAdapter(UniformRouter(), root, ["first"], train_experts=True).attach(base(tiny_model))
    with pytest.raises(ValueError, match="ArrowRouter"):
        RoutedAdapter(SpectralRouter(top_k=1), root, ["first", "second"]).attach(base(tiny_model))
    RoutedAdapter(UniformRouter(), root, ["low_rank"]).attach(base(tiny_model))
    add_sparse(library, tmp_path, model, "words", 5, ["model.embed_tokens"])
    with pytest.raises(ValueError, match=r"'words' changes model\.embed_tokens\.weight, of a Embedding"):
        RoutedAdapter(UniformRouter(), root, ["first", "words"]).attach(base(tiny_model))


def test_frozen_sparse_experts_are_copied(tiny_model, tmp_path, library):
    adapter = RoutedAdapter(UniformRouter(), str(library.root))
    adapter.attach(base(tiny_model))
    adapter.write(tmp_path / "copy")
    copy = AdapterLibrary(tmp_path / "copy")
    assert list(copy) == list(library)
    assert (copy["second"].folder / "adapter_model.safetensors").read_bytes() == (
        library["second"].folder / "adapter_model.safetensors"
    ).read_bytes()


def test_a_layer_of_sparse_experts_in_a_compiled_model(deltas):
    """torch.compile may break the graph here, but the numbers stay."""
    linear = torch.nn.Linear(IN, OUT).requires_grad_(False)
    router = torch.nn.Identity()
    router.forward = lambda x, rows: Routing(x.new_ones(E))
    layer = RoutedLinear(linear, SparseStack(deltas, (OUT, IN)), router, output_mixing, RoutingState())
    x = torch.randn(B, S, IN)
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x))
