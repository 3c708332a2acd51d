"""Fisher scores: squares of the gradients of single rows, not of a batch's mean, however rows are grouped."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
from sparse_ddp_worker import text_batch
from sparse_models import IDS, load, loss_of, trained

from datamodules.loader import EvalLoader
from lightning_modules import SFTModule, SparseAdapter
from lightning_modules.sparse import scores
from lightning_modules.sparse.masks import select
from lightning_modules.sparse.schedules import OneShot, Static

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "grpo"))

DENSITY = 0.1


def squares_by_loop(model, rows, names):
    """Sum over rows of the squared gradient of one row's loss."""
    sums = {}
    for row in rows:
        model.zero_grad()
        row(model).backward()
        for name in names:
            square = model.get_parameter(name).grad.square()
            sums[name] = sums.get(name, 0) + square
    return sums


def assert_chosen_by(adapter, sums) -> None:
    for name, delta in adapter.deltas.items():
        expected = set(select(sums[name], DENSITY).tolist())
        assert len(expected & set(delta.indices.tolist())) >= len(expected) - 1, (
            name
        )  # rounding at the threshold


@pytest.mark.parametrize("schedule", [Static(1), Static(2), OneShot(1)], ids=str)
@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens"]], ids=["linear", "tied"])
def test_a_loop_of_single_rows(tiny_model, schedule, targets):
    model = load(tiny_model)
    adapter = SparseAdapter(targets, DENSITY, scores.fisher, schedule=schedule)
    adapter.attach(model)
    optim = torch.optim.SGD(trained(model), lr=0.0)
    adapter.watch(optim)
    steps = 2 if schedule == Static(2) else 1
    for _ in range(steps):
        for row in IDS:
            loss_of(model, row[None]).backward()
        optim.step()
        optim.zero_grad()
    assert adapter.selection.was_chosen
    rows = [lambda m, row=row: loss_of(m, row[None]) for row in IDS]
    sums = squares_by_loop(load(tiny_model), rows, adapter.deltas)
    assert_chosen_by(adapter, sums)
    mean = {name: g.square() for name, g in gradient_of_all(load(tiny_model), adapter.deltas).items()}
    differs = [set(select(mean[n], DENSITY).tolist()) != set(select(sums[n], DENSITY).tolist()) for n in sums]
    assert any(differs)  # the squared mean would choose others


def gradient_of_all(model, names):
    loss_of(model).backward()
    return {name: model.get_parameter(name).grad for name in names}


def test_several_rows_at_once_are_refused(tiny_model):
    model = load(tiny_model)
    adapter = SparseAdapter(density=DENSITY, score=scores.fisher, schedule=Static(1))
    adapter.attach(model)
    adapter.watch(torch.optim.SGD(trained(model), lr=0.1))
    with pytest.raises(
        ValueError, match="needs the gradient of each row by itself, and this forward pass has 2 rows"
    ):
        loss_of(model)
    with torch.no_grad():
        loss_of(model)  # nothing is scored


def test_a_step_that_was_not_made_is_forgotten(tiny_model):
    model = load(tiny_model)
    adapter = SparseAdapter(density=DENSITY, score=scores.fisher, schedule=Static(1))
    adapter.attach(model)
    optim = torch.optim.SGD(trained(model), lr=0.1)
    adapter.watch(optim)
    (1e3 * loss_of(model, IDS[:1].flip(1))).backward()
    optim.zero_grad()
    loss_of(model, IDS[1:]).backward()
    optim.step()
    rows = [lambda m: loss_of(m, IDS[1:])]
    assert_chosen_by(adapter, squares_by_loop(load(tiny_model), rows, adapter.deltas))


def fit(module, loader, steps=1):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)


def test_supervised_fine_tuning_scores_each_answer(tiny_model):
    """Answers of one token length weigh alike, whatever the token budget of a pass is."""
    seen = {}

    def loader():
        return EvalLoader(lambda uids: text_batch(list(uids)), 8, 4)

    for budget in (32, 4096):
        lightning.seed_everything(0, verbose=False)
        adapter = SparseAdapter(density=DENSITY, score=scores.fisher, schedule=Static(2))
        module = SFTModule(
            model=tiny_model,
            adapter=adapter,
            max_tokens_per_microbatch=budget,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        )
        fit(module, loader(), 2)
        seen[budget] = {name: delta.indices for name, delta in adapter.deltas.items()}
    assert all(torch.equal(seen[32][name], seen[4096][name]) for name in seen[32])

    twin = SFTModule(model=tiny_model, adapter=None)
    twin.configure_model()
    batch = text_batch(range(8))
    answers = twin.encode_answers(batch.answers)
    prompts = twin.encode_prompts(batch.prompts, room=max(map(len, answers)))
    # A step is four rows, whose losses are divided by its answer tokens.
    tokens = [sum(len(answer) for answer in answers[start : start + 4]) for start in (0, 4)]

    def row(i):
        def loss(_):
            logprobs, mask = twin._logprobs([prompts[i]], [answers[i]])
            return -(logprobs * mask).sum() / tokens[i // 4]

        return loss

    sums = squares_by_loop(twin.model, [row(i) for i in range(8)], seen[32])
    assert_chosen_by(module.adapter, sums)


def test_grpo_scores_each_completion(tiny_model):
    from fixed_rollouts import FixedGRPO, loader

    seen = []
    for budget in (16, 4096):
        lightning.seed_everything(0, verbose=False)
        adapter = SparseAdapter(density=DENSITY, score=scores.fisher, schedule=Static(1))
        module = FixedGRPO(
            rewards=[max],
            model=tiny_model,
            adapter=adapter,
            max_tokens_per_microbatch=budget,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        )
        fit(module, loader(range(8)), 2)
        assert adapter.selection.was_chosen
        seen.append({name: delta.indices for name, delta in adapter.deltas.items()})
    for name in seen[0]:
        one, two = (set(masks[name].tolist()) for masks in seen)
        assert len(one & two) >= len(one) - 1
