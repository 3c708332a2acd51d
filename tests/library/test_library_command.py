"""`quiver library`, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from test_store import lora

from lightning_modules.cli import main
from lightning_modules.library.store import AdapterLibrary


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("red", "blue", "translation_en-de")):
        lora(tmp_path / name, seed=number)
    return tmp_path


def quiver(*arguments: str) -> int:
    return main(["library", *arguments])


def test_add_list_show_verify_remove(here, capsys):
    assert quiver("add", "lib", "red", "blue", "--tasks", "t1", "t2") == 0
    assert quiver("add", "lib", "translation_en-de", "--name", "german") == 0
    capsys.readouterr()
    assert quiver("list", "lib") == 0
    out = capsys.readouterr().out
    assert "red" in out
    assert "LoRA r=2" in out
    assert "t1, t2" in out
    assert "3 experts of base/model" in out
    assert quiver("list", "lib", "--as_json", "true") == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["name"] for one in listed] == ["red", "blue", "german"]
    assert quiver("show", "lib", "german") == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 40
    assert quiver("verify", "lib") == 0
    assert "every file as it was added" in capsys.readouterr().out
    assert quiver("remove", "lib", "red", "german") == 0
    assert list(AdapterLibrary("lib")) == ["blue"]


def test_an_empty_library_says_what_to_do(here, capsys):
    AdapterLibrary("lib", create=True)
    assert quiver("list", "lib") == 0
    assert "quiver library add lib FOLDER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "nowhere"], "nowhere is no adapter library"),
        (["show", "lib", "rde"], "has no expert 'rde'"),
        (["remove", "lib", "red", "rde"], "has no expert 'rde'"),
        (["add", "lib", "red"], "has an expert 'red' already"),
        (["add", "lib", "nofolder"], "there is no folder 'nofolder'"),
        (["add", "lib", "blue", "translation_en-de", "--name", "x"], "is for one adapter"),
        (["add", "lib", "blue", "--name", "a/b"], "letters, digits"),
        (["add", "lib", "someone/adapter"], "as a hub id it cannot be downloaded"),
    ],
)
def test_refusals(here, capsys, arguments, message):
    assert quiver("add", "lib", "red") == 0
    before = {p: p.read_bytes() for p in (here / "lib").rglob("*") if p.is_file()}
    assert quiver(*arguments) == 1
    assert message in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (here / "lib").rglob("*") if p.is_file()} == before


def test_verify_fails_with_a_line_for_each_problem(here, capsys):
    quiver("add", "lib", "red", "blue")
    for name in ("red", "blue"):
        file = here / "lib" / "experts" / name / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert quiver("verify", "lib") == 1
    err = capsys.readouterr().err
    assert "2 problems" in err
    assert err.count("has changed since it was added") == 2


def test_subcommands_are_listed(capsys):
    assert main(["library"]) == 0
    assert "add, remove, list" in capsys.readouterr().out
    assert main(["library", "lst"]) == 2
    assert "unknown command 'lst'" in capsys.readouterr().err


def test_a_thousand_experts(here):
    """Entries written into the index by hand: reading them is what is tested."""
    quiver("add", "lib", "red")
    index = here / "lib" / "index.json"
    content = json.loads(index.read_text())
    [entry] = content["experts"].values()
    del content["sha256"]
    content["experts"] = {f"expert_{i}": {**entry, "tasks": [f"task_{i}"]} for i in range(1000)}
    index.write_text(json.dumps(content))
    script = "import sys; from lightning_modules.cli import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", script, "library", "list", "lib"], capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 1002
    assert lines[-1] == "1000 experts of base/model"
    torch.manual_seed(0)
    assert AdapterLibrary("lib").add(here / "blue").name == "blue"
    assert len(AdapterLibrary("lib")) == 1001


def test_route_and_export(tiny_model, tmp_path, monkeypatch, capsys):
    """On a real model: routes are printed, and a mixture becomes an adapter that PEFT loads."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lightning_modules import RoutedAdapter, TaskRouter, UniformRouter

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    first = RoutedAdapter(TaskRouter(), experts=["a", "b"], rank=2)
    first.source = tiny_model
    first.attach(AutoModelForCausalLM.from_pretrained(tiny_model))
    for layer in first.layers.values():
        torch.nn.init.normal_(layer.experts.B)
    first.publish(AdapterLibrary("lib", create=True))
    assert quiver("route", "lib", "Say hello", "2 + 2", "--router", "ArrowRouter", "--router.top_k", "1") == 0
    out = capsys.readouterr().out
    assert "'Say hello'" in out
    weights = [float(line.split()[0]) for line in out.splitlines() if line.startswith("  ")]
    assert sum(weights) == pytest.approx(2.0, abs=0.01)
    assert quiver("export", "lib", "mixed") == 0
    ids = torch.arange(1, 9)[None]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), "mixed").eval()
    routed = RoutedAdapter(UniformRouter(), library="lib").attach(
        AutoModelForCausalLM.from_pretrained(tiny_model)
    )
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, routed.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert quiver("export", "lib", "mixed") == 1
    assert "exists already" in capsys.readouterr().err
    assert quiver("export", "lib", "arrow", "--router", "ArrowRouter", "--router.top_k", "1") == 1
    assert "Export the routed model as a library" in capsys.readouterr().err
