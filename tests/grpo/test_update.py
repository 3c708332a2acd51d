"""The update: one gradient, however rows are split, ordered, padded, dropped or spread over ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
from fixed_rollouts import REWARDS, FixedGRPO, RecordGradients, first_gradients, loader
from peft import LoraConfig
from torch.nn.functional import pad

from lightning_modules.grpo.advantages import group_advantages
from lightning_modules.grpo.groups import groups_of, rows_of
from lightning_modules.grpo.losses import aggregate, clipped_surrogate, kl_estimate
from lightning_modules.grpo.objective import Objective
from lightning_modules.grpo.passes import ChunkedPasses, SharedPasses, WholePasses
from lightning_modules.grpo.policy import collate
from lightning_modules.grpo.policy_losses import ClippedSurrogate
from lightning_modules.grpo.reference import KL
from lightning_modules.grpo.rollout import Scores
from lightning_modules.logprobs import completion_logits, token_entropy, token_logprobs
from lightning_modules.microbatches import PaddedRows

HERE = Path(__file__).parent


PASSES = [WholePasses, ChunkedPasses, SharedPasses]


def build(tiny_model, passes=None, **options) -> FixedGRPO:
    lightning.seed_everything(3, verbose=False)
    options.setdefault("adapter", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    module = FixedGRPO(
        rewards=[max], model=tiny_model, optimizer=lambda p: RecordGradients(p, lr=0.1), **options
    )
    module.passes = passes and passes()
    return module


def gradients(tiny_model, uids=range(8), **options) -> list[torch.Tensor]:
    trainer = lightning.Trainer(barebones=True, accelerator="cpu", max_epochs=1)
    return first_gradients(build(tiny_model, **options), trainer, loader(uids))


def assert_equal(ours, theirs, tolerance=1e-6):
    assert max(g.abs().max() for g in theirs) > 1e-3  # there is something to compare
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def slow_gradients(tiny_model, uids, *, over, kl_coef, dead_groups, scale="population"):
    """The obvious twin: each row alone and unpadded, dead ones too, plain sums over the whole step."""
    module = build(tiny_model, kl=KL(kl_coef))
    lightning.Trainer(barebones=True, accelerator="cpu")
    module.configure_model()
    batch = next(iter(loader(uids)))
    rollout = module.rollout(batch, 2, module.sampling)
    advantages_B = group_advantages(module.score(rollout).total, 2, scale=scale)
    counted = [i for i in range(len(rollout)) if dead_groups == "keep" or advantages_B[i] != 0]
    lengths = [len(rollout.completions.token_ids[i]) for i in counted]
    denominator = {
        "tokens": sum(lengths),
        "sequences": len(counted),
        "constant": len(counted) * module.sampling.max_new_tokens,
    }[over]
    for i in counted:
        prompt, completion = rollout.prompt_ids[i], rollout.completions.token_ids[i]
        ids = torch.tensor([prompt + completion])

        def logprobs(ids=ids, prompt=prompt):
            logits = module.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            return logits.log_softmax(-1)[torch.arange(len(logits)), ids[0, len(prompt) :]]

        ours = logprobs()
        loss = -advantages_B[i] * (ours - ours.detach()).exp()
        if kl_coef:
            with torch.no_grad(), module.model.disable_adapter():
                ref = logprobs()
            loss = loss + kl_coef * ((ref - ours).exp() - (ref - ours) - 1)
        total = loss.mean() if over == "sequences" else loss.sum()
        (total / denominator).backward()
    trained = [p for p in module.parameters() if p.requires_grad]
    norm = torch.cat([p.grad.flatten() for p in trained]).norm()
    return [p.grad * min(1.0, 1.0 / (norm + 1e-6)) for p in trained]


@pytest.mark.parametrize("over", ["tokens", "sequences", "constant"])
@pytest.mark.parametrize("dead_groups", ["keep", "renormalize"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("passes", PASSES)
def test_equals_the_slow_twin_that_computes_every_row(tiny_model, passes, over, dead_groups, kl_coef):
    """Dropping dead groups equals computing them, and sharing prompts equals reading them again."""
    objective = Objective(over=over, dead_groups=dead_groups)
    ours = gradients(tiny_model, passes=passes, objective=objective, kl=KL(kl_coef))
    twin = slow_gradients(tiny_model, range(8), over=over, dead_groups=dead_groups, kl_coef=kl_coef)
    assert_equal(ours, twin)


@pytest.mark.parametrize("max_tokens", [1, 70, 10_000])
@pytest.mark.parametrize("passes", PASSES)
def test_micro_batches_do_not_change_the_gradient(tiny_model, passes, max_tokens):
    one = gradients(tiny_model, max_tokens_per_microbatch=4096, kl=KL(0.1))
    other = gradients(tiny_model, passes=passes, max_tokens_per_microbatch=max_tokens, kl=KL(0.1))
    assert_equal(other, one)


@pytest.mark.parametrize(
    ("passes", "budgets"), [(WholePasses, (10_000, 200, 1)), (SharedPasses, (10_000, 130, 1))]
)
def test_the_token_budget_really_splits_1x8_2x4_8x1(tiny_model, passes, budgets):
    """8 live rows: as one micro-batch of 8, two of 4, and eight of 1."""
    sizes = []

    class Recorded(passes):
        def plan(self, rows, max_tokens):
            groups = super().plan(rows, max_tokens)
            sizes.append([len(group) for group in groups])
            return groups

    uids = [2, 3, 6, 7]
    results = []
    for budget in budgets:
        results.append(gradients(tiny_model, uids, passes=Recorded, max_tokens_per_microbatch=budget))
    assert sizes == [[8], [4, 4], [1] * 8]
    for other in results[1:]:
        assert_equal(other, results[0])


def test_row_order_does_not_change_the_gradient(tiny_model):
    assert_equal(gradients(tiny_model, [5, 2, 7, 0, 3, 6, 1, 4]), gradients(tiny_model))


class WiderWhole(ChunkedPasses):
    """Seven more columns of padding on each side, filled with another token."""

    def pad(self, rows, *, pad_token_id, device):
        got = super().pad(rows, pad_token_id=17, device=device)
        completions = [row.token_ids for row in rows]
        return PaddedRows(
            pad(got.input_ids, (7, 7), value=23),
            pad(got.attention_mask, (7, 7)),
            pad(got.completion_mask, (0, 7)),
            wider_positions(completions, got.completion_mask.shape[1] + 7),
        )


class WiderShared(SharedPasses):
    """The same, where prompts are shared."""

    def pad(self, rows, *, pad_token_id, device):
        got = super().pad(rows, pad_token_id=17, device=device)
        return replace(
            got,
            prompt_ids=pad(got.prompt_ids, (7, 0), value=23),
            prompt_mask=pad(got.prompt_mask, (7, 0)),
            completion_ids=pad(got.completion_ids, (0, 7), value=23),
            completion_mask=pad(got.completion_mask, (0, 7)),
        )


def wider_positions(completions, width):
    return torch.tensor([i * width + t for i, ids in enumerate(completions) for t in range(len(ids))])


@pytest.mark.parametrize("wider", [WiderWhole, WiderShared])
def test_padding_does_not_change_the_gradient(tiny_model, wider):
    assert_equal(gradients(tiny_model, passes=wider), gradients(tiny_model))


def test_gradient_checkpointing_and_full_fine_tuning(tiny_model):
    plain = gradients(tiny_model, adapter=None)
    assert_equal(gradients(tiny_model, adapter=None, gradient_checkpointing=True), plain)


def test_two_ranks_with_unequal_live_groups_equal_one(tiny_model, tmp_path):
    """Two live groups on each rank, and in the second case none and four."""
    for name, uids in {"mixed": range(8), "one dead rank": [0, 1, 4, 5, 2, 3, 6, 7]}.items():
        out = tmp_path / f"{name}.pt"
        command = [sys.executable, str(HERE / "ddp_worker.py"), tiny_model, str(out), *map(str, uids)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        for rank in range(2):
            saved = torch.load(f"{out}.{rank}", weights_only=True)
            assert_equal(saved["gradients"], gradients(tiny_model, uids, kl=KL(saved["kl_coef"])))
            # Metrics are means over both ranks, weighted by rows and tokens.
            rewards = torch.tensor([r for uid in uids for r in REWARDS[uid]], dtype=torch.float32)
            assert saved["metrics"]["train/reward"] == pytest.approx(rewards.mean().item())
            assert saved["metrics"]["train/dead_groups"] == 0.5
            assert saved["metrics"]["train/dead_easy"] == 0.25
        states = [torch.load(f"{out}.{rank}", weights_only=True)["rng"] for rank in range(2)]
        assert not torch.equal(*states)  # ranks must not draw the same tokens


def test_a_step_without_live_groups_leaves_weights_and_optimiser_alone(tiny_model):
    module = build(tiny_model)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    lightning.seed_everything(3, verbose=False)
    module.configure_model()
    before = {name: tensor.clone() for name, tensor in module.adapter.state_dict().items()}
    trainer.fit(module, loader([0, 1, 4, 5]))
    assert trainer.global_step == 1  # so that max_steps ends a run without any signal
    assert module.skipped_steps == 1
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    assert trainer.callback_metrics["train/dead_easy"] == 0.5
    assert trainer.callback_metrics["train/grad_norm"].isnan()
    for name, tensor in module.adapter.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_several_updates_per_rollout_follow_the_clipped_objective(tiny_model):
    """Three updates equal three hand-made SGD steps on the clipped surrogate with fixed old log-probs."""
    options = {"kl": KL(0.05), "policy_loss": ClippedSurrogate((0.1, 0.15)), "gradient_clip_val": None}
    module = build(tiny_model, updates_per_rollout=3, **options)
    trainer = lightning.Trainer(barebones=True, accelerator="cpu", max_epochs=1)
    trainer.fit(module, loader(range(8)))
    assert trainer.global_step == 3

    twin = build(tiny_model, **options)
    twin.configure_model()
    rollout = twin.rollout(next(iter(loader(range(8)))), 2, twin.sampling)
    advantages_B = group_advantages(twin.score(rollout).total, 2, scale="population")
    every_row = rows_of(groups_of(rollout, advantages_B, 0), 0, lambda *_: True)
    rows = collate(every_row, WholePasses(), lambda rows: None, pad_token_id=0, device=twin.device)
    inputs = WholePasses().pad(every_row, pad_token_id=0, device=twin.device)
    trained = [p for p in twin.parameters() if p.requires_grad]

    def logprobs():
        T = rows.mask.shape[1]
        return token_logprobs(
            completion_logits(twin, inputs.input_ids, inputs.attention_mask, T, 1.0), inputs.input_ids[:, -T:]
        )

    old = logprobs().detach()
    with torch.no_grad(), twin.adapter.disabled():
        ref = logprobs()
    for _ in range(3):
        now = logprobs()
        loss = clipped_surrogate(now, old, rows.advantages, rows.mask, clip=(0.1, 0.15))
        loss = aggregate(
            loss + 0.05 * kl_estimate(now, ref, "k3"), rows.mask, over="tokens", denominator=rows.mask.sum()
        )
        for p, g in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            p.data -= 0.1 * g
    for ours, theirs in zip((p for p in module.parameters() if p.requires_grad), trained, strict=True):
        torch.testing.assert_close(
            ours, theirs, atol=5e-5, rtol=1e-5
        )  # three steps, weights up to 4, float32


class Ratios(FixedGRPO):
    """Keeps the log-ratios that the loss sees."""

    def loss(self, tokens):
        self.ratios = [*getattr(self, "ratios", []), tokens.logprobs.detach() - tokens.old_logprobs]
        return super().loss(tokens)


def test_an_unchanged_policy_has_ratio_one_despite_dropout(tiny_model):
    module = Ratios(
        rewards=[max],
        model=tiny_model,
        adapter=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        updates_per_rollout=2,
        gradient_checkpointing=True,
    )
    lightning.Trainer(barebones=True, accelerator="cpu", max_epochs=1).fit(module, loader(range(8)))
    assert len(module.ratios) == 2
    for ratio in module.ratios:
        assert torch.equal(ratio, torch.zeros_like(ratio))


def test_renormalize_drops_groups_not_rows(tiny_model):
    """With three completions one may sit at the group's mean: its advantage is zero, its group alive."""

    class Thirds(FixedGRPO):
        def score(self, rollout):
            rewards = torch.tensor([0.0, 0.5, 1.0]).repeat(len(rollout) // 3)
            return Scores(rewards[:, None], rewards, (rewards == 1).float(), ["thirds"])

    results = []
    for dead_groups in ("keep", "renormalize"):
        lightning.seed_everything(3, verbose=False)
        module = Thirds(
            rewards=[max],
            model=tiny_model,
            adapter=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
            optimizer=lambda p: RecordGradients(p, lr=0.1),
            num_generations=3,
            kl=KL(0.1),
            objective=Objective(over="sequences", dead_groups=dead_groups),
        )
        trainer = lightning.Trainer(barebones=True, accelerator="cpu", max_epochs=1)
        results.append(first_gradients(module, trainer, loader(range(4))))
    assert_equal(results[0], results[1], tolerance=0)


def test_logprobs_equal_the_full_softmax():
    logits = torch.randn(3, 5, 11) * 4
    ids = torch.randint(0, 11, (3, 5))
    full = logits.log_softmax(-1)
    torch.testing.assert_close(token_logprobs(logits, ids), full.gather(-1, ids[..., None])[..., 0])
    torch.testing.assert_close(token_entropy(logits), -(full.exp() * full).sum(-1))


def test_bfloat16_logits_are_reduced_in_float32():
    logits = torch.randn(2, 3, 500).bfloat16()
    ids = torch.randint(0, 500, (2, 3))
    torch.testing.assert_close(token_logprobs(logits, ids), token_logprobs(logits.float(), ids))
