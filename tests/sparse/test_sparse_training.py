"""Sparse adapters through the command line: SFT and GRPO from YAML, exact resume, rebuilding, export."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from sparse_models import IDS, load
from test_resume import assert_same, metrics

from lightning_modules import SparseAdapterModule
from lightning_modules.attention import prefer_blocks
from lightning_modules.cli import main
from lightning_modules.sparse.expert import SparseExpert

STEPS = 8


def named(name, **arguments):
    place = "scores" if name.islower() else "schedules"
    path = f"lightning_modules.sparse.{place}.{name}"
    return path if name.islower() else {"class_path": path, "init_args": arguments}


ADAPTERS = {
    "static": {"schedule": named("Static", batches=4), "score": named("snip")},
    "one_shot": {"schedule": named("OneShot", steps=4, batches=2), "score": named("sensitivity")},
    "first_epochs": {
        # An epoch has 3 steps.
        "schedule": named("FirstEpochs", every=2, epochs=2, batches=2),
        "score": named("signed_sensitivity"),
    },
    "grow_and_drop": {
        "schedule": named("GrowAndDrop", every=3, steps=100, fraction=0.5, batches=2),
        "score": named("gradient_magnitude"),
        "budget": "global",
    },
}
# The step in which Ctrl-C is pressed: while gradients are observed or all is trained, and after a choice.
INTERRUPTIONS = [
    *(("static", 2), ("static", 6)),
    *(("one_shot", 3), ("one_shot", 6)),
    *(("first_epochs", 1), ("first_epochs", 3), ("first_epochs", 7)),
    ("grow_and_drop", 4),
]


def spread(completions, **columns):
    """A reward that differs within most groups."""
    return [sum(map(ord, text)) % 7 for text in completions]


def config(folder, model, name, module="SparseAdapterModule", callbacks=(), init_args=None, **trainer) -> str:
    sparse = {"density": 0.1, **ADAPTERS[name]}
    if module == "GRPOModule":
        own = {
            "adapter": {"class_path": "lightning_modules.SparseAdapter", "init_args": sparse},
            "rewards": ["test_sparse_training.spread"],
            "sampling": {"max_new_tokens": 6},
            "kl": {"coef": 0.1},
        }
    else:
        own = sparse
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "", "version": ""},
    }
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(folder / "checkpoints"), "save_last": True},
    }
    written = {
        "seed_everything": 7,
        "model": {
            "class_path": module,
            "init_args": {
                "model": model,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "lr_scheduler": {
                    "class_path": "torch.optim.lr_scheduler.LinearLR",
                    "init_args": {"total_iters": STEPS},
                },
                **own,
                **(init_args or {}),
            },
        },
        "data": {
            "class_path": "ArithmeticDataModule",
            "init_args": {"batch_size": 4, "train_size": 12, "val_size": 0},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "max_epochs": -1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "logger": logger,
            "callbacks": [checkpoint, *callbacks],
            **trainer,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(written))
    return str(folder / "run.yaml")


def saved(folder, name="last*.ckpt"):
    """The newest: Lightning writes `last-v1.ckpt` after an interruption within the first epoch."""
    files = (folder / "checkpoints").glob(name)
    return torch.load(max(files, key=lambda file: file.stat().st_mtime_ns), weights_only=True)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def straight(tiny_model, tmp_path_factory):
    """Uninterrupted runs, each made once."""
    made: dict = {}

    def run(name, module="SparseAdapterModule"):
        if (name, module) not in made:
            folder = tmp_path_factory.mktemp("straight")
            assert main(["fit", "-c", config(folder, tiny_model, name, module)]) == 0
            made[name, module] = folder
        return made[name, module]

    return run


@pytest.mark.parametrize(("name", "step"), INTERRUPTIONS)
def test_interrupted_run_equals_uninterrupted_run(tiny_model, tmp_path, straight, name, step):
    check_resume(tiny_model, tmp_path, straight, name, step, "SparseAdapterModule")


@pytest.mark.parametrize(("name", "step"), [("static", 2), ("first_epochs", 3)])
def test_interrupted_grpo_equals_uninterrupted_grpo(tiny_model, tmp_path, straight, name, step):
    check_resume(tiny_model, tmp_path, straight, name, step, "GRPOModule")
    rows = metrics(straight(name, "GRPOModule"))
    kl = [float(row["train/kl"]) for row in rows if "train/kl" in row]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert max(kl) > 1e-6


def check_resume(tiny_model, folder, straight, name, step, module) -> None:
    interrupt = {"class_path": "test_resume.InterruptAt", "init_args": {"step": step}}
    assert main(["fit", "-c", config(folder, tiny_model, name, module, [interrupt])]) == 130
    middle = saved(folder, "interrupted.ckpt")
    assert middle["global_step"] == step
    again = config(folder, tiny_model, name, module)
    checkpoint = str(folder / "checkpoints" / "interrupted.ckpt")
    assert main(["fit", "-c", again, "--ckpt_path", checkpoint]) == 0
    whole = straight(name, module)
    one, two = saved(whole), saved(folder)
    assert one["global_step"] == STEPS
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "rng_states", "counters", "epoch"):
        assert_same(one[key], two[key], key)
    assert metrics(folder) == metrics(whole)
    assert len(metrics(whole)) >= STEPS
    # It was interrupted in the phase that it is meant to be, and went on to learn.
    dense = not any(key.endswith(".indices") for key in middle["state_dict"])
    choice = {"static": 4, "one_shot": 4, "first_epochs": 2, "grow_and_drop": 0}[name]
    if module == "SparseAdapterModule":  # a GRPO step without signal is none for the schedule
        assert middle["state_dict"]["schedule"].tolist()[:2] == [step, int(step >= choice)]
        assert dense == (name in ("one_shot", "first_epochs") and step < choice)
    assert any(value.any() for key, value in one["state_dict"].items() if key.endswith(".values"))


def test_a_checkpoint_holds_plain_data_of_the_size_of_the_values(straight):
    checkpoint = saved(straight("static"))
    state = checkpoint["state_dict"]
    kinds = {key.rpartition(".")[2] for key in state}
    assert kinds == {"values", "indices", "schedule"}
    assert sum(v.numel() for k, v in state.items() if k.endswith("values")) == sum(
        int(0.1 * load_size) for load_size in [1024, 512, 512, 1024, 2048, 2048, 2048] * 2
    )


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_checkpoint_rebuilds_the_module(tiny_model, straight, name):
    folder = straight(name)
    rebuilt = SparseAdapterModule.load_from_checkpoint(str(folder / "checkpoints" / "last.ckpt"))
    assert type(rebuilt) is SparseAdapterModule
    assert type(rebuilt.adapter.schedule).__name__ == ADAPTERS[name]["schedule"]["class_path"].split(".")[-1]
    assert rebuilt.adapter.schedule.batches == ADAPTERS[name]["schedule"]["init_args"].get("batches", 1)
    assert rebuilt.adapter.score.__name__ == ADAPTERS[name]["score"].split(".")[-1]
    assert rebuilt.adapter.density == 0.1
    assert_same(rebuilt.adapter.state_dict().keys(), saved(folder)["state_dict"].keys())
    expected = load(tiny_model)
    with torch.no_grad():
        for weight in rebuilt.adapter.weights:
            values = saved(folder)["state_dict"][f"{weight.name}.values"]
            assert torch.equal(weight.values.detach(), values)
            indices = saved(folder)["state_dict"][f"{weight.name}.indices"].long()
            flat = expected.get_parameter(weight.name).view(-1)
            flat[indices] = flat[indices] + values
    assert torch.equal(logits(rebuilt), logits(expected))


def test_a_module_made_in_python_is_rebuilt(tiny_model, tmp_path):
    import lightning.pytorch as lightning

    from datamodules import ArithmeticDataModule
    from lightning_modules.sparse.schedules import FirstEpochs
    from lightning_modules.sparse.scores import sensitivity

    module = SparseAdapterModule(
        model=tiny_model, score=sensitivity, schedule=FirstEpochs(2, keeps=False), structure="row"
    )
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, ArithmeticDataModule(batch_size=2, train_size=8, val_size=0))
    trainer.save_checkpoint(tmp_path / "made.ckpt")
    rebuilt = SparseAdapterModule.load_from_checkpoint(str(tmp_path / "made.ckpt"))
    assert rebuilt.adapter.schedule == FirstEpochs(2, keeps=False)
    assert rebuilt.adapter.score is sensitivity
    assert rebuilt.adapter.structure == "row"
    assert torch.equal(logits(rebuilt), logits(module))
    assert not torch.equal(logits(module), logits(load(tiny_model)))


def test_a_checkpoint_of_other_weights_is_refused(tiny_model, tmp_path, straight, capsys):
    other = config(tmp_path, tiny_model, "static", init_args={"target_modules": ["q_proj"]})
    checkpoint = str(straight("static") / "checkpoints" / "last.ckpt")
    assert main(["fit", "-c", other, "--ckpt_path", checkpoint]) == 1
    assert "The checkpoint does not fit this adapter: 0 weights are missing" in capsys.readouterr().err


def test_its_own_adapter_and_a_given_one_are_refused_together(tiny_model):
    with pytest.raises(ValueError, match="makes its own adapter"):
        SparseAdapterModule(model=tiny_model, adapter=object())


def test_the_exported_folder_gives_identical_logits_in_a_new_process(tiny_model, tmp_path):
    dtype = "bfloat16"  # the harder case: what is added is rounded
    run = config(
        tmp_path, tiny_model, "first_epochs", "SparseAdapterModule", [{"class_path": "AdapterExport"}]
    )
    assert main(["fit", "-c", run, "--model.dtype", dtype]) == 0
    module = SparseAdapterModule.load_from_checkpoint(str(tmp_path / "checkpoints" / "last.ckpt"))
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == tiny_model
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M;"
        "from lightning_modules.sparse.expert import SparseExpert as E;"
        "from lightning_modules.attention import prefer_blocks;"  # torch's own rounds otherwise
        f"m = M.from_pretrained(sys.argv[1], dtype=torch.{dtype}).eval(); E(sys.argv[2]).apply(m); prefer_blocks(m);"
        "torch.save(m(input_ids=torch.load(sys.argv[3])).logits.detach(), sys.argv[4])"
    )
    torch.save(IDS, tmp_path / "ids.pt")
    paths = [tiny_model, tmp_path / "adapter", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, timeout=300)
    theirs = torch.load(tmp_path / "logits.pt")
    assert torch.equal(theirs, logits(module))
    base = load(tiny_model, getattr(torch, dtype))
    prefer_blocks(base)
    assert not torch.equal(theirs, logits(base))
    assert SparseExpert(Path(tmp_path / "adapter")).deltas.keys() == module.adapter.deltas.keys()
