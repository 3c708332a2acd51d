"""Sampler and trainer are compared in every rollout before it is learned from, and a run of two policies stops."""

from __future__ import annotations

from dataclasses import replace

import lightning.pytorch as lightning
import pytest
import torch
from fixed_rollouts import loader

from lightning_modules import GRPOModule
from lightning_modules.grpo.audit import sampler_gap
from lightning_modules.grpo.metrics import add_update_means
from lightning_modules.grpo.objective import Objective
from lightning_modules.grpo.policy import Tokens
from lightning_modules.grpo.policy_losses import ClippedSurrogate
from lightning_modules.grpo.resampling import Resampling
from lightning_modules.metrics import Means
from lightning_modules.sampling import GenerateSampler, NativeSampler, Sampling


class Hotter(GenerateSampler):
    """Draws at another temperature than it is told."""

    def generate(self, prompts, sampling, *arguments, **options):
        return super().generate(prompts, replace(sampling, temperature=12.0), *arguments, **options)


class LaterHotter(GenerateSampler):
    """Draws at another temperature from its second rollout on."""

    calls = 0

    def generate(self, prompts, sampling, *arguments, **options):
        self.calls += 1
        hot = replace(sampling, temperature=12.0) if self.calls > 1 else sampling
        return super().generate(prompts, hot, *arguments, **options)


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


def train(tiny_model, sampler, *, epochs=1, **options):
    lightning.seed_everything(0, verbose=False)
    options.setdefault("sampling", Sampling(max_new_tokens=8, temperature=3.0))
    module = GRPOModule(
        rewards=[spread],
        model=tiny_model,
        sampler=sampler,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        **options,
    )
    trainer = lightning.Trainer(barebones=True, accelerator="cpu", max_epochs=epochs)
    before = {}
    module.on_train_start = lambda: before.update(
        {name: one.clone() for name, one in module.named_parameters()}
    )
    try:
        trainer.fit(module, loader(range(4)))
    finally:
        train.module, train.steps = module, trainer.global_step
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


@pytest.mark.parametrize("budget", [4096, 60], ids=["one micro-batch", "several"])
def test_a_sampler_that_loses_the_policy_later_stops_the_run_there(tiny_model, budget):
    options = {"max_tokens_per_microbatch": budget, "updates_per_rollout": 2}
    train(tiny_model, GenerateSampler(), **options)
    after_one_rollout = {name: one.clone() for name, one in train.module.named_parameters()}
    assert train.steps == 2
    with pytest.raises(ValueError, match="LaterHotter says other log-probabilities"):
        train(tiny_model, LaterHotter(), epochs=2, **options)
    assert train.steps == 2
    for name, one in train.module.named_parameters():
        assert torch.equal(one, after_one_rollout[name]), "an update was made from rows of another policy"


def test_looking_costs_no_pass(tiny_model):
    passes = {}
    for limit in (0.2, None):
        seen = []

        class Counted(GenerateSampler):
            def generate(self, *arguments, seen=seen, **options):
                drawn = super().generate(*arguments, **options)
                seen.clear()
                self._model.register_forward_hook(lambda *_: seen.append(1))
                return drawn

        train(tiny_model, Counted(), objective=Objective(max_sampler_gap=limit))
        passes[limit] = len(seen)
    assert passes[0.2] == passes[None] > 0


def test_fresh_rows_are_looked_at_beside_rows_that_waited(tiny_model):
    """The second update begins with what the first one left."""
    resampling = Resampling(live_groups=3, max_rollouts=100)
    with pytest.raises(ValueError, match="LaterHotter says other log-probabilities"):
        train(tiny_model, LaterHotter(), epochs=3, resampling=resampling, num_generations=4)


def test_the_metric_leaves_rows_out_that_waited():
    """Their old log-probabilities are the sampler's own, which would count as a difference of 0."""
    means = Means()
    ours, theirs = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([[-1.5, -2.25], [-3.0, -4.0]])
    mask = torch.ones(2, 2)
    tokens = Tokens(
        logprobs=ours, old_logprobs=ours, sampler_logprobs=theirs, ref_logprobs=None, entropy=torch.zeros(2, 2),
        advantages=torch.zeros(2), mask=mask, policy_mask=None, fresh_mask=mask * torch.tensor([[1], [0]]), rows=[],
    )  # fmt: skip
    add_update_means(means, tokens, ClippedSurrogate())
    strategy = lightning.Trainer(barebones=True, accelerator="cpu").strategy
    assert means.reduce(strategy)["sampler_gap"] == pytest.approx(0.375)


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
