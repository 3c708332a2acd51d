"""`quiver export` of sparse adapters: a merged model, SHiRA, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_model
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules import SparseAdapter
from lightning_modules.cli import main
from lightning_modules.sparse.expert import SparseExpert
from lightning_modules.sparse.schedules import Static
from lightning_modules.sparse.scores import random

IDS = torch.arange(1, 33).view(2, 16)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.fixture
def trained(tiny_model, tmp_path, monkeypatch):
    """A sparse adapter `sparse` in the current folder, and its logits."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    adapter = SparseAdapter(["q_proj", "up_proj"], density=0.1, score=random, schedule=Static(batches=0))
    model = adapter.attach(AutoModelForCausalLM.from_pretrained(tiny_model))
    for weight in adapter.weights:
        torch.nn.init.normal_(weight.values)
    adapter.save("sparse")
    return logits(model)


def test_a_merged_model_has_the_adapter_in_its_weights(trained, tiny_model, capsys):
    assert main(["export", "sparse", "merged"]) == 0
    assert "Wrote the merged model, in float32, to merged" in capsys.readouterr().out
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("merged")), trained)
    assert AutoTokenizer.from_pretrained("merged")("a")["input_ids"]


def test_shira_and_back(trained, tiny_model, capsys):
    assert main(["export", "sparse", "shira", "--to", "shira"]) == 0
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), "shira")
    torch.testing.assert_close(logits(peft), trained, rtol=0, atol=1e-6)
    assert main(["export", "shira", "back", "--to", "sparse"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    expert = SparseExpert("back").apply(model)
    assert torch.equal(logits(model), trained)
    expert.remove()
    out = capsys.readouterr().out
    assert "Wrote a SHiRA adapter to shira" in out
    assert "Wrote a sparse adapter to back" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sparse", "out", "--to", "sparse"], "is no SHiRA adapter: its peft_type is 'QUIVER_SPARSE'"),
        (["sparse", "sparse"], "exists already"),
        (["nothing", "out"], "is no adapter folder"),
        (["unnamed", "out"], "does not name its base model"),
        (["sparse", "out", "--base", "other"], "was trained on other weights"),
        (["cut", "out"], "is broken or cut off"),
        (["changed", "out"], "is damaged: it has changed since it was written"),
    ],
)
def test_bad_input_writes_nothing(trained, arguments, message, capsys):
    torch.manual_seed(1)
    build_tiny_model(Path("other"))
    other = AutoModelForCausalLM.from_pretrained("other")
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(1)
    other.save_pretrained("other")
    for name in ("unnamed", "cut", "changed"):
        shutil.copytree("sparse", name)
        (Path(name) / "SHA256SUMS").unlink()
    shutil.copy("sparse/SHA256SUMS", "changed")
    config = json.loads(Path("unnamed/adapter_config.json").read_text())
    Path("unnamed/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    for name in ("cut", "changed"):
        tensors = Path(name, "adapter_model.safetensors")
        tensors.write_bytes(tensors.read_bytes()[:-100])
    before = {file.name for file in Path().iterdir()}
    assert main(["export", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert {file.name for file in Path().iterdir()} == before
