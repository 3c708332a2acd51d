"""Two gloo ranks train what one process trains, and GRPO routes the rows that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import QUIET, quiver

from lightning_modules import AdapterLibraryModule, GRPOModule, RoutedAdapter, TaskRouter
from lightning_modules.cli import main
from lightning_modules.grpo.reference import KL
from lightning_modules.library.store import AdapterLibrary

ROUTERS = {
    "TaskRouter": {"rank": 2},
    "PolyRouter": {"experts": 3, "rank": 2, "mixing": "lightning_modules.library.mixing.factor_mixing"},
    "LinearRouter": {"library": "made", "router_lr": 0.05},
}


def write_tasks() -> None:
    for task in ("less", "more"):
        file = Path("tasks/train", f"{task}.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        change = 1 if task == "more" else -1
        rows = [{"input": f"{task} {i}", "output": str(i + change)} for i in range(12)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_file(model: str, router: str, name: str, batch_size: int, **trainer) -> str:
    config = {
        "seed_everything": 1,
        "model": {
            "class_path": "AdapterLibraryModule",
            "init_args": {
                "model": model,
                "router": {"class_path": router},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                **ROUTERS[router],
            },
        },
        "data": {
            "class_path": "MultiTaskDataModule",
            "init_args": {"folder": "tasks", "batch_size": batch_size},
        },
        "trainer": {
            **QUIET,
            "max_steps": 4,
            "default_root_dir": name,
            "num_sanity_val_steps": 0,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": name, "save_last": True, "every_n_train_steps": 1},
                }
            ],
            "enable_checkpointing": True,
            **trainer,
        },
    }
    Path(f"{name}.yaml").write_text(yaml.safe_dump(config))
    return f"{name}.yaml"


def library_of(model: str) -> None:
    """A small library to freeze."""
    torch.manual_seed(5)
    module = AdapterLibraryModule(router=TaskRouter(), experts=["less", "more"], rank=2, model=model)
    module.configure_model()
    for layer in module.adapter.layers.values():
        torch.nn.init.normal_(layer.experts.B, std=0.1)
    module.adapter.publish(AdapterLibrary("made", create=True))


def learned(folder: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(folder, "last.ckpt"), weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_two_ranks_equal_one_process(tiny_model, tmp_path, monkeypatch, router):
    monkeypatch.chdir(tmp_path)
    write_tasks()
    library_of(tiny_model)
    assert main(["fit", "-c", run_file(tiny_model, router, "one", 6)]) == 0
    code, _, err = quiver("fit", "-c", run_file(tiny_model, router, "two", 3, devices=2, strategy="ddp"))
    assert code == 0, err
    one, two = learned("one"), learned("two")
    assert one.keys() == two.keys()
    moved = 0
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
        moved += int(bool(value.any()))
    assert moved


@pytest.mark.parametrize("router", ["TaskRouter", "PolyRouter", "LinearRouter"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tiny_model, tmp_path, monkeypatch, router):
    monkeypatch.chdir(tmp_path)
    write_tasks()
    library_of(tiny_model)
    assert main(["fit", "-c", run_file(tiny_model, router, "whole", 6)]) == 0
    assert main(["fit", "-c", run_file(tiny_model, router, "parts", 6), "--trainer.max_steps", "2"]) == 0
    Path("parts/last.ckpt").rename("first.ckpt")
    resumed = ["fit", "-c", run_file(tiny_model, router, "parts", 6), "--ckpt_path", "first.ckpt"]
    assert main(resumed) == 0
    whole, parts = learned("whole"), learned("parts")
    for name, value in whole.items():
        assert torch.equal(parts[name], value), name


def test_grpo_routes_the_rows_that_run(tiny_model, tmp_path, monkeypatch):
    """Each forward pass of a rollout and of an update hears of as many rows as it has, and of the right tasks.

    Prompts tell their task; completions run on top of the prompts that were read just before.
    """
    import lightning.pytorch as lightning

    from datamodules import MultiTaskDataModule

    monkeypatch.chdir(tmp_path)
    write_tasks()
    heard, continued = [], []

    def reward(prompts, completions, **columns):
        return [float(sum(map(ord, text)) % 5) for text in completions]

    adapter = RoutedAdapter(TaskRouter(), experts=["less", "more"], rank=2)
    module = GRPOModule(
        model=tiny_model, adapter=adapter, rewards=[reward], num_generations=3, max_tokens_per_microbatch=200,
        kl=KL(0.1),
    )  # fmt: skip
    module.configure_model()

    def see(model, inputs, arguments):
        ids = arguments["input_ids"] if "input_ids" in arguments else inputs[0]
        cache = arguments.get("past_key_values")
        texts = module.tokenizer.batch_decode(ids, skip_special_tokens=True)
        if cache is not None and cache.get_seq_length():
            continued.append((adapter.state.tasks, texts, heard[-1][0]))
        elif ids[0].tolist() != list(range(1, 1 + ids.shape[1])):  # few tokens, to see what the model can do
            heard.append((adapter.state.tasks, texts))

    module.model.register_forward_pre_hook(see, with_kwargs=True)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, MultiTaskDataModule("tasks", batch_size=4))
    assert len(heard) > 4
    for tasks, texts in heard:
        assert len(tasks) == len(texts)
        assert all(f"{task} " in text for task, text in zip(tasks, texts, strict=True))
    assert len({tasks for tasks, _ in heard}) > 1
    assert len(continued) > 4
    for tasks, texts, of_prompts in continued:
        assert len(tasks) == len(texts)
        assert set(tasks) <= set(of_prompts)
    assert all(bool(layer.experts.B.detach()[e].any()) for layer in adapter.layers.values() for e in range(2))


@pytest.mark.parametrize("router", ["TaskRouter", "PolyRouter", "LinearRouter"])
def test_a_checkpoint_rebuilds_the_module(tiny_model, tmp_path, monkeypatch, router):
    """Tasks that came from the data included; no data is at hand then."""
    monkeypatch.chdir(tmp_path)
    write_tasks()
    library_of(tiny_model)
    assert main(["fit", "-c", run_file(tiny_model, router, "run", 6)]) == 0
    again = AdapterLibraryModule.load_from_checkpoint("run/last.ckpt", weights_only=True)
    state = learned("run")
    assert again.adapter.state_dict().keys() == state.keys()
    for name, value in again.adapter.state_dict().items():
        assert torch.equal(value, state[name])
    again.adapter.route(["more"], [""])
    assert again(torch.arange(1, 9)[None]).logits.isfinite().all()


def test_exported_experts_hold_what_was_trained(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tasks()
    file = run_file(tiny_model, "TaskRouter", "run", 6)
    content = yaml.safe_load(Path(file).read_text())
    content["trainer"]["callbacks"].append({"class_path": "AdapterExport"})
    Path(file).write_text(yaml.safe_dump(content))
    assert main(["fit", "-c", file]) == 0
    state = learned("run")
    library = AdapterLibrary("run/adapter")
    for number, name in enumerate(("less", "more")):
        saved = load_file(library[name].folder / "adapter_model.safetensors")
        layer = "model.layers.1.mlp.up_proj"
        assert torch.equal(saved[f"base_model.model.{layer}.lora_A.weight"], state[f"{layer}.A"][number])
