"""AdapterExport and `quiver export`: what is written is what was trained, and others can load it."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from callbacks import AdapterExport, GracefulStop
from callbacks.graceful_stop import StoppedError
from datamodules import ArithmeticDataModule
from lightning_modules import RoutedAdapter, SFTModule, SparseAdapter, UniformRouter
from lightning_modules.cli import main
from lightning_modules.export import save_adapter
from lightning_modules.sparse.schedules import Static
from lightning_modules.sparse.scores import random

IDS = torch.arange(1, 41)[None] * 5 % 257


class FallingScore(lightning.Callback):
    """A metric that is best after the first epoch."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/score", 1.0 - trainer.current_epoch)


def fit(model, folder, adapter, *callbacks, epochs=3):
    torch.manual_seed(0)
    module = SFTModule(
        model=model, adapter=adapter, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02)
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[
            FallingScore(),
            *callbacks,
            ModelCheckpoint(folder / "checkpoints", monitor="val/score", mode="max"),
        ],
    )
    data = ArithmeticDataModule(batch_size=4, train_size=8, val_size=2, max_operand=9)
    trainer.fit(module, data)
    module.eval()
    return module


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def on_top_of(base: str, folder: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


@pytest.fixture(scope="module")
def lora(tiny_model, tmp_path_factory):
    """A LoRA run of three epochs, the first of them the best: its module and folder."""
    folder = tmp_path_factory.mktemp("lora")
    return fit(tiny_model, folder, LoraConfig(r=4, target_modules="all-linear"), AdapterExport()), folder


def test_the_adapter_is_what_was_trained(lora, tiny_model):
    module, folder = lora
    base = logits(AutoModelForCausalLM.from_pretrained(tiny_model))
    trained = logits(module)
    assert (trained - base).abs().max() > 0.1
    torch.testing.assert_close(logits(on_top_of(tiny_model, folder / "adapter")), trained, atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(folder / "adapter").chat_template is not None


def test_the_best_adapter_is_that_of_the_best_checkpoint(lora, tiny_model):
    """And the module keeps the last weights."""
    module, folder = lora
    [file] = (folder / "checkpoints").iterdir()
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint["global_step"] == 2
    best = load_file(folder / "adapter-best" / "adapter_model.safetensors")
    last = load_file(folder / "adapter" / "adapter_model.safetensors")
    for saved, expected in ((best, checkpoint["state_dict"]), (last, module.adapter.state_dict())):
        assert saved.keys() == expected.keys()
        for name, tensor in saved.items():
            assert torch.equal(tensor, expected[name]), name
    assert any(not torch.equal(best[name], last[name]) for name in best)
    difference = logits(on_top_of(tiny_model, folder / "adapter-best")) - logits(module)
    assert difference.abs().max() > 1e-2


def card(folder) -> tuple[dict, str]:
    text = (folder / "README.md").read_text()
    _, head, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(head), body


def run_code(folder) -> torch.nn.Module:
    """Run the card's code block with the folder put in, and return its `model`."""
    _, body = card(folder)
    [code] = re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL)
    assert "path/of/this/folder" in code
    names: dict = {}
    exec(code.replace("path/of/this/folder", str(folder)), names)
    return names["model"]


def test_the_model_card(lora, tiny_model):
    module, folder = lora
    head, body = card(folder / "adapter")
    # A path of this machine is no base_model for the hub.
    assert head == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["quiver", "sft"]}
    assert f"`{tiny_model}`" in body
    assert "Optimiser steps: 6." in body
    assert "| val/score | -1 |" in body
    assert "| train/loss |" in body
    torch.testing.assert_close(logits(run_code(folder / "adapter")), logits(module), atol=1e-5, rtol=0)
    _, body = card(folder / "adapter-best")
    assert "Optimiser steps: 2." in body
    assert re.findall(r"^\| (?!metric)(\S+) \| (\S+) \|$", body, flags=re.MULTILINE) == [("val/score", "1")]


class Interrupt(lightning.Callback):
    """Presses Ctrl-C in the first step."""

    def on_train_batch_start(self, trainer, *_):
        os.kill(os.getpid(), signal.SIGINT)


def test_what_a_stopped_run_has_learned_is_exported(tiny_model, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(StoppedError):
        fit(tiny_model, tmp_path, config, AdapterExport(), Interrupt(), GracefulStop())
    _, body = card(tmp_path / "adapter")
    assert "Optimiser steps: 1." in body
    moved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in moved.items() if "lora_B" in name)


def test_the_card_of_other_sources(lora, tmp_path):
    module, _ = lora
    gguf = tmp_path / "some.gguf"
    gguf.touch()
    own = module.adapter.source
    try:
        module.adapter.source = "org/name"
        save_adapter(module, tmp_path / "hub", steps=1, metrics={"loss": float("nan")})
        module.adapter.source = str(gguf)
        save_adapter(module, tmp_path / "gguf", steps=1, metrics={})
    finally:
        module.adapter.source = own
    head, body = card(tmp_path / "hub")
    assert head["base_model"] == "org/name"
    assert 'from_pretrained("org/name")' in body
    assert "nan" not in body
    assert "| - | - |" in body
    head, body = card(tmp_path / "gguf")
    assert "base_model" not in head
    assert f'from_pretrained(resolve_model("{gguf}"))' in body


def test_full_fine_tuning_exports_a_model(tiny_model, tmp_path):
    module = fit(tiny_model, tmp_path, None, AdapterExport(folder="model"), epochs=2)
    trained = logits(module)
    folder = tmp_path / "model"
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(folder)), trained, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(logits(run_code(folder)), trained, atol=1e-5, rtol=0)
    head, body = card(folder)
    assert head["library_name"] == "transformers"
    assert "A fine-tuned copy of" in body
    assert AutoTokenizer.from_pretrained(folder).decode([0]) == "</s>"
    best = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model-best"))
    assert (best - trained).abs().max() > 1e-3


def test_a_second_export_keeps_the_earlier_folder(tiny_model, tmp_path):
    weights = "adapter_model.safetensors"
    seen = []
    for rank in (2, 3):
        fit(tiny_model, tmp_path, LoraConfig(r=rank, target_modules=["q_proj"]), AdapterExport(), epochs=1)
        seen.append((tmp_path / "adapter" / weights).read_bytes())
    assert (tmp_path / "adapter.1" / weights).read_bytes() == seen[0] != seen[1]
    assert {file.name for file in tmp_path.iterdir()} == {
        *("adapter", "adapter.1", "adapter-best", "adapter-best.1", "checkpoints")
    }


def test_a_best_checkpoint_that_is_gone_is_left_out(tiny_model, tmp_path):
    class Remove(lightning.Callback):
        def on_train_end(self, trainer, pl_module):
            Path(trainer.checkpoint_callback.best_model_path).unlink()

    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    fit(tiny_model, tmp_path, adapter, AdapterExport(), Remove(), epochs=1)
    assert (tmp_path / "adapter").is_dir()
    assert not (tmp_path / "adapter-best").exists()


def test_another_module_is_refused_before_training(tmp_path):
    trainer = lightning.Trainer(barebones=True, accelerator="cpu")
    with pytest.raises(ValueError, match="exports a CausalLMModule, not LightningModule"):
        AdapterExport().setup(trainer, lightning.LightningModule(), "fit")


def test_quiver_export_merges(lora, tiny_model, tmp_path, capsys):
    module, folder = lora
    merged = tmp_path / "merged"
    assert main(["export", str(folder / "adapter"), str(merged)]) == 0
    assert f"Wrote the merged model, in float32, to {merged}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert not hasattr(model, "peft_config")
    torch.testing.assert_close(logits(model), logits(module), atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(merged).chat_template is not None
    assert main(["export", str(folder / "adapter"), str(tmp_path / "two"), "--base", tiny_model]) == 0
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (
        merged / "model.safetensors"
    ).read_bytes()


def test_quiver_export_says_what_is_wrong(lora, tmp_path, capsys):
    folder = lora[1]
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "is no adapter folder: it has no adapter_config.json" in capsys.readouterr().err
    assert main(["export", str(folder / "adapter"), str(tmp_path)]) == 1
    assert "exists already. Give a new folder" in capsys.readouterr().err
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    config = (folder / "adapter" / "adapter_config.json").read_text()
    config = re.sub(r'"base_model_name_or_path": ".*?"', '"base_model_name_or_path": null', config)
    (nameless / "adapter_config.json").write_text(config)
    assert main(["export", str(nameless), str(tmp_path / "out")]) == 1
    assert "does not name its base model. Give it with --base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("adapter", [LoraConfig(r=2, target_modules=["q_proj"]), None], ids=["lora", "full"])
def test_values_that_are_not_finite_are_not_exported(tiny_model, tmp_path, adapter):
    class Spoil(lightning.Callback):
        def on_train_end(self, trainer, pl_module):
            *_, last = (p for p in pl_module.parameters() if p.requires_grad)
            last.data.view(-1)[1] = float("nan")

    with pytest.raises(
        ValueError, match=r"AdapterExport writes no adapter: \S+: 1 values are NaN or infinite"
    ):
        fit(tiny_model, tmp_path, adapter, Spoil(), AdapterExport(), epochs=1)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoints"]


def test_the_cards_of_a_sparse_adapter_and_a_library_run(tiny_model, tmp_path):
    adapters = {
        "sparse": SparseAdapter(["q_proj"], density=0.1, score=random, schedule=Static(batches=0)),
        "library": RoutedAdapter(UniformRouter(), experts=["a", "b"], rank=2),
    }
    for name, adapter in adapters.items():
        module = SFTModule(model=tiny_model, adapter=adapter)
        module.configure_model()
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                torch.manual_seed(len(key))
                torch.nn.init.normal_(parameter)
        expected = logits(module.model)
        save_adapter(module, tmp_path / name, steps=1, metrics={})
        assert (expected - logits(AutoModelForCausalLM.from_pretrained(tiny_model))).abs().max() > 0.01
        torch.testing.assert_close(logits(run_code(tmp_path / name)), expected, atol=1e-4, rtol=1e-4)
