"""Resampling: the promised number of live groups within the cap, and rollouts of another age at their true weight."""

from __future__ import annotations

import math

import lightning.pytorch as lightning
import pytest
import torch
from fixed_rollouts import FixedGRPO, RecordGradients, text_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from datamodules.batches import TextBatch
from datamodules.loader import TrainLoader
from lightning_modules.grpo.groups import Group
from lightning_modules.grpo.resampling import Pool, Resampling, shares
from lightning_modules.grpo.rollout import Scores
from lightning_modules.logprobs import completion_logits, token_logprobs

ROWS = 4096


class Bernoulli(FixedGRPO):
    """Each completion succeeds with probability p, by its row, draw and number alone."""

    p: float

    def on_train_start(self):
        super().on_train_start()
        self.updates, self.rollouts = [], []

    def score(self, rollout):
        uids = rollout.batch.uids
        generator = torch.Generator().manual_seed(1000 * self.draws + uids[0])
        rewards = (torch.rand(len(uids), generator=generator) < self.p).float()
        self.rollouts.append(len(uids))
        return Scores(rewards[:, None], rewards, rewards, ["coin"])

    def update_policy(self, groups, filler, means):
        self.updates.append((len(groups), sum(self.rollouts), self.draws))
        assert all(group.is_live for group in groups)
        self.rollouts = []
        return super().update_policy(groups, filler, means)


def train(model, p, resampling, *, batch_size=8, group_size=2, steps=12, **options):
    lightning.seed_everything(3, verbose=False)
    module = Bernoulli(
        rewards=[max],
        model=model,
        adapter=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        num_generations=group_size,
        resampling=resampling,
        **options,
    )
    module.p = p
    loader = TrainLoader(text_batch, ROWS, batch_size, order=lambda epoch: torch.arange(ROWS))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader)
    assert trainer.global_step == steps == len(module.updates)
    return module, trainer


@pytest.mark.parametrize(("p", "group_size"), [(0.5, 2), (0.1, 2), (0.1, 4)])
def test_every_update_has_its_live_groups_within_the_cap(tiny_model, p, group_size, capsys):
    cap = 16 * 8 * group_size
    module, trainer = train(tiny_model, p, Resampling(16, cap), group_size=group_size)
    share = 1 - p**group_size - (1 - p) ** group_size
    with capsys.disabled():
        drawn = sum(rollouts for _, rollouts, _ in module.updates)
        print(
            f"\np={p}, G={group_size}: live groups {[live for live, _, _ in module.updates]}, rollouts "
            f"{[rollouts for _, rollouts, _ in module.updates]} (cap {cap}), in all {drawn}, "
            f"expected {12 * 16 / share * group_size:.0f}, draws {module.draws}"
        )
    assert all(live == 16 for live, _, _ in module.updates)
    assert all(rollouts <= cap for _, rollouts, _ in module.updates)
    # No more is drawn than needed, up to what waits at the end and chance (five standard deviations).
    needed = 12 * 16 / share
    spread = 5 * math.sqrt(needed * (1 - share) / share)
    assert abs(drawn / group_size - needed) < spread + 4 * 16 / share
    assert trainer.callback_metrics["train/dead_groups"] > 0


def test_the_cap_makes_an_update_of_what_there_is(tiny_model):
    """At p=0.02 a cap of 64 rollouts has about one live pair, and sometimes none."""
    module, _ = train(tiny_model, 0.02, Resampling(16, 64), steps=20)
    assert all(rollouts <= 64 for _, rollouts, _ in module.updates)
    assert all(live < 16 for live, _, _ in module.updates)
    assert module.skipped_steps == sum(live == 0 for live, _, _ in module.updates) > 0


def test_a_low_share_of_live_groups_draws_several_batches_at_once(tiny_model):
    """96 % dead: where one batch at a time would need dozens of draws, few larger ones do."""
    module, _ = train(tiny_model, 0.02, Resampling(8, 4096), batch_size=8, steps=4)
    per_update = sum(rollouts for _, rollouts, _ in module.updates) / 16 / 4
    assert module.draws / 4 < 0.7 * per_update


@given(
    wanted=st.integers(1, 500),
    share=st.floats(0, 1),
    prompts=st.integers(1, 64),
    drawn=st.integers(0, 5000),
    factor=st.floats(1, 8),
)
def test_draws_stay_within_both_bounds(wanted, share, prompts, drawn, factor):
    group_size = 2
    plan = Resampling(500, 10_000, max_oversampling=factor)
    number = plan.draws(wanted, share, prompts, drawn, group_size)
    assert number >= 1
    if number > 1:
        assert drawn + number * prompts * group_size <= plan.max_rollouts
        assert (number - 1) * prompts <= wanted * factor + 1e-6


@given(
    ages=st.lists(st.lists(st.integers(0, 5), max_size=6).map(sorted), min_size=1, max_size=4),
    wanted=st.integers(0, 24),
)
def test_the_oldest_groups_go_first(ages, wanted):
    number = min(wanted, sum(map(len, ages)))
    taken = shares(ages, number)
    assert sum(taken) == number
    used = [age for own, count in zip(ages, taken, strict=True) for age in own[:count]]
    left = [age for own, count in zip(ages, taken, strict=True) for age in own[count:]]
    assert sorted(used) == sorted(age for own in ages for age in own)[:number]
    assert not used or not left or max(used) <= min(left)


def some_group(i: int) -> Group:
    return Group(f"p{i}", "t", [1, 2], [[3], [4, 5]], [[-0.5], [-0.1, -0.2]], [1.0, -1.0], [False, True], i)


@settings(max_examples=30)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=3), world_size=st.integers(1, 4))
def test_a_pool_survives_a_change_of_ranks(counts, world_size):
    number = iter(range(100))
    pools = [
        Pool([text_batch([10 * r, 10 * r + 1])], [some_group(next(number)) for _ in range(c)], 7, 0.25)
        for r, c in enumerate(counts)
    ]
    states = [pool.state_dict() for pool in pools]
    merged = [Pool.merged(states, rank, world_size) for rank in range(world_size)]
    assert sorted(g.drawn_at for pool in merged for g in pool.groups) == list(range(sum(counts)))
    uids = {uid for pool in pools for batch in pool.waiting for uid in batch.uids}
    assert {uid for pool in merged for batch in pool.waiting for uid in batch.uids} == uids
    assert all(pool.waiting and len(pool.waiting[0]) for pool in merged)
    assert all(pool.drawn == 7 and pool.live_share == 0.25 for pool in merged)
    if world_size == len(counts):
        assert [pool.groups for pool in merged] == [pool.groups for pool in pools]


class Recorded(FixedGRPO):
    """Takes its sampler log-probabilities from the policy, and keeps what the loss sees."""

    def rollout(self, batch, num_generations, sampling):
        rollout = super().rollout(batch, num_generations, sampling)
        for i, (prompt, ids) in enumerate(
            zip(rollout.prompt_ids, rollout.completions.token_ids, strict=True)
        ):
            rollout.completions.logprobs[i][:] = self.logprobs(prompt, ids)
        return rollout

    @torch.no_grad()
    def logprobs(self, prompt, ids):
        both = torch.tensor([prompt + ids])
        logits = completion_logits(self, both, torch.ones_like(both), len(ids), 1.0)
        return token_logprobs(logits, torch.tensor([ids]))[0].tolist()

    def loss(self, tokens):
        ratios = ((tokens.logprobs - tokens.old_logprobs).exp() * tokens.mask).detach()
        for row, ratio_T, mask_T in zip(tokens.rows, ratios, tokens.mask, strict=True):
            own = self.logprobs(row.prompt_ids, row.token_ids)  # of the policy as it is now
            true_T = (torch.tensor(own) - torch.tensor(row.logprobs)).exp()
            torch.testing.assert_close(ratio_T[mask_T.bool()], true_T, atol=1e-4, rtol=1e-4)
            self.seen.append((self.global_step, row.on_policy, float((true_T - 1).abs().max())))
        return super().loss(tokens)


def test_what_waited_is_corrected_for_its_age(tiny_model):
    """8 prompts a draw have 4 live pairs, an update takes 3: every fourth pair waits, and its ratio is true."""
    lightning.seed_everything(3, verbose=False)
    module = Recorded(
        rewards=[max],
        model=tiny_model,
        adapter=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        optimizer=lambda parameters: RecordGradients(parameters, lr=0.5),
        resampling=Resampling(3, 64),
    )
    module.seen = []
    loader = TrainLoader(text_batch, 8, 8, order=lambda epoch: torch.arange(8))
    trainer = lightning.Trainer(barebones=True, accelerator="cpu", max_steps=4)
    trainer.fit(module, loader)
    on_policy = [drift for _, fresh, drift in module.seen if fresh]
    waited = [drift for _, fresh, drift in module.seen if not fresh]
    assert on_policy
    assert max(on_policy) < 1e-4
    assert waited
    assert min(waited) > 1e-4  # the policy has moved, and the ratio says so


@pytest.mark.parametrize(
    ("resampling", "message"),
    [
        ({"live_groups": 16, "max_rollouts": 31}, "does not allow 16 live groups of num_generations=2"),
        ({"live_groups": 0, "max_rollouts": 31}, "resampling.live_groups=0: must be at least 1"),
        ({"live_groups": 2, "max_rollouts": 31, "max_oversampling": 0.5}, "max_oversampling=0.5"),
    ],
)
def test_contradictions_are_refused(tiny_model, resampling, message):
    with pytest.raises(ValueError, match=message):
        FixedGRPO(rewards=[max], model=tiny_model, resampling=Resampling(**resampling))


def test_a_cap_below_one_draw_is_refused(tiny_model):
    module = FixedGRPO(rewards=[max], model=tiny_model, resampling=Resampling(2, 12))
    data = lightning.LightningDataModule()
    data.batch_size = 8
    data.train_dataloader = lambda: TrainLoader(text_batch, 8, 8, order=lambda epoch: torch.arange(8))
    trainer = lightning.Trainer(barebones=True, accelerator="cpu", max_steps=1)
    with pytest.raises(ValueError, match=r"max_rollouts=12 is below one draw: .* 8 prompts of 2 rollouts"):
        trainer.fit(module, data)


def test_batches_join_and_split():
    both = TextBatch.joined([text_batch([1, 2]), text_batch([3])])
    assert both == text_batch([1, 2, 3])
    assert both.take([2, 0, 0]) == text_batch([3, 1, 1])
