"""Options that choose a model hold for configuration, tokenizer and weights, in every command, and are written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_model
from safetensors import safe_open
from small_runs import quiet_line, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules.base_names import base_choice, name_base
from lightning_modules.cli import main
from lightning_modules.planning.build import read_config
from lightning_modules.sources import choose_model, load_config, load_model, load_tokenizer, written_choice

NAME, OLD, NEW = "org/tiny", "0" * 40, "1" * 40


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache of the hub with a repository of two versions: other weights, and another chat template."""
    cache = tmp_path_factory.mktemp("hub")
    place = cache / "models--org--tiny"
    for commit, name in ((OLD, "main"), (NEW, "v2")):
        folder = build_tiny_model(place / "snapshots" / commit)
        if name == "v2":
            model = AutoModelForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                model.model.norm.weight.fill_(0.5)
            model.config.rms_norm_eps = 1e-3
            model.save_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.chat_template = "v2 " + tokenizer.chat_template
            tokenizer.save_pretrained(folder)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / name).write_text(commit)
    return str(cache)


def test_all_parts_are_of_one_version(hub):
    for revision, is_new in ((None, False), ("v2", True)):
        kwargs = {"revision": revision, "cache_dir": hub}
        assert load_config(NAME, kwargs).rms_norm_eps == (1e-3 if is_new else 1e-6)
        assert read_config(NAME, kwargs).rms_norm_eps == (1e-3 if is_new else 1e-6)
        assert load_tokenizer(NAME, kwargs).chat_template.startswith("v2") == is_new
        model = load_model(NAME, kwargs | {"use_safetensors": True}, dtype=torch.bfloat16)
        assert float(model.model.norm.weight.detach()[0]) == (0.5 if is_new else 1.0)
        assert model.dtype == torch.bfloat16


def test_code_of_a_repository_is_refused_without_asking(tiny_model, tmp_path, monkeypatch):
    assert choose_model(tiny_model) == (tiny_model, {"trust_remote_code": False})
    assert choose_model(NAME, {"trust_remote_code": True, "dtype": "x"})[1] == {"trust_remote_code": True}
    assert written_choice(NAME, {"trust_remote_code": True, "token": "x", "revision": "v2"}) == (
        NAME,
        {"revision": "v2"},
    )
    folder = build_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise RuntimeError('it ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(ValueError, match=r"(?s)cannot be loaded.*trust_remote_code"):
        load_config(str(folder))


def test_a_subfolder_of_a_folder_is_a_place_and_a_revision_is_not(tmp_path):
    build_tiny_model(tmp_path / "models" / "small")
    top = str(tmp_path / "models")
    assert load_tokenizer(top, {"subfolder": "small"}).eos_token == "</s>"
    assert load_model(top, {"subfolder": "small"}).config.hidden_size == 32
    assert read_config(top, {"subfolder": "small"}).hidden_size == 32
    assert written_choice(top, {"subfolder": "small"}) == (str(tmp_path / "models" / "small"), {})
    assert written_choice(NAME, {"subfolder": "small"}) == (NAME, {"subfolder": "small"})
    with pytest.raises(ValueError, match=r"there is no such folder|has no model configuration"):
        load_model(top, {"subfolder": "other"})
    with pytest.raises(ValueError, match="revision='v2' chooses a version of a repository on the hub"):
        load_config(top, {"subfolder": "small", "revision": "v2"})


def test_what_is_written_names_the_version(tmp_path):
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "revision": None}))
    name_base(config, NAME, choice={"revision": "v2", "subfolder": "small"})
    assert json.loads(config.read_text())["revision"] == "v2"
    assert base_choice(tmp_path) == {"revision": "v2", "subfolder": "small"}


def test_a_run_and_what_follows_it_use_one_version(hub, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    exports = {"class_path": "AdapterExport", "init_args": {"folder": "adapters"}}
    own = {"model_kwargs": {"revision": "v2", "cache_dir": hub}}
    run = write_run(NAME, module="SFTModule", init_args=own, callbacks=[exports])
    assert main(["fit", "-c", run]) == 0
    [folder] = {path.parent for path in Path("run").rglob("adapter_config.json")}
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] == "v2"
    assert AutoTokenizer.from_pretrained(folder).chat_template.startswith("v2")
    card = (folder / "README.md").read_text()
    assert f'from_pretrained("{NAME}", revision="v2")' in card

    def norm_of(output):
        with safe_open(Path(output) / "model.safetensors", "pt") as opened:
            return float(opened.get_tensor("model.norm.weight")[0])

    cache = ["--model_kwargs.cache_dir", hub]
    assert main(["export", str(folder), "merged", *cache]) == 0
    assert norm_of("merged") == 0.5
    assert AutoTokenizer.from_pretrained("merged").chat_template.startswith("v2")
    merge = ["merge", "--method", "average", "--experts", str(folder)]
    assert main([*merge, "--output", "one", "--to", "lora", "--rank", "2", *cache]) == 0
    assert json.loads(Path("one/adapter_config.json").read_text())["revision"] == "v2"
    assert main([*merge, "--output", "whole", *cache]) == 0
    assert norm_of("whole") == 0.5
    assert main(["library", "add", "library", str(folder), "--name", "first"]) == 0
    [expert] = Path("library").rglob("adapter_config.json")
    assert json.loads(expert.read_text())["revision"] == "v2"
    assert main(["library", "export", "library", "mixture", *cache]) == 0
    assert json.loads(Path("mixture/adapter_config.json").read_text())["revision"] == "v2"
    capfd.readouterr()
    # Experts of two versions are not merged unnoticed.
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name != "SHA256SUMS":
            (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"revision": "main"}))
    assert main([*merge, str(other), "--output", "two", *cache]) == 1
    assert "different versions of a base model" in quiet_line(capfd)
