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
from lightning_modules.sparse.schedules import FirstEpochs, GrowAndDrop, OneShot, Static
from lightning_modules.sparse.scores import gradient_magnitude, random, sensitivity, snip


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


SCHEDULES = {
    "static, some batches": lambda: {"schedule": Static(batches=1), "score": snip},
    "static, weights compete": lambda: {"schedule": Static(batches=1), "score": snip, "budget": "global"},
    "dense first": lambda: {"schedule": OneShot(steps=2), "score": sensitivity},
    "chosen anew": lambda: {"schedule": FirstEpochs(every=1, epochs=9), "score": gradient_magnitude},
    "replaced": lambda: {
        "schedule": GrowAndDrop(every=1, steps=9, fraction=0.5),
        "score": gradient_magnitude,
    },
}


def scheduled(name):
    return SparseAdapter(["q_proj", "up_proj"], density=0.2, **SCHEDULES[name]())


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_snapshot_of_a_sparse_adapter_is_the_base_whatever_is_chosen(tiny_model, name):
    """It starts without a change, and so does the base policy. Values of other entries must not be mixed up."""
    ours, _ = run(tiny_model, scheduled(name), KL(0.5, reference=Snapshot()), steps=5)
    theirs, _ = run(tiny_model, scheduled(name), KL(0.5), steps=5)
    assert ours.adapter.choices == theirs.adapter.choices > 0
    for a, b in zip(ours.kept, theirs.kept, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert max(float(one.abs().max()) for one in ours.kept) > 1e-4
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_a_coefficient_there_is_no_reference(tiny_model, name):
    """`coef: 0` is off, whatever the reference would be: training is that without one, bit for bit."""
    off = KL(0.0, reference=Snapshot(every=1))
    ours, _ = run(tiny_model, scheduled(name), off, cls=FixedGRPO)
    theirs, _ = run(tiny_model, scheduled(name), KL(), cls=FixedGRPO)
    assert off.policy.tensors() == {}
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("adapter", [lora, lambda: None], ids=["lora", "full"])
def test_without_a_coefficient_other_adapters_train_too(tiny_model, adapter):
    off = KL(0.0, reference=Snapshot(every=1, mix=0.5))
    module, trainer = run(tiny_model, adapter(), off, cls=FixedGRPO)
    assert trainer.global_step == 4
    assert module.kl.policy.tensors() == {}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_renewed_copy_of_entries_that_move_is_refused(tiny_model, name):
    options = {"rewards": [max], "model": "nowhere", "adapter": scheduled(name)}
    if name.startswith("static"):
        FixedGRPO(**options, kl=KL(0.1, reference=Snapshot(every=2)))
        module, _ = run(tiny_model, scheduled(name), KL(0.1, reference=Snapshot(every=2)), steps=5)
        gaps = [float(one.abs().max()) for one in module.kept]
        assert (
            gaps[2] == gaps[4] == pytest.approx(0, abs=1e-5)
        )  # renewed after the second and the fourth update
        assert gaps[3] > 1e-4
        return
    with pytest.raises(ValueError, match="Snapshot with every=2: a renewed copy holds values of the entries"):
        FixedGRPO(**options, kl=KL(0.1, reference=Snapshot(every=2)))


def test_small_shares_of_a_step_reach_a_copy_of_half_precision(tiny_model):
    """A hundredth of an update, mixed in a hundred times: in bfloat16 it would stay where it was."""
    module, _ = run(
        tiny_model, None, KL(0.1, reference=Snapshot(every=1, mix=0.01)), steps=0, dtype="bfloat16"
    )
    module.configure_model()
    reference = module.kl.reference
    with torch.no_grad():
        for parameter in module.trained_parameters():
            parameter.fill_(1.0)
    reference.start(module)
    with torch.no_grad():
        for parameter in module.trained_parameters():
            parameter.fill_(1.25)
    for _ in range(100):
        reference.after_update(module)
    for copy in reference.tensors().values():
        torch.testing.assert_close(copy, torch.full_like(copy, 1.25 - 0.25 * 0.99**100), rtol=1e-4, atol=0)
    with reference.context(module):
        assert {float(one.detach().flatten()[0]) for one in module.trained_parameters()} == {
            1.15625
        }  # nearest bfloat16
    assert {float(one.detach().flatten()[0]) for one in module.trained_parameters()} == {1.25}


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
            "cap=0.5: must be at least 1",
        ),
        (lambda: {"objective": Objective(correction=MaskedImportance(bounds=(2, 3)))}, "must enclose 1"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FixedGRPO(rewards=[max], model="nowhere", adapter=lora(), **options())
