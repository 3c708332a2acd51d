"""Weights that stay in their files are those that `from_pretrained` loads; what it alone can read is left to it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_modules.mapped_weights import map_model

OPTIONS = {"dtype": torch.float32, "attn_implementation": "sdpa", "model_kwargs": {}}


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def assert_as_loaded(folder) -> None:
    mapped, loaded = map_model(str(folder), **OPTIONS), AutoModelForCausalLM.from_pretrained(folder)
    theirs = dict(loaded.named_parameters())
    assert theirs.keys() == dict(mapped.named_parameters()).keys()
    for name, parameter in mapped.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    assert mapped.lm_head.weight is mapped.model.embed_tokens.weight
    ids = torch.arange(1, 20)[None]
    assert torch.equal(mapped.eval()(ids).logits, loaded.eval()(ids).logits)


def test_mapped_weights_are_the_loaded_ones(folder):
    assert_as_loaded(folder)


def test_files_beside_the_model_are_not_read(folder):
    other = {
        name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(other, folder / "zz-ema.safetensors")
    assert_as_loaded(folder)


def test_an_index_names_the_files(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(names)}
    for file in set(places.values()):
        save_file(
            {n: tensors[n] for n in names if places[n] == file}, folder / file, metadata={"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_as_loaded(folder)


def test_what_needs_more_than_reading_is_left_to_transformers(folder):
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    assert map_model(str(folder), **OPTIONS) is None
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors")
    assert map_model(str(folder), **OPTIONS) is None
    assert map_model(str(folder), **{**OPTIONS, "model_kwargs": {"device_map": "cpu"}}) is None


def test_a_broken_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is broken"):
        map_model(str(folder), **OPTIONS)
