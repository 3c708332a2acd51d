"""What the objective adds to the policy term: each option against a twin that computes every row alone."""

from __future__ import annotations

import warnings

import lightning.pytorch as lightning
import pytest
import torch
from fixed_rollouts import FixedGRPO, RecordGradients, first_gradients, loader
from peft import LoraConfig

from lightning_modules.grpo.estimators import GDPO, OPO, GroupAdvantage, Rewards
from lightning_modules.grpo.metrics import with_correlation
from lightning_modules.grpo.objective import MaskedImportance, Objective, TruncatedImportance
from lightning_modules.grpo.reference import KL
from lightning_modules.grpo.reward_watch import RewardWatch
from lightning_modules.grpo.rollout import Scores


class Rough(FixedGRPO):
    """Every third completion was cut off, and the sampler's log-probabilities are off by half a nat at most."""

    def rollout(self, batch, num_generations, sampling):
        rollout = super().rollout(batch, num_generations, sampling)
        generator = torch.Generator().manual_seed(5)
        for i, (prompt, ids) in enumerate(
            zip(rollout.prompt_ids, rollout.completions.token_ids, strict=True)
        ):
            exact = self.row(prompt, ids)[0].detach()
            off = torch.rand(len(ids), generator=generator) - 0.5
            rollout.completions.logprobs[i][:] = (exact + off).tolist()
            if i % 3 == 0:
                rollout.completions.finish[i] = "length"
        self.drawn = rollout
        return rollout

    def row(self, prompt, ids):
        """Log-probabilities and entropies of one completion (T)."""
        logits = self.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        return logprobs[torch.arange(len(ids)), torch.tensor(ids)], -(logprobs.exp() * logprobs).sum(-1)


def build(tiny_model, objective, **options):
    lightning.seed_everything(3, verbose=False)
    return Rough(
        rewards=[max],
        model=tiny_model,
        adapter=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        optimizer=lambda p: RecordGradients(p, lr=0.1),
        objective=objective,
        gradient_clip_val=None,
        max_tokens_per_microbatch=90,
        **options,
    )


def ours(tiny_model, objective, **options):
    module = build(tiny_model, objective, **options)
    trainer = lightning.Trainer(barebones=True, accelerator="cpu", max_epochs=1)
    return first_gradients(module, trainer, loader(range(8)))


def twin(tiny_model, objective, weigh, *, entropy_coef=0.0, keep=lambda i, rollout: True, denominator=None):
    """Each row alone: weigh(i, now, entropy, sampler) gives the weights of its policy loss."""
    module = build(tiny_model, objective)
    module.configure_model()
    rollout = module.rollout(next(iter(loader(range(8)))), 2, module.sampling)
    scores = module.score(rollout)
    advantages_B = GroupAdvantage("population")(
        Rewards(scores.total, scores.by_function, None, rollout.lengths, 2)
    )
    kept = [i for i in range(len(rollout)) if keep(i, rollout)]
    count = sum(len(rollout.completions.token_ids[i]) for i in kept)
    for i in kept:
        now, entropy = module.row(rollout.prompt_ids[i], rollout.completions.token_ids[i])
        sampler = torch.tensor(rollout.completions.logprobs[i])
        policy = -advantages_B[i] * (now - now.detach()).exp()
        weights = weigh(advantages_B[i], now.detach(), entropy.detach(), sampler)
        loss = (policy * weights - entropy_coef * entropy).sum() / count
        loss.backward()
    return [p.grad for p in module.parameters() if p.requires_grad]


def assert_equal(a, b, tolerance=1e-6):
    assert max(float(g.abs().max()) for g in b) > 1e-3
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=1e-5)


def plain(advantage, now, entropy, sampler):
    return torch.ones_like(now)


def test_truncated_completions_leave_numerator_and_denominator(tiny_model):
    objective = Objective(mask_truncated=True)
    expected = twin(tiny_model, objective, plain, keep=lambda i, _: i % 3)
    assert_equal(ours(tiny_model, objective), expected)


def test_the_entropy_bonus_pushes_every_row(tiny_model):
    objective = Objective(entropy_coef=0.3)
    assert_equal(ours(tiny_model, objective), twin(tiny_model, objective, plain, entropy_coef=0.3))


def test_only_tokens_of_high_entropy_count(tiny_model):
    objective = Objective(top_entropy=0.2)
    module = build(tiny_model, objective)
    module.configure_model()
    rollout = module.rollout(next(iter(loader(range(8)))), 2, module.sampling)
    live = [i for i in range(16) if i // 2 in (2, 3, 6, 7)]
    everyone = torch.cat(
        [module.row(rollout.prompt_ids[i], rollout.completions.token_ids[i])[1].detach() for i in live]
    )
    # Strictly between two tokens: rounding must not decide.
    ordered = everyone.sort(descending=True).values
    last = -(-len(everyone) // 5)
    bound = (ordered[last - 1] + ordered[last]) / 2
    expected = twin(tiny_model, objective, lambda a, now, entropy, s: (entropy > bound).float())
    assert_equal(ours(tiny_model, objective), expected)


@pytest.mark.parametrize(
    ("correction", "weigh"),
    [
        (TruncatedImportance(1.2), lambda a, now, e, s: (now - s).exp().clamp(max=1.2)),
        (MaskedImportance((0.8, 1.3)), lambda a, now, e, s: _inside((now - s).exp(), 0.8, 1.3)),
        (
            TruncatedImportance(1.1, "sequence"),
            lambda a, now, e, s: (now - s).sum().exp().clamp(max=1.1).expand(len(s)),
        ),
        (
            MaskedImportance((0.95, 1.05), "geometric"),
            lambda a, now, e, s: _inside((now - s).mean().exp(), 0.95, 1.05).expand(len(s)),
        ),
    ],
)
def test_importance_corrections_weigh_the_policy_loss(tiny_model, correction, weigh):
    objective = Objective(correction=correction)
    assert_equal(ours(tiny_model, objective), twin(tiny_model, objective, weigh))


def _inside(weights, low, high):
    return torch.where((weights >= low) & (weights <= high), weights, 0.0)


def test_completions_that_became_unlikely_are_left_out(tiny_model):
    def weigh(advantage, now, entropy, sampler):
        return torch.full_like(now, float(not (advantage < 0 and (sampler - now).mean() > 0.05)))

    objective = Objective(off_policy_threshold=0.05)
    expected = twin(tiny_model, objective, weigh)
    assert_equal(ours(tiny_model, objective), expected)
    with pytest.raises(AssertionError):
        assert_equal(ours(tiny_model, Objective()), expected)


def test_the_unbiased_kl_gradient_is_that_of_the_reverse_kl(tiny_model):
    """On-policy: d grad log p with d = log p - log reference, for tokens of live and dead rows alike."""
    module = build(tiny_model, Objective())
    module.configure_model()
    rollout = module.rollout(next(iter(loader([0, 1, 4, 5]))), 2, module.sampling)  # dead groups: KL alone
    count = sum(map(len, rollout.completions.token_ids))
    for prompt, ids in zip(rollout.prompt_ids, rollout.completions.token_ids, strict=True):
        now, _ = module.row(prompt, ids)
        with torch.no_grad(), module.adapter.disabled():
            ref, _ = module.row(prompt, ids)
        (0.2 * ((now.detach() - ref) * now).sum() / count).backward()
    expected = [p.grad for p in module.parameters() if p.requires_grad]
    module = build(tiny_model, Objective(), kl=KL(0.2, unbiased=True))
    trainer = lightning.Trainer(barebones=True, accelerator="cpu", max_epochs=1)
    for a, b in zip(first_gradients(module, trainer, loader([0, 1, 4, 5])), expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_estimators_see_what_they_need():
    rewards_BK = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    total, lengths = rewards_BK.sum(1), torch.tensor([1, 3, 2, 2])
    assert OPO()(Rewards(total, rewards_BK, None, lengths, 2)).tolist() == [0.75, -0.25, 0.5, -0.5]
    scaled = GDPO(eps=0.0)(Rewards(total, rewards_BK, None, lengths, 2))
    assert scaled[0] == -scaled[1] == scaled[2] == -scaled[3] > 0


def scores(*rewards):
    total = torch.tensor(rewards)
    return Scores(total[:, None], total, (total > 0).float(), ["mine"])


def test_a_constant_reward_is_named_once():
    watch = RewardWatch(3, keeps_signs_only=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            watch.observe(scores(0.5, 0.5), 2)
        assert not caught
        for _ in range(5):
            watch.observe(scores(0.5, 0.5), 2)
    [one] = caught
    assert "'mine' has returned 0.5 for every completion of 3 steps" in str(one.message)
    assert "quiver rollouts" in str(one.message)


def test_a_reward_that_moved_once_is_not_constant():
    watch = RewardWatch(3, keeps_signs_only=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.observe(scores(0.5, 0.4), 2)
        for _ in range(9):
            watch.observe(scores(0.5, 0.5), 2)


def test_signs_are_warned_of_where_rewards_have_sizes():
    binary, graded = RewardWatch(99, keeps_signs_only=True), RewardWatch(99, keeps_signs_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        binary.observe(scores(1.0, 0.0, 1.0, 1.0), 2)
    with pytest.warns(UserWarning, match="every advantage is its sign.*advantage: rloo"):
        graded.observe(scores(1.0, 0.0, 0.3, 0.2), 2)


def test_the_correlation_of_length_and_reward():
    length, reward = torch.tensor([3.0, 5.0, 8.0, 1.0]), torch.tensor([0.0, 1.0, 1.0, 0.5])
    values = {
        "_length": length.mean(), "_reward": reward.mean(), "_length^2": (length**2).mean(),
        "_reward^2": (reward**2).mean(), "_length*reward": (length * reward).mean(), "entropy": 1.0,
    }  # fmt: skip
    found = with_correlation({name: float(value) for name, value in values.items()})
    expected = torch.corrcoef(torch.stack([length, reward]))[0, 1]
    assert found == {"entropy": 1.0, "length_reward_correlation": pytest.approx(float(expected), abs=1e-5)}
