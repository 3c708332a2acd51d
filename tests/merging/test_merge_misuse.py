"""Experts that look right and are not; and merging of LoRA factors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_merge_command import added, assert_logits, load, logits, made, make_lora, merge, weights  # noqa: F401

from lightning_modules.merging import LoraFactors, average_factors, factor_average
from lightning_modules.sparse.delta import SparseDelta
from lightning_modules.sparse.storage import write_sparse


@pytest.fixture
def refused(capsys):
    """Check that a merge of these arguments says this, and writes nothing."""

    def check(message, *arguments):
        before = sorted(Path().iterdir())
        assert merge(*arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert sorted(Path().iterdir()) == before

    return check


def of(*experts, method="average"):
    return ["--method", method, "--output", "out", "--experts", *experts]


def write_entry(base, folder, name):
    """A sparse expert that adds 1 to one entry."""
    Path(folder).mkdir()
    delta = SparseDelta(torch.tensor([0]), torch.tensor([1.0]), tuple(load(base).get_parameter(name).shape))
    write_sparse(Path(folder), [(name, delta)], {"base_model_name_or_path": base})


def test_a_tied_weight_is_one_weight_under_any_name(made, tiny_model):  # noqa: F811
    write_entry(tiny_model, "a", "model.embed_tokens.weight")
    write_entry(tiny_model, "b", "lm_head.weight")
    assert merge(*of("a", "b", method="overlap_average")) == 0
    change = load("out").model.embed_tokens.weight - load(tiny_model).model.embed_tokens.weight
    assert change.flatten()[0].item() == pytest.approx(1.0, abs=1e-5)


def test_experts_that_change_nothing(made, refused, tiny_model):  # noqa: F811
    made("lora")
    Path("empty").mkdir()
    write_sparse(Path("empty"), [], {"base_model_name_or_path": tiny_model})
    refused("empty changes nothing: it names no weights", *of("0", "empty"))
    shutil.copytree("0", "hollow")
    save_file({}, "hollow/adapter_model.safetensors")
    refused("changes nothing: it holds no tensors", *of("0", "hollow"))


def test_an_expert_twice(made, refused):  # noqa: F811
    made("lora", "sparse")
    refused("0 is given twice", *of("0", "1", "0/"))


def test_models_that_are_not_what_they_seem(made, refused, tiny_model):  # noqa: F811
    made("model", "model")
    tensors = load_file("1/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(
        {**tensors, name: (tensors[name] * 100).to(torch.int8)}, "1/model.safetensors", {"format": "pt"}
    )
    refused("holds model.layers.0.mlp.up_proj.weight as I8, quantised", *of("0", "1"), "--base", tiny_model)
    extra = {"model.layers.2.mlp.up_proj.weight": tensors[name].clone()}
    save_file({**tensors, **extra}, "1/model.safetensors", {"format": "pt"})
    refused(
        "holds model.layers.2.mlp.up_proj.weight, which the base model does not have",
        *of("0", "1"),
        "--base",
        tiny_model,
    )
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**tensors, **frequencies}, "1/model.safetensors", {"format": "pt"})
    assert merge(*of("0", "1"), "--base", tiny_model) == 0


def test_folders_that_cannot_be_made(made, refused):  # noqa: F811
    made("lora")
    Path("file").touch()
    refused("cannot be made", "--method", "average", "--output", "file/out", "--experts", "0")
    config = json.loads(Path("0/adapter_config.json").read_text())
    Path("0/adapter_config.json").write_text(json.dumps(config | {"peft_type": "SHIRA"}))
    refused("a SHIRA one after quiver export --to sparse", *of("0"))
    refused("no Python function of task vectors", *of("0", method="torch.zeros"))


def test_factors_are_averaged_apart(made, tiny_model):  # noqa: F811
    made("lora")
    make_lora(tiny_model, Path("1"), 1, lora_alpha=2)
    assert merge(*of("0", "1", method="factor_average")) == 0
    pairs = [load_file(f"{i}/adapter_model.safetensors") for i in range(2)]
    change = {}
    for key in pairs[0]:
        if key.endswith("lora_A.weight"):
            stem = key.removesuffix("lora_A.weight")
            A = (pairs[0][key] + pairs[1][key]) / 2
            B = (pairs[0][stem + "lora_B.weight"] * 8 / 2 + pairs[1][stem + "lora_B.weight"] * 2 / 2) / 2
            change[stem.removeprefix("base_model.model.") + "weight"] = B @ A
    assert len(change) == 4
    assert_logits(load("out"), added(tiny_model, change))
    assert (
        merge(
            *of("0", "1", method="factor_average")[:2],
            "--output",
            "lora",
            "--to",
            "lora",
            "--rank",
            "2",
            "--experts",
            "0",
            "1",
        )
        == 0
    )
    assert_logits(PeftModel.from_pretrained(load(tiny_model), "lora"), added(tiny_model, change))


def test_factors_need_lora_of_one_rank(made, refused, tiny_model):  # noqa: F811
    made("lora", "sparse")
    refused("has no LoRA factors of", *of("0", "1", method="factor_average"))
    make_lora(tiny_model, Path("2"), 2, r=3)
    refused("Factors of different shapes", *of("0", "2", method="factor_average"))
    make_lora(tiny_model, Path("3"), 3, target_modules=["q_proj"])
    refused("has no factors of it", *of("0", "3", method="factor_average"))


def test_factor_average_is_average_factors():
    torch.manual_seed(0)
    experts = [{"w": LoraFactors(torch.randn(2, 5), torch.randn(4, 2), scale)} for scale in (1.0, 3.0)]
    A, B = average_factors([expert["w"] for expert in experts])
    assert torch.equal(factor_average(experts)["w"], B @ A)
