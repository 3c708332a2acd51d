"""Sampler and trainer are compared before the first update, and a run of two policies stops there."""

from __future__ import annotations

from dataclasses import replace

import lightning.pytorch as lightning
import pytest
import torch
from fixed_rollouts import loader

from lightning_modules import GRPOModule
from lightning_modules.grpo.audit import sampler_gap
from lightning_modules.grpo.objective import Objective
from lightning_modules.sampling import GenerateSampler, NativeSampler, Sampling


class Hotter(GenerateSampler):
    """Draws at another temperature than it is told."""

    def generate(self, prompts, sampling, *arguments, **options):
        return super().generate(prompts, replace(sampling, temperature=12.0), *arguments, **options)


class Silent(GenerateSampler):
    """Knows no log-probabilities."""

    def generate(self, *arguments, **options):
        drawn = super().generate(*arguments, **options)
        return replace(drawn, logprobs=[[float("nan")] * len(ids) for ids in drawn.token_ids])


class Mute(GenerateSampler):
    """Returns no token for the last row."""

    def generate(self, *arguments, **options):
        drawn = super().generate(*arguments, **options)
        return replace(drawn, token_ids=[*drawn.token_ids[:-1], []])


def spread(completions, completion_ids, **columns):
    return [sum(ids) % 97 for ids in completion_ids]


def train(tiny_model, sampler, **options):
    lightning.seed_everything(0, verbose=False)
    options.setdefault("sampling", Sampling(max_new_tokens=8, temperature=3.0))
    module = GRPOModule(
        rewards=[spread],
        model=tiny_model,
        sampler=sampler,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        **options,
    )
    trainer = lightning.Trainer(barebones=True, accelerator="cpu", max_epochs=1)
    before = {}
    module.on_train_start = lambda: before.update(
        {name: one.clone() for name, one in module.named_parameters()}
    )
    try:
        trainer.fit(module, loader(range(4)))
    finally:
        changed = any(not torch.equal(one, before[name]) for name, one in module.named_parameters())
    return changed


@pytest.mark.parametrize("sampler", [GenerateSampler, NativeSampler])
def test_samplers_of_the_trained_model_pass(tiny_model, sampler):
    # A hundredth of what other kernels make: in float32 the two are one.
    assert train(tiny_model, sampler(), objective=Objective(max_sampler_gap=1e-4))


@pytest.mark.parametrize(("sampler", "gap"), [(Hotter, r"[0-9.]+"), (Silent, "nan")])
def test_another_policy_stops_the_run_before_the_first_update(tiny_model, sampler, gap):
    message = rf"{sampler.__name__} says other log-probabilities .* {gap} nats apart on average"
    with pytest.raises(ValueError, match=message):
        train(tiny_model, sampler())


def test_a_sampler_that_returns_no_token_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"0 tokens and \d+ log-probabilities for row 7 \('prompt"):
        train(tiny_model, Mute())


def test_null_does_not_look(tiny_model):
    assert train(tiny_model, Hotter(), objective=Objective(max_sampler_gap=None))


def test_a_distribution_that_is_cut_off_is_not_compared(tiny_model):
    sampling = Sampling(max_new_tokens=8, temperature=3.0, top_k=2)
    assert train(tiny_model, NativeSampler(), sampling=sampling)


def test_gap_is_that_of_the_tokens_that_count():
    ours, theirs = torch.tensor([[-1.0, -2.0, torch.nan]]), torch.tensor([[-1.5, -2.25, 0.0]])
    total, tokens = sampler_gap(ours, theirs, torch.tensor([[1, 1, 0]])).tolist()
    assert (total, tokens) == (0.75, 2)


def test_a_limit_that_is_no_distance_is_refused():
    with pytest.raises(ValueError, match=r"objective.max_sampler_gap=0.0: must be above 0"):
        Objective(max_sampler_gap=0.0)
