"""A mixture that is the same for all tokens is one LoRA of PEFT, with the logits of the routed model."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lightning_modules.library.adapter import RoutedAdapter
from lightning_modules.library.merge_mixture import export_mixture, mixture_as_lora
from lightning_modules.library.mixing import factor_mixing, output_mixing
from lightning_modules.library.routers.fixed import TaskRouter, UniformRouter, WeightsRouter
from lightning_modules.library.routers.learned import PhatgooseGates
from lightning_modules.library.routers.poly import PolyRouter
from lightning_modules.library.routers.token import ArrowRouter
from lightning_modules.library.store import AdapterLibrary

IDS = torch.arange(1, 25).view(2, 12)
SETTINGS = {
    "one": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "two": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "use_rslora": True},
    "three": {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"},
}
WEIGHTS = {"one": 0.5, "two": -1.2}
CASES = {
    "uniform": (UniformRouter, None),
    "weights": (lambda: WeightsRouter(WEIGHTS), None),
    "task": (TaskRouter, "task_two"),
    "default of a task": (lambda: TaskRouter(default="three"), "another"),
    "poly": (lambda: PolyRouter(["a", "b"]), "b"),
    "poly, relaxed": (lambda: PolyRouter(["a", "b"], relaxed=True), "a"),
}
MIXINGS = [output_mixing, factor_mixing]


def base(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def library(tiny_model, tmp_path):
    made = AdapterLibrary(tmp_path / "library", create=True)
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        torch.manual_seed(seed)
        model = get_peft_model(base(tiny_model), LoraConfig(task_type="CAUSAL_LM", **settings))
        for key, weight in model.named_parameters():
            if "lora_" in key:
                weight.data.normal_(0, 0.3)
        model.save_pretrained(tmp_path / name)
        made.add(tmp_path / name, name, tasks=[f"task_{name}"])
    return made


def routed(tiny_model, library, router, mixing, task=None, **options):
    adapter = RoutedAdapter(router, str(library.root), mixing=mixing, **options)
    model = adapter.attach(base(tiny_model))
    for layer in adapter.layers.values():
        for parameter in layer.router.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 2)
    if task is not None:
        adapter.route([task] * 2, ["", ""])
    return adapter, model.eval()


def loaded(tiny_model, folder):
    return PeftModel.from_pretrained(base(tiny_model), folder).eval()


def same_logits(tiny_model, model, folder) -> None:
    expected, plain = model(IDS).logits, base(tiny_model)(IDS).logits
    assert not torch.allclose(expected, plain, atol=1e-2)
    torch.testing.assert_close(loaded(tiny_model, folder)(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixing", MIXINGS, ids=lambda mixing: mixing.__name__)
@pytest.mark.parametrize("case", CASES)
def test_one_lora_equals_the_routed_model(tiny_model, tmp_path, library, case, mixing):
    make, task = CASES[case]
    adapter, model = routed(tiny_model, library, make(), mixing, task)
    model.train()  # the export must not depend on it
    export_mixture(adapter, tmp_path / "one_lora", task)
    assert all(layer.router.training for layer in adapter.layers.values())
    same_logits(tiny_model, model.eval(), tmp_path / "one_lora")


@pytest.mark.parametrize("heads", [2, 4])
def test_heads(tiny_model, tmp_path, library, heads):
    adapter, model = routed(tiny_model, library, PolyRouter(["a", "b"], heads), factor_mixing, "b")
    export_mixture(adapter, tmp_path / "one_lora", "b")
    same_logits(tiny_model, model, tmp_path / "one_lora")


@pytest.mark.parametrize("mixing", MIXINGS, ids=lambda mixing: mixing.__name__)
def test_subtracted_and_trained_experts(tiny_model, tmp_path, library, mixing):
    adapter, model = routed(tiny_model, library, UniformRouter(), mixing, subtract=["three"])
    export_mixture(adapter, tmp_path / "subtracted", None)
    same_logits(tiny_model, model, tmp_path / "subtracted")
    adapter, model = routed(tiny_model, library, UniformRouter(), mixing, train_experts=True)
    export_mixture(adapter, tmp_path / "trained", None)
    same_logits(tiny_model, model, tmp_path / "trained")


def test_ranks(tiny_model, tmp_path, library):
    """Ranks of experts with weight add up beside each other; summed factors have the largest of them."""
    for mixing, rank in ((output_mixing, 6), (factor_mixing, 4)):
        adapter, _ = routed(tiny_model, library, WeightsRouter(WEIGHTS), mixing)
        factors = mixture_as_lora(adapter)
        assert len(factors["model.layers.0.self_attn.q_proj"][0]) == rank
        assert len(factors["model.layers.0.mlp.down_proj"][0]) == 2
        assert "model.layers.0.mlp.up_proj" not in factors
        export_mixture(adapter, tmp_path / mixing.__name__)
        config = json.loads((tmp_path / mixing.__name__ / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"


def test_refusals(tiny_model, tmp_path, library):
    def export(router, mixing=output_mixing, task=None):
        adapter, _ = routed(tiny_model, library, router, mixing)
        export_mixture(adapter, tmp_path / "never", task)

    with pytest.raises(ValueError, match="ArrowRouter mixes experts by what it reads"):
        export(ArrowRouter(top_k=1))
    with pytest.raises(ValueError, match="PhatgooseGates weighs experts by token"):
        export(PhatgooseGates(), task="task_one")
    with pytest.raises(ValueError, match="Give one of task_one, task_three, task_two"):
        export(TaskRouter())
    with pytest.raises(ValueError, match="does not know the task 'task_four'"):
        export(TaskRouter(), task="task_four")
    with pytest.raises(ValueError, match="Leave task out"):
        export(UniformRouter(), task="task_one")
    with pytest.raises(ValueError, match="all experts have weight 0"):
        export(WeightsRouter({}))
    with pytest.raises(ValueError, match="only output_mixing and factor_mixing"):
        export(UniformRouter(), mixing=lambda x, A, B, routing: output_mixing(x, A, B, routing))
    assert not (tmp_path / "never").exists()
