"""Routed models against PEFT, against single experts, and under checkpointing, compilation and several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import ArrowConfig, LoraConfig, PeftModel, PolyConfig, create_arrow_model, get_peft_model
from transformers import AutoModelForCausalLM

from lightning_modules import AdapterLibraryModule, RoutedAdapter
from lightning_modules.library import mixing
from lightning_modules.library.mixing import factor_mixing, output_mixing
from lightning_modules.library.routers.fixed import TaskRouter, UniformRouter, WeightsRouter
from lightning_modules.library.routers.learned import LinearRouter
from lightning_modules.library.routers.poly import PolyRouter
from lightning_modules.library.routers.token import ArrowRouter, SpectralRouter
from lightning_modules.library.store import AdapterLibrary

NAMES = ["ada", "bob", "cy", "dee", "eve"]
IDS = torch.randint(1, 256, (3, 17), generator=torch.Generator().manual_seed(0))


def base(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """Five LoRA adapters as PEFT saves them."""
    root = tmp_path_factory.mktemp("peft")
    for number, name in enumerate(NAMES):
        torch.manual_seed(number)
        config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False,
                            task_type="CAUSAL_LM")  # fmt: skip
        get_peft_model(base(tiny_model), config).save_pretrained(root / name)
    return [root / name for name in NAMES]


@pytest.fixture(scope="module")
def library(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("libraries") / "five"
    store = AdapterLibrary(root, create=True)
    for folder in folders:
        store.add(folder, tasks=[folder.name])
    return str(root)


@pytest.fixture(scope="module")
def mixed_library(tiny_model, tmp_path_factory):
    """Experts of other ranks, alphas, scalings and layers."""
    root = tmp_path_factory.mktemp("libraries")
    store = AdapterLibrary(root / "mixed", create=True)
    settings = {
        "ada": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
        "bob": {"r": 1, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
        "cy": {"r": 9, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        "dee": {
            "r": 3, "target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 5},
            "alpha_pattern": {"k_proj": 7},
        },
    }  # fmt: skip
    for number, (name, own) in enumerate(settings.items()):
        torch.manual_seed(10 + number)
        config = LoraConfig(**own, init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(base(tiny_model), config).save_pretrained(root / name)
        store.add(root / name, tasks=[name])
    return str(root / "mixed")


def routed(tiny_model, router, **options):
    adapter = RoutedAdapter(router, **options)
    model = adapter.attach(base(tiny_model)).eval()
    return model, adapter


@torch.no_grad()
def test_arrow_with_output_mixing_equals_peft(tiny_model, folders, library):
    model, adapter = routed(tiny_model, ArrowRouter(3, 0.7), library=library)
    peft = create_arrow_model(base(tiny_model), [str(f) for f in folders],
                              ArrowConfig(top_k=3, router_temperature=0.7, rng_seed=0)).eval()  # fmt: skip
    inexact = peft(IDS).logits  # 15 power steps
    exact = {name: layer.router.own for name, layer in adapter.layers.items()}
    replaced = 0
    for name, module in peft.named_modules():
        if getattr(module, "lora_arrow", None):
            arrow = module.lora_arrow["arrow_router"]
            arrow.prototypes = exact[name.removeprefix("base_model.model.")]
            arrow._protos_ready = True
            replaced += 1
    assert replaced == len(adapter.layers) == 14
    ours, theirs = model(IDS).logits, peft(IDS).logits
    print("largest difference of logits:", float((ours - theirs).abs().max()))
    print("with PEFT's own prototypes:", float((ours - inexact).abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert float((ours - base(tiny_model)(IDS).logits).abs().max()) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("mixing", [output_mixing, factor_mixing])
@pytest.mark.parametrize(
    "router",
    [UniformRouter(), TaskRouter(), ArrowRouter(1), SpectralRouter(1), LinearRouter(1), PolyRouter(["bob"]),
     PolyRouter(["bob"], num_heads=4), WeightsRouter({"bob": 1.0})],
    ids=lambda one: type(one).__name__,
)  # fmt: skip
def test_with_one_expert_every_router_is_that_expert(tiny_model, folders, library, router, mixing):
    if isinstance(router, PolyRouter) and router.num_heads > 1 and mixing is output_mixing:
        pytest.skip("heads mix factors")
    model, adapter = routed(tiny_model, router, library=library, experts=["bob"], mixing=mixing)
    adapter.route(["bob"] * 3, [""] * 3)
    expected = PeftModel.from_pretrained(base(tiny_model), folders[1]).eval()(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("which", ["library", "mixed_library"])
def test_oracle_routing_equals_each_expert_alone(tiny_model, which, request):
    place = request.getfixturevalue(which)
    model, adapter = routed(tiny_model, TaskRouter(), library=place)
    store = AdapterLibrary(place)
    names = [*store][:3]
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0  # ragged, padded on the left
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    adapter.route(names, [""] * 3)
    logits = model(IDS, attention_mask=mask, position_ids=positions).logits
    written = model.generate(IDS, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None,
                             pad_token_id=0)  # fmt: skip
    for row, name in enumerate(names):
        alone = PeftModel.from_pretrained(base(tiny_model), store[name].folder).eval()
        seen = mask[row].bool()
        expected = alone(IDS[row : row + 1, seen]).logits[0]
        torch.testing.assert_close(logits[row, seen], expected, rtol=1e-5, atol=2e-4)
        own = alone.generate(input_ids=IDS[row : row + 1, seen], max_new_tokens=6, do_sample=False,
                             eos_token_id=None, pad_token_id=0)  # fmt: skip
        assert written[row, IDS.shape[1] :].tolist() == own[0, int(seen.sum()) :].tolist()
    with adapter.disabled():
        assert torch.equal(model(IDS).logits, base(tiny_model)(IDS).logits)


@torch.no_grad()
def test_uniform_over_mixed_ranks_is_the_mean_change(tiny_model, mixed_library):
    model, _ = routed(tiny_model, UniformRouter(), library=mixed_library)
    merged = base(tiny_model)
    store = AdapterLibrary(mixed_library)
    for name in store:
        alone = PeftModel.from_pretrained(base(tiny_model), store[name].folder).merge_and_unload()
        for weight, changed in alone.named_parameters():
            merged.get_parameter(weight).add_((changed - base(tiny_model).get_parameter(weight)) / len(store))
    torch.testing.assert_close(model(IDS).logits, merged(IDS).logits, rtol=1e-5, atol=2e-4)


@torch.no_grad()
def test_subtracting_general_knowledge_is_on_the_change_and_leaves_files_alone(tiny_model, library):
    before = AdapterLibrary(library).verify()
    model, adapter = routed(tiny_model, TaskRouter(), library=library, subtract=["dee", "eve"])
    assert adapter.stacked.names == ("ada", "bob", "cy")
    adapter.route(["ada"] * 3, [""] * 3)
    expected = base(tiny_model)
    for name, factor in (("ada", 1.0), ("dee", -0.5), ("eve", -0.5)):
        store = AdapterLibrary(library)
        alone = PeftModel.from_pretrained(base(tiny_model), store[name].folder).merge_and_unload()
        for weight, changed in alone.named_parameters():
            expected.get_parameter(weight).add_((changed - base(tiny_model).get_parameter(weight)) * factor)
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-5, atol=2e-4)
    assert AdapterLibrary(library).verify() == before == []


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("train", [False, True])
def test_poly_and_mhr_equal_peft(tiny_model, heads, train):
    torch.manual_seed(0)
    peft = get_peft_model(
        base(tiny_model),
        PolyConfig(r=4, n_tasks=3, n_skills=5, n_splits=heads, target_modules=["q_proj", "v_proj", "down_proj"],
                   init_weights=False, task_type="CAUSAL_LM"),
    ).train(train)  # fmt: skip
    adapter = RoutedAdapter(
        PolyRouter(["a", "b", "c"], num_heads=heads, relaxed=True), experts=5, rank=4, alpha=1,
        target_modules=["q_proj", "v_proj", "down_proj"], mixing=factor_mixing,
    )  # fmt: skip
    model = adapter.attach(base(tiny_model)).train(train)
    pairs = []
    for name, layer in adapter.layers.items():
        theirs = peft.get_submodule(f"base_model.model.{name}")
        A, B = theirs.poly_lora_A.default, theirs.poly_lora_B.default  # (h, K, in/h, r), (h, K, r, out/h)
        logits = theirs.poly_router.default.module_logits
        with torch.no_grad():
            logits.normal_()
            layer.experts.A.copy_(A.permute(1, 3, 0, 2).flatten(2))
            layer.experts.B.copy_(B.permute(1, 0, 3, 2).flatten(1, 2))
            layer.router.logits.copy_(logits.view(3, heads, 5))
        pairs.append((layer, A, B, logits))
    adapter.route(["c", "a", "b"], [""] * 3)
    torch.manual_seed(7)
    ours = model(IDS).logits
    torch.manual_seed(7)
    theirs = peft(IDS, task_ids=torch.tensor([2, 0, 1])).logits
    print("largest difference of logits:", float((ours - theirs).abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for layer, A, B, logits in pairs:
        scale = float(A.grad.abs().max())
        assert scale > 0
        torch.testing.assert_close(
            layer.experts.A.grad, A.grad.permute(1, 3, 0, 2).flatten(2), rtol=1e-3, atol=1e-4 * scale
        )
        torch.testing.assert_close(
            layer.experts.B.grad, B.grad.permute(1, 0, 3, 2).flatten(1, 2), rtol=1e-3,
            atol=1e-4 * float(B.grad.abs().max()),
        )  # fmt: skip
        torch.testing.assert_close(
            layer.router.logits.grad.flatten(1), logits.grad.view(3, heads * 5), rtol=1e-3,
            atol=1e-4 * float(logits.grad.abs().max()),
        )  # fmt: skip


def test_mhr_z_trains_less_than_one_percent():
    """On SmolLM2, whose widths the share depends on: one task, 8 skills of rank 16, 32 heads, all linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    adapter = RoutedAdapter(PolyRouter(["new"], num_heads=32), experts=8, rank=16, mixing=factor_mixing)
    model = adapter.attach(model)
    weights = sum(p.numel() for layer in adapter.layers.values() for p in layer.router.parameters())
    skills = sum(p.numel() for layer in adapter.layers.values() for p in layer.experts.parameters())
    whole = sum(p.numel() for p in model.parameters()) - weights - skills
    print(
        f"MHR-z trains {weights:,}: {weights / skills:.3%} of the skills, {weights / whole:.3%} of the model"
    )
    assert weights == 210 * 32 * 8
    assert weights < 0.01 * skills
    assert weights < 0.01 * whole


@pytest.mark.parametrize(
    "router",
    [TaskRouter(), PolyRouter(["ada", "bob", "cy"], relaxed=True), LinearRouter(2, init=2.0), ArrowRouter(2)],
    ids=lambda one: type(one).__name__,
)
def test_gradient_checkpointing_changes_nothing(tiny_model, library, router):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        module = AdapterLibraryModule(
            router, library=library, experts=["ada", "bob", "cy"], train_experts=True, model=tiny_model,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        module.configure_model()
        module.adapter.route(["cy", "ada", "bob"], [""] * 3)
        torch.manual_seed(4)
        module(IDS).logits.square().mean().backward()
        trained = {name: p.grad for name, p in module.model.named_parameters() if p.requires_grad}
        assert trained
        assert any(bool(g.any()) for g in trained.values())
        gradients.append(trained)
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "router", [ArrowRouter(2), TaskRouter(), UniformRouter()], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize("few", [0, 512], ids=["sorted", "all at once"])
def test_a_layer_compiles_without_graph_break(tiny_model, library, router, few, monkeypatch):
    monkeypatch.setattr(mixing, "_FEW_FLOAT32", few)
    torch.compiler.reset()
    _, adapter = routed(tiny_model, router, library=library)
    adapter.route(["cy", "ada", "bob"], [""] * 3)
    layer = adapter.layers["model.layers.0.self_attn.q_proj"]
    x = torch.randn(3, 9, 32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


def test_a_compiled_layer_has_the_same_gradients(tiny_model, library, monkeypatch):
    monkeypatch.setattr(mixing, "_FEW_FLOAT32", 0)
    torch.compiler.reset()
    _, adapter = routed(tiny_model, LinearRouter(2, init=2.0), library=library, train_experts=True)
    layer = adapter.layers["model.layers.0.self_attn.q_proj"]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    gradients = []
    for one in (layer, compiled):
        layer.zero_grad()
        x = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        one(x).square().sum().backward()
        trained = [layer.experts.A, layer.experts.B, layer.router.weights]
        gradients.append([x.grad, *(p.grad.clone() for p in trained)])
    for got, expected in zip(*gradients, strict=True):
        assert bool(expected.any())
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_bfloat16(tiny_model, library):
    exact, _ = routed(tiny_model, ArrowRouter(5), library=library)
    adapter = RoutedAdapter(ArrowRouter(5), library=library)
    rough = adapter.attach(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)).eval()
    assert adapter.layers["model.layers.0.mlp.up_proj"].experts.A.dtype == torch.bfloat16
    difference = (rough(IDS).logits.float() - exact(IDS).logits).abs().max()
    assert difference < 0.1 * exact(IDS).logits.abs().max()


def test_state_round_trip(tiny_model):
    def build(seed):
        torch.manual_seed(seed)
        adapter = RoutedAdapter(PolyRouter(["a", "b"]), experts=3, rank=2, mixing=factor_mixing)
        model = adapter.attach(base(tiny_model))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        adapter.route(["a", "b", "a"], [""] * 3)
        return model, adapter

    (first, saved), (second, loaded) = build(1), build(2)
    loaded.load_state_dict({name: value.clone() for name, value in saved.state_dict().items()})
    assert torch.equal(first(IDS).logits, second(IDS).logits)
    with pytest.raises(ValueError, match="are missing"):
        loaded.load_state_dict({})


def test_save_and_load_through_a_library(tiny_model, tmp_path):
    torch.manual_seed(1)
    adapter = RoutedAdapter(TaskRouter(), experts=["a", "b"], rank=2, alpha=5)
    adapter.source = tiny_model
    model = adapter.attach(base(tiny_model))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter.save(tmp_path / "saved")
    again, reloaded = routed(tiny_model, TaskRouter(), library=str(tmp_path / "saved"))
    for one in (adapter, reloaded):
        one.route(["b", "a", "b"], [""] * 3)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-4)
    assert Path(tmp_path, "saved", "experts", "a", "adapter_config.json").is_file()
    plain = PeftModel.from_pretrained(base(tiny_model), tmp_path / "saved" / "experts" / "b")
    reloaded.route(["b"] * 3, [""] * 3)
    torch.testing.assert_close(plain(IDS).logits, again(IDS).logits, rtol=1e-5, atol=1e-4)
