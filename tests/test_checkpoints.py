"""Checkpoints rebuild their module, from the command line's settings and from plain Python's."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, PromptTuningConfig
from test_resume import config, spread
from transformers import AutoModelForCausalLM

from datamodules import ArithmeticDataModule
from lightning_modules import CausalLMModule, ClippedSurrogate, GRPOModule, SFTModule
from lightning_modules.cli import main
from lightning_modules.hparams import NotPlainError, plain
from lightning_modules.sampling import GenerateSampler, Sampling


def logits(module) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.arange(5, 25)[None]).logits


def fit(module, folder, steps=2) -> str:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, ArithmeticDataModule(batch_size=8, train_size=32, val_size=0))
    path = str(folder / "made.ckpt")
    trainer.save_checkpoint(path)
    module.eval()
    return path


def python_module(model, **options) -> GRPOModule:
    lightning.seed_everything(1, verbose=False)
    return GRPOModule(
        rewards=[spread],
        model=model,
        sampling=Sampling(max_new_tokens=8, temperature=1.3),
        sampler=GenerateSampler(max_rows=5),
        optimizer=partial(torch.optim.SGD, lr=0.05),
        **options,
    )


@pytest.mark.parametrize("adapter", [LoraConfig(r=4, target_modules="all-linear", lora_alpha=9), None])
def test_a_module_made_in_python_is_rebuilt(tiny_model, tmp_path, adapter):
    module = python_module(
        tiny_model, adapter=adapter, num_generations=4, policy_loss=ClippedSurrogate((0.1, 0.3))
    )
    path = fit(module, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        assert not torch.equal(logits(module), base(torch.arange(5, 25)[None]).logits)  # it has learned
    rebuilt = GRPOModule.load_from_checkpoint(path).eval()
    assert torch.equal(logits(rebuilt), logits(module))
    assert rebuilt.num_generations == 4
    assert tuple(rebuilt.policy_loss.clip) == (0.1, 0.3)
    assert rebuilt.sampling == Sampling(max_new_tokens=8, temperature=1.3)
    assert isinstance(rebuilt.sampler, GenerateSampler)
    assert rebuilt.sampler.max_rows == 5
    assert rebuilt.reward_functions == [spread]
    assert rebuilt.configure_optimizers().defaults["lr"] == 0.05
    assert rebuilt.skipped_steps == module.skipped_steps
    assert rebuilt.num_tokens == module.num_tokens > 0


def test_a_lambda_is_left_out_and_can_be_given_again(tiny_model, tmp_path):
    module = SFTModule(model=tiny_model, optimizer=lambda p: torch.optim.SGD(p, lr=0.3))
    path = fit(module, tmp_path)
    with pytest.warns(UserWarning, match="The checkpoint does not hold optimizer"):
        again = SFTModule.load_from_checkpoint(path)
    assert again.configure_optimizers().defaults["lr"] == 1e-6
    again = SFTModule.load_from_checkpoint(
        path, optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 2}}
    )
    assert again.configure_optimizers().defaults["lr"] == 2
    assert torch.equal(logits(again.eval()), logits(module))


def test_a_checkpoint_of_the_command_line_is_rebuilt_and_its_export_agrees(tiny_model, tmp_path):
    run = config(tmp_path, tiny_model, "GRPOModule", max_steps=3, callbacks=[{"class_path": "AdapterExport"}])
    assert main(["fit", "-c", run]) == 0
    rebuilt = GRPOModule.load_from_checkpoint(str(tmp_path / "checkpoints" / "last.ckpt")).eval()
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    exported = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(exported(torch.arange(5, 25)[None]).logits, logits(rebuilt))
        with exported.disable_adapter():
            assert not torch.equal(exported(torch.arange(5, 25)[None]).logits, logits(rebuilt))


def test_a_checkpoint_of_another_adapter_is_refused(tiny_model, tmp_path):
    path = fit(python_module(tiny_model, adapter=LoraConfig(r=4, target_modules="all-linear")), tmp_path)
    other = python_module(tiny_model, adapter=LoraConfig(r=8, target_modules="all-linear"))
    trainer = lightning.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    with pytest.raises(
        ValueError, match=r"The checkpoint does not fit: .* has shape \(4, 32\), the model needs"
    ):
        trainer.fit(other, ArithmeticDataModule(val_size=0), ckpt_path=path, weights_only=True)
    full = python_module(tiny_model)
    with pytest.raises(ValueError, match=r"does not fit model and adapter: .* tensors are missing"):
        trainer.fit(full, ArithmeticDataModule(val_size=0), ckpt_path=path, weights_only=True)


def test_the_disabled_adapter_is_the_base_model(tiny_model):
    lightning.seed_everything(1, verbose=False)
    module = CausalLMModule(tiny_model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    module.configure_model()
    module.eval()
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        expected = base(torch.arange(5, 25)[None]).logits
    assert not torch.equal(logits(module), expected)
    with module.adapter.disabled():
        assert torch.equal(logits(module), expected)


def test_a_resumed_run_takes_optimiser_settings_from_the_configuration(tiny_model, tmp_path):
    run = config(tmp_path, tiny_model, "GRPOModule", max_steps=2)
    assert main(["fit", "-c", run]) == 0
    checkpoint = str(tmp_path / "checkpoints" / "last.ckpt")
    first = torch.load(checkpoint, weights_only=True)
    resume = ["fit", "-c", run, "--ckpt_path", checkpoint, "--trainer.max_steps", "4"]
    changes = ["--model.optimizer.lr", "0.03", "--model.optimizer.weight_decay", "0.5"]
    with pytest.warns(UserWarning, match=r"lr: 0.01 in the checkpoint, 0.03 in the configuration: going on"):
        assert main([*resume, *changes]) == 0
    second = torch.load(checkpoint, weights_only=True)
    assert second["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.5
    # LinearLR goes from a third to the whole over ten updates: its course stays, its height is the new one.
    for saved, height in ((first, 0.01), (second, 0.03)):
        updates = saved["global_step"] - saved["counters"]["skipped_steps"]
        [group] = saved["optimizer_states"][0]["param_groups"]
        assert group["lr"] == pytest.approx(height * (1 / 3 + 2 / 3 * updates / 10))


def test_prompt_learning_is_refused(tiny_model):
    with pytest.raises(ValueError, match="PromptTuningConfig learns virtual tokens, which padded batches"):
        CausalLMModule(tiny_model, PromptTuningConfig(num_virtual_tokens=3))


def test_a_schedule_that_needs_a_metric_is_refused(tiny_model):
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau
    module = CausalLMModule(tiny_model, lr_scheduler=schedule)
    module.configure_model()
    with pytest.raises(ValueError, match="ReduceLROnPlateau needs a metric at each step"):
        module.configure_optimizers()


class Bound:
    def __call__(self, completions, **columns):
        return self.score(completions)

    def score(self, completions, **columns):
        return [0.0 for _ in completions]


def test_plain_refuses_what_cannot_be_imported():
    for value in (lambda: None, Bound().score, partial(spread, ["x"]), torch.zeros(2)):
        with pytest.raises(NotPlainError):
            plain(value)
    assert plain(torch.float16) == "float16"
    assert plain(Bound()) == {"class_path": "test_checkpoints.Bound", "init_args": {}}
    assert plain({"a": (1, 2.5, None), "b": torch.optim.SGD}) == {
        "a": [1, 2.5, None],
        "b": "torch.optim.sgd.SGD",
    }


def test_a_checkpoint_from_elsewhere_removes_nothing(tiny_model, tmp_path):
    """ModelCheckpoint's state lists what it removes next; a stranger's may list anything."""
    victim = tmp_path / "victim.ckpt"
    victim.mkdir()
    (victim / "thesis.txt").touch()
    saver = {"monitor": "train/reward", "every_n_train_steps": 1, "save_top_k": 1}
    folder = tmp_path / "run"
    file = config(folder, tiny_model, "GRPOModule", max_steps=1)

    def with_saver(steps):
        written = yaml.safe_load(Path(file).read_text())
        written["trainer"]["callbacks"][0]["init_args"] |= saver
        written["trainer"]["max_steps"] = steps
        Path(file).write_text(yaml.safe_dump(written))
        return file

    assert main(["fit", "-c", with_saver(1)]) == 0
    made = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    [state] = [one for one in made["callbacks"].values() if "best_k_models" in one]
    worst = f"{folder}/checkpoints/../../victim.ckpt"
    lowest = torch.tensor(float("-inf"))
    state |= {"best_k_models": {worst: lowest}, "kth_best_model_path": worst, "kth_value": lowest}
    state |= {"last_model_path": worst}
    torch.save(made, folder / "checkpoints" / "evil.ckpt")
    with pytest.warns(UserWarning, match="neither removes nor replaces"):
        assert (
            main(["fit", "-c", with_saver(3), "--ckpt_path", str(folder / "checkpoints" / "evil.ckpt")]) == 0
        )
    assert (victim / "thesis.txt").exists()
