"""Checksums beside what we write, and names that cannot lead out of a folder."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_modules.checksums import SUMS, check_checksums, write_checksums
from lightning_modules.export import export_adapter
from lightning_modules.library.hub import resolve_adapter
from lightning_modules.library.publish import write_expert
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.merging.experts import open_expert

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "model.layers.0.self_attn.q_proj"


def lora(folder: Path, base="base/model") -> Path:
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    write_expert(folder, {LAYER: (torch.randn(2, 32), torch.randn(32, 2), 1.5)}, base)
    return folder


@pytest.fixture
def adapter(tmp_path, tiny_model):
    folder = lora(tmp_path / "adapter", tiny_model)
    (folder / "README.md").write_text("# A card")
    write_checksums(folder)
    return folder


def flip(file: Path, at: int = -3) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))


def test_sha256sum_reads_what_we_write(adapter):
    assert [line[66:] for line in (adapter / SUMS).read_text().splitlines()] == [CONFIG, WEIGHTS]
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=adapter, check=True)
    check_checksums(adapter, (CONFIG, WEIGHTS, "not there"))


def test_peft_loads_a_folder_with_checksums(adapter, tiny_model):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    own = model.get_submodule(f"base_model.model.{LAYER}").lora_A["default"].weight
    saved = load_file(adapter / WEIGHTS)[f"base_model.model.{LAYER}.lora_A.weight"]
    assert torch.equal(own, saved)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_damage_is_told_with_the_remedy(adapter, name):
    flip(adapter / name)
    with pytest.raises(
        ValueError, match=rf"{name} is damaged: .* if you changed it on purpose, delete SHA256SUMS"
    ):
        open_expert(str(adapter))
    flip(adapter / name)
    (adapter / "README.md").write_text("# Another card")  # people edit cards
    open_expert(str(adapter))
    flip(adapter / name)
    (adapter / SUMS).unlink()
    if name == WEIGHTS:
        open_expert(str(adapter))  # as the user wished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": [LAYER, "model.layers.1.self_attn.q_proj"]}, "lacks base_model"),
        ({"target_modules": ["nowhere"]}, "is no adapter that PEFT can load into this model"),
        ({"r": "many"}, "is no adapter that PEFT can load into this model"),
        ({"peft_type": "NOTHING"}, "is no adapter that PEFT can load into this model"),
    ],
)
def test_a_foreign_adapter_is_exported_whole_or_not_at_all(adapter, tmp_path, change, message):
    (adapter / SUMS).unlink()
    config = adapter / CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        export_adapter(str(adapter), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a line is no checksum"),
        ("ä", "a line is no checksum"),
        (f"{'0' * 64}  ../{CONFIG}\n", "a line is no checksum"),
        (f"{'0' * 64}  {CONFIG}\n", f"{CONFIG} is damaged"),
        (f"{'0' * 64}  other\n", f"does not know {CONFIG}"),
    ],
)
def test_damaged_checksums_are_told(adapter, text, message):
    (adapter / SUMS).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_expert(str(adapter))


def test_a_library_takes_no_damaged_adapter(adapter, tmp_path):
    flip(adapter / WEIGHTS)
    library = AdapterLibrary(tmp_path / "library", create=True)
    with pytest.raises(ValueError, match="is damaged"):
        library.add(adapter)
    assert len(library) == 0


def test_a_changed_index_is_noticed_and_can_be_changed_on_purpose(adapter, tmp_path):
    library = AdapterLibrary(tmp_path / "library", create=True)
    library.add(adapter, tasks=["task_a"])
    index = library.root / "index.json"
    changed = json.loads(index.read_text().replace("task_a", "task_b"))
    index.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"is damaged: .* if you changed it on purpose, delete its"):
        AdapterLibrary(library.root)
    del changed["sha256"]
    index.write_text(json.dumps(changed))
    assert AdapterLibrary(library.root)["adapter"].tasks == ("task_b",)
    index.write_text(json.dumps({**changed, "sha257": ""}))
    with pytest.raises(ValueError, match="unknown 'sha257'"):
        AdapterLibrary(library.root)


def test_arrays_that_changed_are_made_again(adapter, tmp_path):
    library = AdapterLibrary(tmp_path / "library", create=True)
    library.add(adapter)
    library.put_arrays("adapter", "arrow", {"v": torch.ones(9)})
    flip(next((library.root / "arrays").iterdir()), at=-2)
    assert library.find_arrays("adapter", "arrow") is None


# ---------------------------------------------------------------------- names that leave the folder


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", 3])
def test_an_index_of_weights_cannot_lead_out_of_a_model(tmp_path, name):
    save_file({"w": torch.ones(2)}, tmp_path / "elsewhere.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json names .* no file in this folder"):
        open_expert(str(folder))


def test_linked_folders_of_a_library_are_refused(tmp_path):
    library = AdapterLibrary(tmp_path / "library", create=True)
    library.add(lora(tmp_path / "first"))
    library.add(lora(tmp_path / "second"))
    own = library.root / "experts" / "first"
    shutil.move(own, tmp_path / "elsewhere")
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="experts/first is a link"):
        library["first"].open()
    library.remove("first")
    assert (tmp_path / "elsewhere" / WEIGHTS).is_file(), "a linked folder is nobody's to delete"
    # A library from elsewhere whose experts lie in a folder of the user's.
    documents = tmp_path / "documents"
    shutil.move(library.root / "experts", documents)
    (library.root / "experts").symlink_to(documents)
    for change in (lambda: library.remove("second"), lambda: library.add(lora(tmp_path / "third"))):
        with pytest.raises(ValueError, match="experts is a link"):
            change()
    assert (documents / "second" / WEIGHTS).is_file()


@pytest.mark.parametrize("name", ["../adapter", "a/..", "a--b/c", "owner/name.git"])
def test_names_that_are_no_hub_ids(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="is no folder here, and as a hub id it cannot be downloaded"):
        resolve_adapter(name)
