"""Names of base models in adapter folders: PEFT and Quiver load them, and other names of one model are known."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules import SFTModule
from lightning_modules.base_names import whereabouts
from lightning_modules.cli import main
from lightning_modules.export import save_adapter
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.sources import converted_folder

IDS = torch.arange(1, 41)[None] * 5 % 257


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def adapter_of(base, folder, *, seed=0, layers=("q_proj",)) -> str:
    """Write a LoRA as PEFT does, on a base model loaded by this name."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=list(layers), task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def package(tiny_model, tmp_path, monkeypatch):
    """A package with a GGUF file that is converted already; its name, and the folder of the conversion."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("QUIVER_CACHE", str(tmp_path / "cache"))
    Path("tiny_weights").mkdir()
    Path("tiny_weights/__init__.py").touch()
    Path("tiny_weights/one.gguf").write_bytes(b"GGUF")
    folder = converted_folder(tmp_path / "tiny_weights" / "one.gguf")
    shutil.copytree(tiny_model, folder)
    return "package:tiny_weights", str(folder)


@pytest.fixture
def exported(package):
    """Return the folder that AdapterExport writes of an adapter on such a model, and the adapter's logits."""
    module = SFTModule(
        model=package[0], adapter=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    module.configure_model()
    save_adapter(module, Path("adapter"), steps=1, metrics={})
    return logits(module.model)


def run_card(folder):
    """Run the code of a model card, and return its `model`."""
    [code] = re.findall(r"```python\n(.*?)```", Path(folder, "README.md").read_text(), flags=re.DOTALL)
    assert "Tensor" not in code
    names: dict = {}
    exec(code.replace("path/of/this/folder", str(folder)), names)
    return names["model"]


def test_an_adapter_on_a_converted_file_is_loaded_by_peft_alone(package, exported, capsys):
    name, folder = package
    found = AutoPeftModelForCausalLM.from_pretrained("adapter")
    torch.testing.assert_close(logits(found), exported)
    torch.testing.assert_close(logits(run_card("adapter")), exported)
    assert json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"] == folder
    assert f"`{name}`" in Path("adapter/README.md").read_text()
    # Quiver goes by the name, which means something on another machine too.
    config = Path("adapter/adapter_config.json")
    config.write_text(config.read_text().replace(folder, "/of/another/machine"))
    Path("adapter/SHA256SUMS").unlink()
    assert main(["export", "adapter", "merged"]) == 0
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained("merged")), exported, atol=1e-4, rtol=0
    )
    assert (
        main(["merge", "--method", "average", "--experts", "adapter", "--output", "averaged", "--to", "lora"])
        == 0
    )
    found = AutoPeftModelForCausalLM.from_pretrained("averaged")
    torch.testing.assert_close(logits(found), exported, atol=1e-4, rtol=0)
    assert main(["library", "add", "lib", "adapter"]) == 0
    assert AdapterLibrary("lib")["adapter"].base == name
    assert main(["library", "export", "lib", "mixture"]) == 0
    found = AutoPeftModelForCausalLM.from_pretrained("mixture")
    torch.testing.assert_close(logits(found), exported, atol=1e-4, rtol=0)


def test_a_library_takes_an_adapter_of_peft_on_the_converted_folder(package, exported):
    assert main(["library", "add", "lib", "adapter"]) == 0
    assert main(["library", "add", "lib", adapter_of(package[1], "peft")]) == 0
    assert main(["library", "add", "lib", adapter_of(package[1] + "/", "slash", layers=["k_proj"])]) == 0
    # And the other way round.
    assert main(["library", "add", "second", "peft"]) == 0
    assert main(["library", "add", "second", "adapter"]) == 0


def test_names_of_one_folder(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "models/tiny")
    Path("link").symlink_to("models/tiny")
    names = [
        "models/tiny",
        "models/tiny/",
        "./models/tiny",
        str(tmp_path / "models/tiny"),
        "models/../link",
        "link",
    ]
    assert {whereabouts(name) for name in names} == {str((tmp_path / "models/tiny").resolve())}
    hub = tmp_path / "hub/models--org--name/snapshots/0123"
    shutil.copytree(tiny_model, hub)
    assert whereabouts(str(hub)) == whereabouts("org/name") == "org/name"
    assert whereabouts("package:nothing") == "package:nothing"
    for number, name in enumerate(names):
        assert main(["library", "add", "lib", adapter_of(name, f"adapter{number}")]) == 0


def test_models_of_two_names_are_told_apart_by_their_weights(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "copy", "other"):
        shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained("other")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.1)
    model.save_pretrained("other")
    for name in ("one", "copy", "other"):
        adapter_of(name, f"on_{name}")
    assert main(["library", "add", "lib", "on_one"]) == 0
    assert main(["library", "add", "lib", "on_copy"]) == 0
    before = Path("lib/index.json").read_bytes()
    assert main(["library", "add", "lib", "on_other"]) == 1
    err = capsys.readouterr().err
    assert (
        "another base model: model.layers.1.self_attn.q_proj.weight of other differs from that of one" in err
    )
    # One that is not on this machine: the user says what it is.
    shutil.copytree("on_one", "on_hub")
    config = Path("on_hub/adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "some/model"}))
    assert main(["library", "add", "lib", "on_hub"]) == 1
    err = capsys.readouterr().err
    assert "names the base model 'some/model', the library's experts 'one'" in err
    assert "--base one" in err
    assert Path("lib/index.json").read_bytes() == before
    assert main(["library", "add", "lib", "on_hub", "--base", "one"]) == 0
    assert AdapterLibrary("lib")["on_hub"].base == "one"
    assert AdapterLibrary("lib")["on_hub"].open().base == "one"
    # A fingerprint that the adapter brings outweighs what the user says.
    facts = {"fingerprint": {"model.layers.1.self_attn.q_proj.weight": "0"}}
    Path("on_other/quiver.json").write_text(json.dumps(facts))
    assert main(["library", "add", "lib", "on_other", "--base", "one"]) == 1
    assert "base='one' is not what the adapter was trained on" in capsys.readouterr().err


def test_a_second_expert_for_a_task_is_asked_about_at_once(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("red", "blue", "green")):
        adapter_of(tiny_model, name, seed=number)
    Path("blue/quiver.json").write_text(json.dumps({"tasks": ["sums"]}))
    assert main(["library", "add", "lib", "red", "--tasks", "sums", "signs"]) == 0
    capsys.readouterr()
    for adapter, *more in (("blue",), ("green", "--tasks", "signs")):
        assert main(["library", "add", "lib", adapter, *more]) == 1
        err = capsys.readouterr().err
        assert (
            "has the expert 'red' already, and routing by task takes one. Keep both with --share_tasks" in err
        )
    assert list(AdapterLibrary("lib")) == ["red"]
    assert main(["library", "add", "lib", "green", "--tasks", "others"]) == 0
    assert "shared" not in capsys.readouterr().out
    assert main(["library", "add", "lib", "blue", "--share_tasks"]) == 0
    assert "Its tasks are shared with red" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_the_card_of_an_adapter_runs(tiny_model, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    module = SFTModule(
        model=tiny_model, adapter=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    module.configure_model()
    if source == "hub":
        module.source = "org/name"
    save_adapter(module, tmp_path / "adapter", steps=1, metrics={})
    if source == "hub":  # the hub is played by a folder of this name
        shutil.copytree(tiny_model, tmp_path / "org" / "name")
    found = run_card(tmp_path / "adapter")
    assert isinstance(found, PeftModel)
    torch.testing.assert_close(logits(found), logits(module.model))
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template
