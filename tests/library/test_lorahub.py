"""LoraHub finds the weights of experts from a few examples, and goes on where it was stopped."""

from __future__ import annotations

import sys

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY
from small_runs import QUIET, write_rows
from transformers import AutoModelForCausalLM

from datamodules import JsonlDataModule
from lightning_modules.cli import main
from lightning_modules.library.adapter import RoutedAdapter
from lightning_modules.library.lorahub import LoraHubModule, WeightSearch
from lightning_modules.library.mixing import output_mixing
from lightning_modules.library.publish import write_expert
from lightning_modules.library.routers.fixed import WeightsRouter
from lightning_modules.library.store import AdapterLibrary

NAMES = ["zero", "one", "two"]
QUESTIONS = [f"What comes after {word}?" for word in ("red", "green", "a", "the", "noon", "seven")]


@pytest.fixture(scope="module")
def library(tiny_model, tmp_path_factory):
    """Three experts of random factors."""
    folder = tmp_path_factory.mktemp("hub")
    made = AdapterLibrary(folder / "library", create=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for layer, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "layers" in layer:
                out, width = module.weight.shape
                A = torch.randn(2, width, generator=generator) / width**0.5
                factors[layer] = (A, torch.randn(out, 2, generator=generator), 1.0)
        (folder / name).mkdir()
        write_expert(folder / name, factors, None)
        made.add(folder / name, name, tasks=[name])
    return str(made.root)


def module_of(tiny_model, library, **options):
    return LoraHubModule(model=tiny_model, library=library, **options)


@pytest.fixture(scope="module")
def rows(tiny_model, library, tmp_path_factory):
    """What expert "two" alone answers."""
    module = module_of(tiny_model, library)
    module.configure_model()
    module.set_weights([0, 0, 1])
    prompts = module.encode_prompts(QUESTIONS, room=8)
    texts = []
    for ids in prompts:
        drawn = module.model.generate(
            torch.tensor([ids]), max_new_tokens=8, min_new_tokens=6, do_sample=False, pad_token_id=0
        )
        texts.append(module.tokenizer.decode(drawn[0, len(ids) :], skip_special_tokens=True))
    file = tmp_path_factory.mktemp("rows") / "train.jsonl"
    write_rows(file, [{"prompt": q, "answer": text or "?"} for q, text in zip(QUESTIONS, texts, strict=True)])
    return str(file)


def data(rows):
    return JsonlDataModule(train_file=rows, batch_size=len(QUESTIONS), shuffle=False)


def fit(module, rows, *, steps=40, checkpoint=None, **options) -> lightning.Trainer:
    lightning.seed_everything(options.pop("seed", 5))
    quiet = {**QUIET, "max_steps": steps, "max_epochs": -1, "default_root_dir": None}
    trainer = lightning.Trainer(**{**quiet, **options})
    trainer.fit(module, datamodule=data(rows), ckpt_path=checkpoint)
    return trainer


def loss_of(module, rows, weights) -> float:
    """Mean cross-entropy of the answers under given weights."""
    module.set_weights(weights)
    source = data(rows)
    source.setup("fit")
    with torch.no_grad():
        return float(module._mean_loss(next(iter(source.train_dataloader()))))


def test_planted_weights_are_found(tiny_model, library, rows, capsys):
    module = module_of(tiny_model, library)
    trainer = fit(module, rows)
    assert trainer.global_step == 40
    assert len(module.search.losses) == 40
    best, loss = module.search.best
    assert float(trainer.callback_metrics["train/best_loss"]) == pytest.approx(loss)
    assert loss == min(module.search.losses)
    tried = np.array(module.search.candidates)
    assert not tried[0].any()
    assert np.abs(tried).max() <= 1.5
    installed = next(iter(module.adapter.layers.values())).router.get_parameter("values")
    torch.testing.assert_close(installed, torch.tensor(best, dtype=torch.float32))
    printed = capsys.readouterr().out
    assert f"{best[2]:+.3f}  two" in printed
    found = loss_of(module, rows, best)
    assert loss == pytest.approx(found + 0.05 * np.abs(best).mean(), rel=1e-5)
    others = {
        name: loss_of(module, rows, w) for name, w in {"uniform": [1 / 3] * 3, "base": [0.0] * 3}.items()
    }
    print("found", best, found, others)
    assert found < 0.8 * min(others.values())
    assert int(np.argmax(best)) == 2


def test_seeds(tiny_model, library, rows):
    runs = []
    for seed in (1, 1, 2):
        module = module_of(tiny_model, library)
        fit(module, rows, steps=12, seed=seed)
        runs.append(module.search)
    assert runs[0].losses == runs[1].losses
    assert runs[0].seed != runs[2].seed


class StopAt(lightning.Callback):
    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == 7:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/stopped.ckpt")
            trainer.should_stop = True


def test_an_interrupted_search_goes_on(tiny_model, library, rows, tmp_path):
    whole = module_of(tiny_model, library)
    fit(whole, rows, steps=15)
    stopped = module_of(tiny_model, library)
    fit(stopped, rows, steps=15, callbacks=[StopAt()], default_root_dir=tmp_path, min_steps=0)
    assert len(stopped.search.losses) == 7
    resumed = module_of(tiny_model, library)
    fit(resumed, rows, steps=15, checkpoint=tmp_path / "stopped.ckpt", seed=99)
    assert resumed.search.losses == whole.search.losses
    assert np.array_equal(resumed.search.candidates, whole.search.candidates)

    rebuilt = LoraHubModule.load_from_checkpoint(tmp_path / "stopped.ckpt", map_location="cpu")
    rebuilt.configure_model()
    values = next(iter(rebuilt.adapter.layers.values())).router.get_parameter("values")
    rebuilt.on_load_checkpoint(torch.load(tmp_path / "stopped.ckpt", weights_only=True))
    torch.testing.assert_close(values, torch.tensor(stopped.search.best[0], dtype=torch.float32))


def test_another_search_cannot_be_replayed():
    search = WeightSearch(3, 1.5, 10, seed=1)
    for _ in range(4):
        search.tell(float(np.abs(search.ask() - 1).sum()))
    state = search.state()
    with pytest.raises(ValueError, match="Install the version of that run"):
        WeightSearch(3, 1.5, 10, seed=1).replay(state["candidates"] + 0.1, state["losses"])


def test_what_is_not_finite_is_never_best():
    search = WeightSearch(2, 0.5, 10, seed=1)
    for loss in (float("nan"), 3.0, float("inf"), 2.0, float("nan")):
        search.ask()
        search.tell(loss)
    assert search.best[1] == 2.0
    assert np.abs(search.candidates).max() <= 0.5


def test_exported_weights_come_back(tiny_model, library, rows, tmp_path):
    module = module_of(tiny_model, library, mixing=output_mixing)
    fit(module, rows, steps=12)
    module.adapter.write(tmp_path / "exported")
    adapter = RoutedAdapter(WeightsRouter(), str(tmp_path / "exported"))
    again = adapter.attach(AutoModelForCausalLM.from_pretrained(tiny_model))
    ids = torch.arange(1, 25).view(2, 12)
    torch.testing.assert_close(again(ids).logits, module.model(ids).logits)
    adapter = RoutedAdapter(WeightsRouter(), library)
    with pytest.raises(ValueError, match="holds no weight of 'zero'"):
        adapter.attach(AutoModelForCausalLM.from_pretrained(tiny_model))


def test_bad_settings(tiny_model, library, rows, monkeypatch):
    with pytest.raises(ValueError, match="bound=0"):
        module_of(tiny_model, library, bound=0)
    with pytest.raises(ValueError, match="train_experts"):
        module_of(tiny_model, library, train_experts=True)
    with pytest.raises(ValueError, match="max_steps"):
        fit(module_of(tiny_model, library), rows, steps=-1)
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(ImportError, match=r"lightning-quiver\[lorahub\]"):
        fit(module_of(tiny_model, library), rows)


def test_recipe(tiny_model, library, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        (tmp_path / "tasks" / part).mkdir(parents=True)
        write_rows(
            tmp_path / "tasks" / part / "more.jsonl",
            [{"input": str(i), "output": str(i + 1)} for i in range(20)],
        )
    command = ["fit", "-c", "library/lorahub.yaml", "--model.library", library, "--model.model", tiny_model]
    command += ["--model.dtype", "float32", "--data.folder", "tasks", "--data.tasks", "[more]"]
    command += ["--trainer.max_steps", "6", "--trainer.enable_progress_bar", "false"]
    assert main(command) == 0
    out = capsys.readouterr()
    assert "of 6 candidates" in out.out
    folder = tmp_path / "runs" / "library" / "lorahub"
    assert list(AdapterLibrary(folder / "adapter")) == NAMES
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert "train/best_loss" in (folder / "metrics.csv").read_text()
    assert "router" not in yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]
    assert (REPOSITORY / "configs" / "library" / "lorahub.yaml").is_file()
