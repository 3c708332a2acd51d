"""KL references: which policy the term compares with, and that training is left as it was."""

from __future__ import annotations

import lightning.pytorch as lightning
import pytest
import torch
from fixed_rollouts import FixedGRPO, loader
from peft import LoraConfig

from lightning_modules import SparseAdapter
from lightning_modules.grpo.objective import MaskedImportance, Objective, TruncatedImportance
from lightning_modules.grpo.policy_losses import GMPO, ClippedSurrogate
from lightning_modules.grpo.reference import KL, Snapshot
from lightning_modules.sparse.schedules import Static
from lightning_modules.sparse.scores import random


class Kept(FixedGRPO):
    """Keeps the KL estimate and the reference log-probabilities of each update."""

    def loss(self, tokens):
        self.kept.append((tokens.ref_logprobs - tokens.old_logprobs).detach() * tokens.mask)
        return super().loss(tokens)


def lora():
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def sparse():
    return SparseAdapter(["q_proj", "up_proj"], density=0.2, score=random, schedule=Static(batches=0))


def run(tiny_model, adapter, kl, steps=4, cls=Kept, **options):
    lightning.seed_everything(3, verbose=False)
    module = cls(
        rewards=[max],
        model=tiny_model,
        adapter=adapter,
        kl=kl,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        **options,
    )
    module.kept = []
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader(range(8)))
    return module, trainer


def weights(module):
    return [p.detach().clone() for p in module.trained_parameters()]


@pytest.mark.parametrize("adapter", [lora, sparse, lambda: None], ids=["lora", "sparse", "full"])
def test_a_snapshot_is_the_policy_of_the_start(tiny_model, adapter):
    module, _ = run(tiny_model, adapter(), KL(0.1, reference=Snapshot()))
    gaps = [float(one.abs().max()) for one in module.kept]
    assert gaps[0] < 1e-5  # nothing has changed yet
    assert all(gap > 1e-4 for gap in gaps[1:])


@pytest.mark.parametrize("adapter", [lora, sparse], ids=["lora", "sparse"])
def test_a_snapshot_of_an_untouched_adapter_trains_as_the_base_policy(tiny_model, adapter):
    """LoRA's B starts at 0 and a sparse adapter at no change: start and base are one policy."""
    fresh = adapter()
    if isinstance(fresh, LoraConfig):
        fresh = LoraConfig(r=4, target_modules="all-linear")
    again = LoraConfig(r=4, target_modules="all-linear") if isinstance(fresh, LoraConfig) else adapter()
    ours, _ = run(tiny_model, fresh, KL(0.5, reference=Snapshot()))
    theirs, _ = run(tiny_model, again, KL(0.5))
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_a_snapshot_follows_when_it_is_told_to(tiny_model):
    module, _ = run(tiny_model, lora(), KL(0.1, reference=Snapshot(every=2)))
    gaps = [float(one.abs().max()) for one in module.kept]
    assert gaps[0] < 1e-5
    assert gaps[1] > 1e-4
    assert gaps[2] < 1e-5  # renewed after the second update
    assert gaps[3] > 1e-4


def test_a_mixed_snapshot_lies_between(tiny_model):
    module, _ = run(tiny_model, lora(), KL(0.1, reference=Snapshot(every=4, mix=0.25)))
    start = run(tiny_model, lora(), KL(0.1, reference=Snapshot()))[0].kl.reference._copies
    trained = dict(zip(start, weights(module), strict=True))
    for name, copy in module.kl.reference._copies.items():
        torch.testing.assert_close(copy, 0.75 * start[name] + 0.25 * trained[name], atol=1e-6, rtol=1e-5)


def test_the_reward_pays_for_distance(tiny_model):
    """A KL term in the reward: totals less coef x the summed log-ratio of sampler and reference."""

    class Paid(FixedGRPO):
        def advantages(self, scores, rollout):
            self.paid = scores.total
            self.unpaid = FixedGRPO.score(self, rollout).total
            self.drawn = rollout
            return super().advantages(scores, rollout)

    module, trainer = run(tiny_model, lora(), KL(0.3, kind="k1", in_reward=True), steps=1, cls=Paid)
    twin, _ = run(tiny_model, lora(), KL(0.0), steps=0)
    twin.configure_model()
    for i, (prompt, ids) in enumerate(
        zip(module.drawn.prompt_ids, module.drawn.completions.token_ids, strict=True)
    ):
        both = torch.tensor([prompt + ids])
        with torch.no_grad(), twin.adapter.disabled():
            logits = twin.model(input_ids=both).logits[0, len(prompt) - 1 : -1]
        ref = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum()
        expected = module.unpaid[i] - 0.3 * (0.0 - ref)  # fixed rollouts have sampler log-probabilities of 0
        torch.testing.assert_close(module.paid[i], expected, atol=1e-4, rtol=1e-4)
    assert trainer.callback_metrics["train/kl"] > 0


class Stop(Exception):
    pass


def test_an_interrupted_run_resumes_with_its_reference(tiny_model, tmp_path):
    whole, _ = run(tiny_model, lora(), KL(0.5, reference=Snapshot(every=3)), steps=5)
    parts = []
    for epochs, path in ((2, None), (5, tmp_path / "half.ckpt")):
        lightning.seed_everything(3, verbose=False)
        module = Kept(
            rewards=[max],
            model=tiny_model,
            adapter=lora(),
            kl=KL(0.5, reference=Snapshot(every=3)),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        )
        module.kept = []
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, loader(range(8)), ckpt_path=path)
        if path is None:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
        parts.append(module)
    for a, b in zip(weights(parts[1]), weights(whole), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"kl": KL(0.1, kind="k1")}, "kl.kind=k1 in the loss: its gradient is zero"),
        (lambda: {"kl": KL(-0.1)}, "kl.coef=-0.1: must be at least 0"),
        (
            lambda: {"kl": KL(0.1, in_reward=True, unbiased=True)},
            "kl.unbiased weighs the estimate in the loss",
        ),
        (lambda: {"kl": KL(0.1, reference=Snapshot(every=0))}, "every=0: must be at least 1"),
        (lambda: {"kl": KL(0.1, reference=Snapshot(mix=0))}, "mix=0: must be above 0"),
        (lambda: {"policy_loss": ClippedSurrogate(ceiling=0.9)}, "ceiling=0.9: must be at least 1"),
        (
            lambda: {"policy_loss": ClippedSurrogate(level="sequence")},
            "of whole sequences with objective.over=tokens",
        ),
        (lambda: {"policy_loss": GMPO()}, "GMPO of whole sequences with objective.over=tokens"),
        (lambda: {"policy_loss": ClippedSurrogate(clip=(-0.1, 0.2))}, r"clip\[0\]=-0.1: must be at least 0"),
        (lambda: {"objective": Objective(top_entropy=0.0)}, "objective.top_entropy=0.0: must be above 0"),
        (
            lambda: {"objective": Objective(off_policy_threshold=-1.0)},
            "off_policy_threshold=-1.0: must be above 0, or null",
        ),
        (
            lambda: {"objective": Objective(correction=TruncatedImportance(cap=0.5))},
            "cap=0.5 must be at least 1",
        ),
        (lambda: {"objective": Objective(correction=MaskedImportance(bounds=(2, 3)))}, "must enclose 1"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FixedGRPO(rewards=[max], model="nowhere", adapter=lora(), **options())
