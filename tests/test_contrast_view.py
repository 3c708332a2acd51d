"""ContrastView in real runs: its numbers, its files, and that training does not notice it."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import contrast_runs
import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
from contrast_runs import (
    PROMPTS,
    STEPS,
    TEMPERATURE,
    build,
    fit,
    measure_once,
    moody,
    never,
    read,
    unknown,
    view,
)
from PIL import Image

from callbacks import ContrastView
from callbacks.contrast_figure import contrast_figure
from callbacks.contrast_view import completion_gradients
from datamodules import ArithmeticDataModule
from lightning_modules import SFTModule
from lightning_modules.fsdp2 import FSDP2Strategy
from lightning_modules.grpo.contrast import contrast_covariance, group_size_statistics


class Keep(ContrastView):
    """Keeps what was measured, and which gradients the parameters held afterwards."""

    def _measure(self, trainer, module, batch):
        self.pool = super()._measure(trainer, module, batch)
        self.gradients = [p.grad for p in module.trained_parameters()]
        return self.pool


@pytest.fixture(scope="module")
def measured(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    callback = Keep(2, None, prompts=3, completions=8, sizes=(8, 2, 4), sketch_dim=512)
    return folder, callback, fit(build(tiny_model), folder, callback)


def test_a_line_holds_the_statistics_of_the_pool(measured):
    folder, callback, _ = measured
    first, last = read(folder / "contrast.jsonl")
    assert (first["step"], last["step"]) == (2, 4)
    assert (last["prompts"], last["completions"], last["rollouts"]) == (3, 8, PROMPTS * 2)
    pool = callback.pool
    assert pool["gradients"].shape == (3, 8, 512)
    assert last["success"] == pytest.approx(pool["success"].mean().item())
    assert 0 < last["success"] < 1
    statistics = group_size_statistics(
        pool["gradients"], pool["rewards"], (2, 4, 8), rollouts=last["rollouts"]
    )
    for line, one in zip(last["group_sizes"], statistics, strict=True):
        assert line["group_size"] == one.group_size
        for name in ("variance", "squared_norm", "signal_to_noise", "relative_variance", "dead", "cosine"):
            expected = [number if math.isfinite(number) else None for number in getattr(one, name)]
            assert line[name] == expected
    contrast = contrast_covariance(pool["gradients"], pool["success"])
    assert last["contrast"]["prompts"] == contrast.prompts > 1
    for name in ("covariance", "p_value", "correlation", "coefficient", "remaining"):
        assert last["contrast"][name] == getattr(contrast, name)
    assert last["contrast"]["permuted"] == list(contrast.permuted)


def test_the_main_numbers_are_logged_and_those_of_training_stay(measured):
    folder, _, trainer = measured
    last = read(folder / "contrast.jsonl")[-1]
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["contrast/dead/2"] == pytest.approx(last["group_sizes"][0]["dead"][0])
    assert logged["contrast/signal_to_noise/8"] == pytest.approx(last["group_sizes"][2]["signal_to_noise"][0])
    assert logged["contrast/covariance"] == pytest.approx(last["contrast"]["covariance"])
    assert logged["contrast/permuted_covariance"] == pytest.approx(last["contrast"]["permuted"][0])
    assert logged["train/seen"] == PROMPTS * 2  # not the 24 that were measured
    assert Image.open(folder / "contrast.png").format == "PNG"


def test_no_gradient_stays_behind(measured):
    assert measured[1].gradients == [None] * len(measured[1].gradients)


@pytest.mark.parametrize("options", [{}, {"adapter": None, "gradient_checkpointing": True}])
def test_each_gradient_equals_a_backward_pass_of_that_completion_alone(tiny_model, options):
    module = build(tiny_model, **options)
    module.trainer = lightning.Trainer(barebones=True, accelerator="cpu")
    module.configure_model()
    data = ArithmeticDataModule(batch_size=2, train_size=2)
    data.setup("fit")
    rollout = module.rollout(next(iter(data.train_dataloader())), 3, module.sampling)
    trained = module.trained_parameters()
    for p in trained:
        p.grad = torch.ones_like(p)
    found = completion_gradients(module, rollout, None)
    assert found.shape == (6, sum(p.numel() for p in trained))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in trained)
    for row, completion in enumerate(rollout.completions.token_ids):
        for p in trained:
            p.grad = None
        prompt = rollout.prompt_ids[row]
        logits = module.model(input_ids=torch.tensor([prompt + completion])).logits[0]
        logprobs = (logits[len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        logprobs[torch.arange(len(completion)), torch.tensor(completion)].mean().backward()
        alone = torch.cat([p.grad.flatten() for p in trained])
        assert alone.norm() > 0
        torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-5)


def test_training_does_not_notice(tiny_model, tmp_path):
    """Bit-equal weights, optimiser, counters, logs and random numbers, though the reward depends on these."""
    ends = []
    for name, callbacks in {"without": [], "with": [view(every_n_steps=1, prompts=2)]}.items():
        module = build(tiny_model, reward=moody)
        trainer = fit(module, tmp_path / name, *callbacks)
        logged = trainer.callback_metrics.items()
        metrics = {
            key: float(value) for key, value in logged if key.split("/")[0] == "train" and "time" not in key
        }
        generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        optimizer = trainer.optimizers[0].state_dict()["state"]
        ends.append((module.adapter.state_dict(), optimizer, (metrics, dict(module.counters()), generators)))
    (weights, moments, rest), (other_weights, other_moments, other_rest) = ends
    assert len(read(tmp_path / "with" / "contrast.jsonl")) == STEPS
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    for number, moment in moments.items():
        assert all(torch.equal(moment[name], other_moments[number][name]) for name in moment)
    assert str(rest) == str(other_rest)  # NaN is equal to itself
    assert rest[0]["train/seen"] == PROMPTS * 2
    assert rest[1]["draws"] == STEPS


def test_chosen_steps_and_no_figure(tiny_model, tmp_path):
    fit(build(tiny_model), tmp_path, view(steps=[1, 4], figure=None, prompts=99))
    lines = read(tmp_path / "contrast.jsonl")
    assert [line["step"] for line in lines] == [1, 4]
    assert lines[0]["prompts"] == PROMPTS
    assert not list(tmp_path.glob("*.png"))


def test_a_resumed_run_continues_the_file_and_a_new_one_keeps_it(tiny_model, tmp_path):
    fit(build(tiny_model), tmp_path, view())
    whole = (tmp_path / "contrast.jsonl").read_bytes()
    assert len(whole.splitlines()) == 2
    fit(build(tiny_model), tmp_path, view(), ckpt_path=tmp_path / "ckpt" / "step=3.ckpt")
    assert (tmp_path / "contrast.jsonl").read_bytes() == whole
    assert not (tmp_path / "contrast.1.jsonl").exists()
    fit(build(tiny_model), tmp_path, view(steps=[1]), steps=1)
    assert (tmp_path / "contrast.1.jsonl").read_bytes() == whole
    assert (tmp_path / "contrast.1.png").exists()


@pytest.mark.parametrize("reward", [never, unknown])
def test_a_pool_without_both_outcomes_has_nulls_and_a_picture(tiny_model, tmp_path, reward):
    trainer = fit(build(tiny_model, reward=reward), tmp_path, view(steps=[1]), steps=1)
    [line] = read(tmp_path / "contrast.jsonl")
    assert line["success"] == (0 if reward is never else None)
    assert [group["dead"] for group in line["group_sizes"]] == [[1, 1, 1]] * 3
    assert [group["relative_variance"] for group in line["group_sizes"]] == [[None] * 3] * 3
    assert line["contrast"]["prompts"] == 0
    assert line["contrast"]["covariance"] is None
    assert math.isnan(trainer.callback_metrics["contrast/covariance"])
    assert Image.open(tmp_path / "contrast.png").format == "PNG"


def test_the_figure_shows_what_the_record_says(measured):
    record = read(measured[0] / "contrast.jsonl")[0]
    record["group_sizes"][0]["relative_variance"] = [2.0, 1.0, None]
    record["group_sizes"][1]["relative_variance"] = [3.0, 2.5, 4.0]
    record["group_sizes"][2]["relative_variance"] = [None, None, None]
    variance, dead, covariance = contrast_figure(record).axes
    points = [line for line in variance.get_lines() if line.get_marker() == "o"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in points] == [(0, 2.0), (1, 3.0)]
    assert variance.get_yscale() == "log"
    shares = [line.get_ydata()[0] for line in dead.get_lines()]
    assert shares == [group["dead"][0] for group in record["group_sizes"]]
    assert [label.get_text() for label in covariance.get_xticklabels()] == ["true pairs", "permuted pairs"]
    assert covariance.get_lines()[0].get_ydata()[0] == record["contrast"]["covariance"]


def test_bad_arguments_are_named(monkeypatch):
    for name, value in {"every_n_steps": 0, "prompts": 0, "sketch_dim": 0, "steps": [3, 0]}.items():
        with pytest.raises(ValueError, match=rf"{name}(\[1\])?=0: must be at least 1"):
            ContrastView(**{name: value})
    with pytest.raises(ValueError, match=r"3 does not divide completions=16 .*set completions to a multiple"):
        ContrastView(sizes=(2, 3))
    with pytest.raises(ValueError, match="sizes is empty"):
        ContrastView(sizes=())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-quiver\[plots\]', or set figure: null"):
        ContrastView()
    assert ContrastView(figure=None).figure is None


def test_other_modules_and_sharded_weights_are_refused(tiny_model):
    with pytest.raises(ValueError, match="measures the rollouts of a GRPOModule; SFTModule makes none"):
        ContrastView().setup(None, SFTModule(model=tiny_model), "fit")
    module = build(tiny_model)
    module.trainer = lightning.Trainer(accelerator="cpu", devices=1, strategy=FSDP2Strategy(), logger=False)
    with pytest.raises(ValueError, match=r"sharded weights do not allow. Set trainer.strategy to ddp"):
        ContrastView().setup(module.trainer, module, "fit")


@pytest.mark.slow
def test_two_ranks_write_one_line_over_all_prompts(tiny_model, tmp_path):
    measure_once(tiny_model, tmp_path / "one", 1)
    done = subprocess.run(
        [sys.executable, contrast_runs.__file__, tiny_model, str(tmp_path / "two"), "2"],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(contrast_runs.__file__).parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [one], [two] = (read(tmp_path / name / "contrast.jsonl") for name in ("one", "two"))
    assert one["prompts"] == PROMPTS
    for name in ("prompts", "rollouts", "success"):
        assert one[name] == two[name]
    for ours, theirs in zip(one["group_sizes"], two["group_sizes"], strict=True):
        for name in ("variance", "squared_norm", "dead", "cosine"):
            assert ours[name][0] == pytest.approx(theirs[name][0], rel=1e-3, abs=1e-7), name
    assert one["contrast"]["covariance"] == pytest.approx(two["contrast"]["covariance"], rel=1e-3, abs=1e-7)
