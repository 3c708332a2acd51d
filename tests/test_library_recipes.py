"""Every library recipe runs from its YAML, and one's result is the next one's input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from transformers import AutoModelForCausalLM

from lightning_modules import RoutedAdapter, UniformRouter
from lightning_modules.cli import main
from lightning_modules.library.store import AdapterLibrary

RECIPES = {file.stem for file in (REPOSITORY / "configs" / "library").glob("*.yaml")}
TASKS = ["double", "less", "more"]
TINY_MHR = ["--model.router.num_heads", "4"]


def write_tasks(folder: Path) -> None:
    results = {"double": lambda i: 2 * i, "less": lambda i: i - 1, "more": lambda i: i + 1}
    for part in ("train", "test"):
        for task, result in results.items():
            file = folder / part / f"{task}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"input": f"{task} {i}", "output": str(result(i))} for i in range(20)]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    """A folder with tasks in which recipes run one after the other."""
    folder = tmp_path_factory.mktemp("recipes")
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture
def quiver(place, tiny_model, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("WANDB_MODE", "offline")

    def run(command: str, recipe: str, *options: str) -> Path:
        small = ["--model.model", tiny_model, "--model.dtype", "float32", "--data.folder", "tasks"]
        small += ["--trainer.enable_progress_bar", "false", "--data.max_per_task_val", "4"]
        if command == "fit" and recipe != "lorahub":
            small += ["--data.examples_per_epoch", "48", "--data.batch_size", "8"]
        assert main([command, "-c", f"library/{recipe}.yaml", *small, *options]) == 0
        return Path("runs/library", recipe)

    return run


def metrics(folder: Path) -> dict[str, str]:
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return {name: value for row in rows for name, value in row.items() if value}


def test_all_recipes_are_run_here():
    assert {
        "private", "shared", "mbc", "poly", "mhr", "mhr_z", "mhr_mu", "phatgoose_gates", "lorahub",
        "arrow", "spectr", "cm", "phatgoose", "task_embedding",
    } == RECIPES  # fmt: skip


def test_private_library(quiver, tiny_model):
    folder = quiver("fit", "private")
    library = AdapterLibrary(folder / "adapter")
    assert sorted(library) == TASKS
    assert library.verify() == []
    assert library["more"].tasks == ("more",)
    assert library["more"].base == tiny_model
    assert library["more"].fingerprint
    found = metrics(folder)
    assert float(found["routing/accuracy"]) == 1.0  # the oracle
    assert {f"val/exact_match/{task}" for task in TASKS} <= found.keys()
    assert {"routing.csv", "routing.png"} <= {file.name for file in folder.iterdir()}
    # The card's code: a routed model is a live model.
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = model(torch.arange(1, 9)[None]).logits
    RoutedAdapter(UniformRouter(), library=str(folder / "adapter")).attach(model)
    assert not torch.equal(model(torch.arange(1, 9)[None]).logits, before)
    assert model.generate(torch.arange(1, 9)[None], max_new_tokens=4).shape[1] > 8


def test_shared(quiver):
    folder = quiver("fit", "shared")
    assert list(AdapterLibrary(folder / "adapter")) == ["skill_0"]


def test_mbc(quiver, capsys):
    quiver("fit", "private", "--trainer.default_root_dir", "runs/library/first")
    arguments = [
        "runs/library/private/adapter",
        "--num_clusters",
        "2",
        "--output",
        "runs/library/clusters.json",
    ]
    families = Path("families.json")
    families.write_text(json.dumps({"families": {"counting": ["less", "more"], "other": ["double"]}}))
    assert main(["library", "cluster", *arguments, "--families", str(families)]) == 0
    assert "adjusted Rand index" in capsys.readouterr().out
    assert Path("runs/library/clusters.png").is_file()
    folder = quiver("fit", "mbc")
    library = AdapterLibrary(folder / "adapter")
    assert sorted(library) == ["cluster_0", "cluster_1"]
    assert sorted(task for entry in library.values() for task in entry.tasks) == TASKS


def test_poly(quiver):
    folder = quiver("fit", "poly")
    assert len(AdapterLibrary(folder / "adapter")) == 8


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_recipes_keep_what_tasks_learn_apart_and_mix_as_their_papers(recipe):
    """Turning uniform is asked for; mu, Polytropon, MHR and Arrow mix factors."""
    settings = yaml.safe_load((REPOSITORY / "configs" / "library" / f"{recipe}.yaml").read_text())
    arguments = settings["model"]["init_args"]
    router = arguments.get("router", {"class_path": "WeightsRouter"})
    assert not [name for name in router.get("init_args", {}) if name.startswith("anneal")]
    alone = arguments.get("experts") == 1
    if router["class_path"] in ("UniformRouter", "PolyRouter", "ArrowRouter") and not alone:
        assert arguments["mixing"] == "lightning_modules.library.mixing.factor_mixing"


def test_mhr_and_few_shot_adaptation(quiver):
    annealed = ["--model.router.anneal_from", "2", "--model.router.anneal_until", "5"]
    kept = quiver("fit", "mhr", *TINY_MHR)
    state = torch.load(kept / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    logits = torch.stack([one for name, one in state.items() if name.endswith("router.logits")])
    assert float(logits.sigmoid().std(1).mean()) > 1e-3, "all tasks weigh the skills alike"
    skills = quiver("fit", "mhr", *TINY_MHR, *annealed) / "adapter"
    before = {name: AdapterLibrary(skills)[name].checksums for name in AdapterLibrary(skills)}
    quiver("fit", "mhr_z", *TINY_MHR, "--model.library", str(skills), "--data.tasks", "[more]")
    after = AdapterLibrary("runs/library/mhr_z/adapter")
    weights = "adapter_model.safetensors"
    assert all(after[name].checksums[weights] == before[name][weights] for name in before), "skills changed"
    quiver("fit", "mhr_mu", "--model.library", str(skills), "--data.tasks", "[more]")
    trained = AdapterLibrary("runs/library/mhr_mu/adapter")
    assert any(trained[name].checksums[weights] != before[name][weights] for name in before)


@pytest.mark.parametrize("recipe", ["arrow", "spectr"])
def test_routing_without_training(quiver, recipe):
    folder = quiver("validate", recipe, "--model.library", "runs/library/private/adapter",
                    "--model.router.top_k", "2")  # fmt: skip
    found = metrics(folder)
    assert 0 <= float(found["routing/accuracy"]) <= 1
    assert float(found["routing/entropy"]) > 0


@pytest.mark.parametrize("recipe", ["cm", "task_embedding"])
def test_routing_by_examples(quiver, recipe):
    """The first run sees training prompts; later ones do without, as the library keeps what they gave."""
    options = ["--model.library", "runs/library/private/adapter"]
    first = metrics(quiver("validate", recipe, *options))
    again = metrics(quiver("validate", recipe, *options, "--data.tasks", "[less]"))
    assert float(again["val/loss/less"]) == pytest.approx(float(first["val/loss/less"]), rel=1e-4)


def test_phatgoose(quiver):
    options = ["--model.library", "runs/library/private/adapter"]
    gates = quiver("fit", "phatgoose_gates", *options)
    quiver("validate", "phatgoose", "--model.library", str(gates / "adapter"))


def test_lorahub(quiver):
    quiver("fit", "lorahub", "--model.library", "runs/library/private/adapter", "--data.tasks", "[more]",
           "--trainer.max_steps", "6")  # fmt: skip
