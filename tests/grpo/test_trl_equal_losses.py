"""Losses beside TRL's own `_compute_loss`, on the same float64 tensors: value and gradient at most 1e-6 apart.

An optimiser step of two micro-batches, with ragged rows, tool output inside of them and, where TRL is defined
for it, a row without any token. TRL has no geometric correction: its closed form is in test_correction.py.
"""

from __future__ import annotations

import functools

import pytest
import torch
from trl import GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl_driver import driven, loss_of, reset, scored

from lightning_modules.grpo.correction import masked_importance, off_policy_rows, truncated_importance
from lightning_modules.grpo.losses import (
    aggregate,
    cispo,
    clip_fractions,
    clipped_surrogate,
    gmpo,
    kl_estimate,
    sapo,
)

B, T, MAXIMUM = 8, 6, 11
HALVES = (slice(0, 4), slice(4, 8))


@pytest.fixture(autouse=True)
def _no_state_left():
    yield
    reset()


class Batch:
    def __init__(self, seed, *, empty_row=True):
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.old = -2 * noise(B, T).abs()
        self.new = (self.old + 0.5 * noise(B, T)).requires_grad_()
        self.ref = self.old + 0.5 * noise(B, T)
        # TRL keeps the sampler's log-probabilities in float32.
        self.sampler = (self.old + 0.5 * noise(B, T)).float().double()
        self.advantages = noise(B)
        self.mask = torch.arange(T) < torch.randint(2, T + 1, (B,), generator=generator)[:, None]
        self.mask[1::3, 0] = False
        self.mask[5] &= not empty_row

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.new)[0]

    def theirs(self, trainer, **inputs):
        """The loss of TRL's two micro-batches, as it accumulates them."""
        return sum(
            loss_of(
                trainer,
                self.new[half],
                self.mask[half],
                self.advantages[half],
                old_per_token_logps=self.old[half],
                num_items_in_batch=self.mask.sum(),
                **{name: x[half] for name, x in inputs.items()},
            )
            for half in HALVES
        )

    def ours(self, loss_BT, over):
        """The same by `aggregate`, with the denominator of the whole step; bnpo counts per micro-batch."""
        counts = {"tokens": self.mask.sum(), "sequences": B, "constant": B * MAXIMUM, "luspo": B}
        return sum(
            aggregate(
                loss_BT[half],
                self.mask[half],
                over={"bnpo": "tokens", "luspo": "constant"}.get(over, over),
                denominator=2 * self.mask[half].sum() if over == "bnpo" else counts[over],
            )
            for half in HALVES
        )

    def arguments(self):
        return self.new, self.old, self.advantages, self.mask


def trainer_with(trainer_class=GRPOTrainer, **options):
    options = {"num_generations": 4, "gradient_accumulation_steps": 2, **options}
    return driven(trainer_class, max_completion_length=MAXIMUM, **options)


def assert_same(batch, ours, theirs):
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    gradient = batch.gradient(ours)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, batch.gradient(theirs), atol=1e-6, rtol=0)


surrogate = clipped_surrogate
gspo = functools.partial(surrogate, level="sequence", clip=(0.1, 0.1))
LOSSES = {
    "grpo": ({"loss_type": "grpo"}, surrogate, "sequences"),
    "dapo": (
        {"loss_type": "dapo", "epsilon_high": 0.28},
        functools.partial(surrogate, clip=(0.2, 0.28)),
        "tokens",
    ),
    "dr_grpo": ({"loss_type": "dr_grpo"}, surrogate, "constant"),
    "bnpo": ({"loss_type": "bnpo"}, surrogate, "bnpo"),
    "two-sided": (
        {"loss_type": "grpo", "delta": 1.5},
        functools.partial(surrogate, ceiling=1.5),
        "sequences",
    ),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1},
        gspo,
        "sequences",
    ),
    "luspo": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.1},
        gspo,
        "luspo",
    ),
    # TRL's epsilon_high is the bound itself: 1.5 there is 0.5 above 1 here.
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.5},
        functools.partial(cispo, clip=(1.0, 0.5)),
        "tokens",
    ),
    "sapo": ({"loss_type": "sapo"}, sapo, "sequences"),
    "sapo-hot": (
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
        functools.partial(sapo, temperature=(2.0, 3.0)),
        "sequences",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_policy_losses(name, seed):
    options, loss, over = LOSSES[name]
    batch = Batch(seed)
    assert_same(batch, batch.ours(loss(*batch.arguments()), over), batch.theirs(trainer_with(**options)))


def test_cispo_at_the_defaults_of_trl_scales_every_gradient():
    """TRL's default bound is 0.2, below every ratio near 1; a clip around 1 cannot do that by accident."""
    batch = Batch(0)
    on_policy = batch.new.detach(), batch.advantages, batch.mask
    plain = batch.gradient(batch.ours(cispo(batch.new, *on_policy), "tokens"))
    batch.old = batch.new.detach()
    theirs = batch.gradient(batch.theirs(trainer_with(loss_type="cispo")))
    torch.testing.assert_close(theirs, 0.2 * plain)


@pytest.mark.parametrize("seed", range(3))
def test_gmpo(seed):
    # A row without tokens has the ratio 1 in TRL and adds the constant -A to the loss; here it adds nothing.
    batch = Batch(seed, empty_row=False)
    trainer = trainer_with(GMPOTrainer, config_class=GMPOConfig)
    assert_same(batch, batch.ours(gmpo(*batch.arguments()), "sequences"), batch.theirs(trainer))
    trainer = trainer_with(GMPOTrainer, config_class=GMPOConfig, epsilon=0.1, epsilon_high=0.3)
    ours = batch.ours(gmpo(*batch.arguments(), clip=(0.1, 0.3)), "sequences")
    assert_same(batch, ours, batch.theirs(trainer))


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("seed", range(3))
def test_kl_term(corrected, loss_type, seed):
    # At level="sequence" TRL's correction takes the ratio of the sequence; here it is always the token's.
    batch = Batch(seed)
    trainer = trainer_with(loss_type=loss_type, beta=0.3, use_bias_correction_kl=corrected)
    kl_BT = kl_estimate(batch.new, batch.ref, old_logprobs_BT=batch.old if corrected else None)
    loss_BT = clipped_surrogate(*batch.arguments()) + 0.3 * kl_BT
    ours = batch.ours(loss_BT, "sequences" if loss_type == "grpo" else "tokens")
    assert_same(batch, ours, batch.theirs(trainer, ref_per_token_logps=batch.ref))


@pytest.mark.parametrize("seed", range(3))
def test_clip_fractions(seed):
    batch = Batch(seed, empty_row=False)
    trainer = trainer_with(loss_type="dapo", epsilon=0.1, epsilon_high=0.3)
    batch.theirs(trainer)
    low, high = clip_fractions(*batch.arguments(), clip=(0.1, 0.3))
    for name, cut in (("low", low), ("high", high)):
        ours = [(cut[half].sum() / batch.mask[half].sum()).item() for half in HALVES]
        assert ours == pytest.approx(trainer._metrics["train"][f"clip_ratio/{name}_mean"], abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_off_policy_rows(seed):
    batch = Batch(seed)
    batch.sampler[:5] += 0.4  # some drift that counts
    trainer = trainer_with(loss_type="dapo", off_policy_mask_threshold=0.3)
    theirs = batch.theirs(trainer, sampling_per_token_logps=batch.sampler)
    dropped = off_policy_rows(batch.new, batch.sampler, batch.advantages, batch.mask, threshold=0.3)
    assert dropped.any()
    assert not dropped[batch.advantages > 0].any()
    loss_BT = clipped_surrogate(*batch.arguments()) * ~dropped[:, None]
    assert_same(batch, batch.ours(loss_BT, "tokens"), theirs)


CORRECTIONS = {
    # TRL sums over the sequence; `level="geometric"` has no counterpart there.
    "token_truncate": (None, functools.partial(truncated_importance, cap=1.5)),
    "sequence_truncate": (None, functools.partial(truncated_importance, cap=1.5, level="sequence")),
    "token_mask": (0.7, functools.partial(masked_importance, bounds=(0.7, 1.5))),
    "sequence_mask": (None, functools.partial(masked_importance, bounds=(0.0, 1.5), level="sequence")),
}


@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_corrections_for_the_sampler(mode, seed):
    batch = Batch(seed)
    low, correction = CORRECTIONS[mode]
    trainer = trainer_with(
        loss_type="dapo",
        use_vllm=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=1.5,
        vllm_importance_sampling_clip_min=low,
    )
    trainer.logps = [batch.old]
    rewards = torch.zeros(B, 1, dtype=torch.float64)
    ratio = scored(trainer, rewards, batch.mask, sampler=batch.sampler)["importance_sampling_ratio"]
    weights = correction(batch.old, batch.sampler, batch.mask)
    torch.testing.assert_close(weights, torch.where(batch.mask, ratio, 0.0), atol=1e-6, rtol=0)
    assert 1.5 in weights or (weights[batch.mask] == 0).any(), "the bound was never reached"
    loss_BT = clipped_surrogate(*batch.arguments()) * weights
    theirs = batch.theirs(trainer, importance_sampling_ratio=ratio)
    assert_same(batch, batch.ours(loss_BT, "tokens"), theirs)
