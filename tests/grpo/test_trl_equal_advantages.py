"""Advantages beside those of TRL's own trainers, on the same float64 rewards, at most 1e-6 apart.

TRL has no MaxRL and no OPO: their closed forms are in test_advantages_more.py.
"""

from __future__ import annotations

import asyncio
import math

import pytest
import torch
from accelerate import Accelerator
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.async_grpo.async_rollout_worker import (
    RolloutGroup,
    TrainingSequence,
    _AsyncRolloutLoop,
)
from trl.rewards import get_soft_overlong_punishment
from trl_driver import driven, reset, scored

from lightning_modules.grpo.advantages import group_advantages, normalized_each
from lightning_modules.grpo.kl import kl_estimate
from lightning_modules.grpo.rewards import LengthReward

NAN = math.nan
G = 4
SCALES = {"std": "group", "batch": "batch", "none": "none"}


@pytest.fixture(autouse=True)
def _no_state_left():
    yield
    reset()


def close(ours, theirs):
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def rewards(seed, *, functions=1, missing=False):
    """Four groups: random, binary, equal in everything, and random again; NaN where asked for."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(4 * G, functions, generator=generator, dtype=torch.float64)
    table[G : 2 * G] = (table[G : 2 * G] > 0).double()
    table[2 * G : 3 * G] = 0.5
    if missing:
        table[torch.rand(table.shape, generator=generator) < 0.3] = NAN
        table[0] = table[3 * G : 4 * G - 1] = NAN  # a row without any, a group with one row only
    return table


def mask(seed, rows=4 * G, width=6):
    lengths = torch.randint(1, width + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    lengths[0] = width  # the longest one sets the width of TRL's batch
    return torch.arange(width) < lengths[:, None]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("seed", range(3))
def test_group_advantages(scale, missing, seed):
    table = rewards(seed, missing=missing)
    trainer = driven(GRPOTrainer, num_generations=G, scale_rewards=SCALES[scale])
    theirs = scored(trainer, table, mask(seed))["advantages"]
    close(group_advantages(table[:, 0], G, scale=scale), theirs)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_gdpo(missing, seed):
    table, weights = rewards(seed, functions=3, missing=missing), [1.0, 0.25, -2.0]
    trainer = driven(
        GRPOTrainer,
        num_generations=G,
        multi_objective_aggregation="normalize_then_sum",
    )
    theirs = scored(trainer, table, mask(seed), weights=weights)["advantages"]
    ours = normalized_each(table, weights, G)
    close(ours, theirs)
    # TRL subtracts the batch mean, which is zero but for float noise; here the dead group is exactly zero.
    assert torch.equal(ours[2 * G : 3 * G], torch.zeros(G, dtype=torch.float64))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_rloo_and_its_k1_penalty_in_the_reward(beta, missing, seed):
    table, counts = rewards(seed, missing=missing), mask(seed)
    generator = torch.Generator().manual_seed(seed)
    old, ref = -torch.rand(2, *counts.shape, generator=generator, dtype=torch.float64)
    trainer = driven(
        RLOOTrainer,
        logps=[old, ref],
        num_generations=G,
        beta=beta,
        normalize_advantages=False,
    )
    theirs = scored(trainer, table, counts)["advantages"]
    penalty = (kl_estimate(old, ref, "k1") * counts).sum(1)
    close(group_advantages(table[:, 0] - beta * penalty, G, scale="rloo"), theirs)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_population_deviation_of_async_grpo(missing, seed):
    table = rewards(seed, missing=missing)[:, 0]
    Accelerator(cpu=True)  # TRL's logger wants one
    loop = _AsyncRolloutLoop.__new__(_AsyncRolloutLoop)
    loop.reward_func_names = ["f"]
    loop._env_reward_types, loop._provides_rollout_reward = [], False
    theirs = []
    for group in table.view(-1, G).tolist():
        loop.reward_funcs = [lambda group=group, **_: [None if math.isnan(r) else r for r in group]]
        rollouts = RolloutGroup(
            prompts=[[]] * G,
            reward_kwargs={},
            completions=[[]] * G,
            completions_ids=[[]] * G,
            completions_sequences=[[TrainingSequence([], [], [], 0)]] * G,
            tool_call_counts=[0] * G,
            tool_failure_counts=[0] * G,
            model_version=0,
            group_id=0,
            env_rewards=[None] * G,
            rollout_rewards=[None] * G,
        )
        theirs += [sample.advantage for sample in asyncio.run(loop._score_group(rollouts))]
    ours = group_advantages(table, G, scale="population", eps=1e-8)
    close(ours, torch.tensor(theirs, dtype=torch.float64))


@pytest.mark.parametrize(("maximum", "cache"), [(100, 20), (10, 10), (7, 3)])
def test_overlong_penalty(maximum, cache):
    ids = [[0] * length for length in range(maximum + 5)]
    ours = LengthReward(target=maximum - cache, maximum=maximum)(["x"] * len(ids), completion_ids=ids)
    theirs = get_soft_overlong_punishment(maximum, cache)(completion_ids=ids)
    assert ours == pytest.approx(theirs, abs=1e-9)
