"""TrainingAlarm in real runs, through crashes and resumes; and what it counts as wrong."""

from __future__ import annotations

import math
import re
import warnings

import lightning.pytorch as lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig

from callbacks import TrainingAlarm
from callbacks.training_alarm import History
from datamodules import ArithmeticDataModule
from lightning_modules import GRPOModule, SFTModule
from lightning_modules.grpo.objective import Objective
from lightning_modules.grpo.reference import KL
from lightning_modules.sampling import Sampling

STEPS, WINDOW = 10, 3
BOUND = {
    "max_kl": "kl",
    "min_entropy": "entropy",
    "max_clip": "clip",
    "max_length_growth": "completion_length",
}


def some_dead(completions, answer, **columns):
    """A reward without signal on sums that are even, so that steps go without an update."""
    return [
        0.0 if int(gold) % 2 == 0 else float(sum(map(ord, text)) % 7)
        for text, gold in zip(completions, answer, strict=True)
    ]


def grpo(model, **settings):
    renormalize = Objective(dead_groups="renormalize")  # else the KL term gives dead groups an update
    return GRPOModule(
        rewards=[some_dead],
        model=model,
        adapter=LoraConfig(r=4, target_modules="all-linear"),
        sampling=Sampling(max_new_tokens=8, temperature=2.0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
        **{"kl": KL(coef=0.01), "updates_per_rollout": 2, "objective": renormalize, **settings},
    )


def fit(module, folder, *callbacks, ckpt_path=None):
    """Train for 10 steps of one prompt, with a checkpoint after each fifth."""
    lightning.seed_everything(5, verbose=False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[
            *callbacks,
            ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, monitor=None),
        ],
    )
    data = ArithmeticDataModule(batch_size=1, train_size=STEPS, val_size=2, val_batch_size=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, [str(one.message) for one in caught if str(one.message).startswith("Step ")]


class Recorder(lightning.Callback):
    """Keeps the metrics of each step, and counts validations."""

    def __init__(self):
        self.steps, self.validations = [], 0

    def on_train_batch_end(self, trainer, *_):
        metrics = {
            name.removeprefix("train/"): float(value) for name, value in trainer.callback_metrics.items()
        }
        self.steps.append(metrics | {"clip": metrics["clip_low"] + metrics["clip_high"]})

    def on_validation_end(self, *_):
        self.validations += 1


@pytest.fixture(scope="module")
def steps(tiny_model, tmp_path_factory):
    """The metrics of an undisturbed run."""
    recorder = Recorder()
    fit(grpo(tiny_model), tmp_path_factory.mktemp("recorded"), recorder)
    assert len(recorder.steps) == STEPS
    dead = [math.isnan(one["entropy"]) for one in recorder.steps]
    assert True in dead and False in dead  # noqa: PT018
    return recorder.steps


def windows(steps, name):
    """After each step the last values of a metric, once there are enough."""
    for end in range(1, len(steps) + 1):
        counted = [one[name] for one in steps[:end] if not math.isnan(one[name])]
        yield counted[-WINDOW:] if len(counted) >= WINDOW else None


def middle(steps, name):
    """A bound between the smallest and the largest average, so that some windows are beyond it."""
    means = sorted({sum(one) / WINDOW for one in windows(steps, name) if one})
    assert len(means) > 1, name
    return (means[0] + means[-1]) / 2


def expected(steps, name, bound, sign):
    """The steps at which a cause begins."""
    found, before = [], False
    for step, values in enumerate(windows(steps, name), start=1):
        now = bool(values) and sign * (sum(values) / WINDOW - bound) > 0
        now = now and sum(sign * (value - bound) > 0 for value in values) >= 2
        found += [step] if now and not before else []
        before = now
    return found


@pytest.fixture(scope="module")
def bounds(steps):
    return {name: middle(steps, BOUND[name]) for name in ("max_kl", "min_entropy", "max_clip")}


def heard(messages):
    """The steps of each cause, and that a message has value, bound and remedy."""
    found = {}
    for message in messages:
        step, value, name, bound = re.match(
            r"Step (\d+): train/.* is (\S+) on average over 3 steps, (?:above|below) (\w+)=(\S+): .*Try ",
            message,
        ).groups()
        assert (float(value) < float(bound)) == (name == "min_entropy")
        found.setdefault(name, []).append(int(step))
    return found


def all_expected(steps, bounds):
    found = {name: expected(steps, BOUND[name], bounds[name], -1 if "min" in name else 1) for name in bounds}
    return {name: where for name, where in found.items() if where}


def test_a_real_run_warns_when_each_average_crosses_its_bound(tiny_model, tmp_path, steps, bounds):
    trainer, messages = fit(grpo(tiny_model), tmp_path, TrainingAlarm(**bounds, window=WINDOW))
    assert heard(messages) == all_expected(steps, bounds)
    assert len(heard(messages)) >= 2
    assert trainer.global_step == 2 * STEPS


def test_a_run_stops_cleanly_and_a_resumed_one_at_the_same_step(tiny_model, tmp_path, steps, bounds):
    begins = {name: where for name, (where, *_) in all_expected(steps, bounds).items() if where < STEPS}
    where, name = max((where, name) for name, where in begins.items())
    assert where > 3

    def run(**options):
        recorder = Recorder()
        alarm = TrainingAlarm(**{name: bounds[name]}, window=WINDOW, stop=True)
        trainer, messages = fit(grpo(tiny_model), tmp_path, alarm, recorder, **options)
        assert trainer.global_step == 2 * where
        assert list(heard(messages).items()) == [(name, [where])]
        assert messages[0].endswith(" Training stops here.")
        assert recorder.validations == 1
        return messages

    straight = run()
    assert run(ckpt_path=str(tmp_path / f"step={2 * (where - 1)}.ckpt")) == straight


def test_a_resumed_run_does_not_repeat_a_warning(tiny_model, tmp_path, steps, bounds):
    begins = all_expected(steps, bounds)
    _, straight = fit(grpo(tiny_model), tmp_path, TrainingAlarm(**bounds, window=WINDOW))
    half = min(where[0] for where in begins.values())  # the checkpoint of the step that warned
    _, resumed = fit(
        grpo(tiny_model),
        tmp_path,
        TrainingAlarm(**bounds, window=WINDOW),
        ckpt_path=str(tmp_path / f"step={2 * half}.ckpt"),
    )
    assert resumed == [one for one in straight if int(re.match(r"Step (\d+)", one)[1]) > half]


@pytest.mark.parametrize(
    ("bound", "settings", "message"),
    [
        (
            "max_kl",
            {"kl": KL()},
            r"max_kl=0.5: with kl.coef=0 the run computes no KL. Set the model's kl.coef",
        ),
        ("max_clip", {"updates_per_rollout": 1}, r"max_clip=0.5: with updates_per_rollout=1 no token"),
    ],
)
def test_a_bound_on_what_the_run_does_not_measure(tiny_model, tmp_path, bound, settings, message):
    with pytest.raises(ValueError, match=message):
        fit(grpo(tiny_model, **settings), tmp_path, TrainingAlarm(**{bound: 0.5}))


def test_another_module_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"SFTModule has others\. Leave it out"):
        fit(SFTModule(model=tiny_model), tmp_path, TrainingAlarm(min_entropy=0.1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "watches nothing. Set max_kl, min_entropy, max_clip, max_length_growth, or leave it out"),
        ({"max_kl": 0.0}, "max_kl=0.0: must be above 0"),
        ({"min_entropy": math.nan}, "min_entropy=nan: must be a finite number above 0"),
        ({"max_clip": 1.0}, "max_clip=1.0: must be above 0 and below 1"),
        ({"max_length_growth": 0.5}, "max_length_growth=0.5: must be above 1"),
        ({"max_kl": 1.0, "window": 1}, "window=1: must be at least 2. One step is noise"),
    ],
)
def test_bounds_that_mean_nothing(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingAlarm(**arguments)


@pytest.mark.parametrize(
    ("lengths", "accuracy", "reward", "sounds"),
    [
        ([10, 10, 10, 30, 30, 30], [0.5] * 6, [0.5] * 6, True),
        ([10, 10, 10, 30, 30, 30], [0.1, 0.2, 0.1, 0.8, 0.9, 0.8], [0.5] * 6, False),  # longer and better
        (
            [10, 10, 10, 30, 30, 30],
            [0.4, 0.6, 0.5, 0.5, 0.7, 0.4],
            [1, 1, 1, 3, 3, 3],
            True,
        ),  # pays for length
        ([10, 10, 10, 30, 30, 30], [0.0] * 6, [1, 1, 1, 3, 3, 3], False),  # success says nothing
        ([10, 10, 10, 30, 30, 30], [math.nan] * 6, [1, 1, 1, 3, 3, 3], False),
        ([10, 10, 10, 30, 30, 30], [1.0] * 6, [1, 2, 1, 1, 2, 1], True),
        ([10, 10, 10, 30, 30], [0.5] * 5, [0.5] * 5, False),  # the windows overlap
        ([10, 10, 10, 10, 10, 1000], [0.5] * 6, [0.5] * 6, False),  # a single step
        ([30, 30, 30, 10, 10, 10], [0.5] * 6, [0.5] * 6, False),
    ],
)
def test_length_is_an_alarm_where_it_buys_nothing(lengths, accuracy, reward, sounds):
    alarm = TrainingAlarm(max_length_growth=2.0, window=3)
    found = {}
    for one in zip(lengths, accuracy, reward, strict=True):
        assert not found
        found = alarm.observe(dict(zip(("completion_length", "accuracy", "reward"), one, strict=True)))
    assert list(found) == (["max_length_growth"] if sounds else [])
    if sounds:
        assert (
            "is 30 on average over 3 steps, more than max_length_growth=2 times" in found["max_length_growth"]
        )


values = st.floats(-10, 10)


@given(st.lists(values | st.just(math.nan), max_size=30), st.integers(2, 5), st.integers(0, 30))
def test_a_history_knows_its_ends_across_a_resume(numbers, window, cut):
    history = History(window)
    for i, number in enumerate(numbers):
        if i == cut:
            saved, history = history.state(), History(window)
            history.load(saved)
        history.add(number)
    counted = [number for number in numbers if number == number]
    assert history.first == counted[:window]
    assert history.last == counted[-window:]
    assert history.is_apart == (len(counted) >= 2 * window)
    assert history.has_risen <= history.is_apart


@given(st.lists(values, min_size=6, max_size=20), st.sampled_from([1e9, math.inf]), st.data())
def test_one_step_never_sounds(numbers, outlier, data):
    place = data.draw(st.integers(0, len(numbers) - 1))
    history, mirror = History(3), History(3)
    for i, number in enumerate(numbers):
        history.add(outlier if i == place else number)
        mirror.add(-outlier if i == place else -number)
        assert not history.is_above(10)
        assert not mirror.is_below(-10)


@given(st.lists(values, min_size=8, max_size=8))
def test_to_rise_is_more_than_noise_and_one_sided(numbers):
    def risen(values):
        history = History(4)
        for value in values:
            history.add(value)
        return history.has_risen

    rounded = [round(number, 1) for number in numbers]
    assert not (risen(rounded) and risen([-number for number in rounded]))
    assert not risen(numbers[:1] * 8)
    assert risen([*rounded[:4], *(number + 1000 for number in rounded[:4])])
