"""Random masks: one for each weight and each expert, the same again for the same configuration and data."""

from __future__ import annotations

import json
import math

import lightning.pytorch as lightning
import pytest
import torch
from sparse_models import CHOSEN, load, state

from datamodules import JsonlDataModule, MultiTaskDataModule
from lightning_modules import SFTModule, SparseAdapter
from lightning_modules.sparse import scores
from lightning_modules.sparse.schedules import GrowAndDrop, Static
from lightning_modules.sparse.stats import shared_count

DENSITY = 0.1
SCHEDULES = {
    "random": {"score": scores.random, "schedule": Static(0)},
    "grow and drop": {"score": scores.gradient_magnitude, "schedule": GrowAndDrop(50, 100)},
}


def mask_of(model, data, seed=1, **options):
    """The entries that a run chooses before its first step."""
    lightning.seed_everything(seed, verbose=False)
    module = SFTModule(model=model, adapter=SparseAdapter(density=DENSITY, **options))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return {name: delta.indices for name, delta in module.adapter.deltas.items()}


def equal(one, two) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def overlap(one, two) -> float:
    """Share of the entries of one choice that are in the other too."""
    sizes = {name: int(max(one[name].max(), two[name].max())) + 1 for name in one}
    shared = sum(shared_count(one[name], two[name], sizes[name]) for name in one)
    return shared / sum(map(len, one.values()))


@pytest.fixture
def folder(tmp_path):
    """Two tasks of as many rows."""
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    for task in ("sum", "copy"):
        rows = [{"input": f"{task} {i}", "output": str(i)} for i in range(4)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        for split in ("train", "test"):
            (tmp_path / split / f"{task}.jsonl").write_text(text)
    return str(tmp_path)


def of_task(folder, *tasks):
    return MultiTaskDataModule(folder=folder, tasks=list(tasks), batch_size=2)


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_experts_of_one_seed_differ_and_come_again(tiny_model, folder, options):
    first = mask_of(tiny_model, of_task(folder, "sum"), **options)
    assert equal(first, mask_of(tiny_model, of_task(folder, "sum"), **options))
    for other in (
        mask_of(tiny_model, of_task(folder, "copy"), **options),
        mask_of(tiny_model, of_task(folder, "sum", "copy"), **options),
        mask_of(tiny_model, of_task(folder, "sum"), seed=2, **options),
    ):
        count = sum(map(len, first.values()))
        assert overlap(first, other) == pytest.approx(DENSITY, abs=5 * math.sqrt(0.1 * 0.9 / count))


def test_files_of_one_name_differ(tiny_model, tmp_path):
    """Rows without a task are told apart by what they say."""
    masks = []
    for number, text in enumerate(["a", "b", "a"]):
        file = tmp_path / str(number) / "train.jsonl"
        file.parent.mkdir()
        file.write_text("".join(f'{{"prompt": "{text}{i}", "answer": "x"}}\n' for i in range(4)))
        data = JsonlDataModule(train_file=str(file), batch_size=2)
        masks.append(mask_of(tiny_model, data, **SCHEDULES["random"]))
    assert not equal(masks[0], masks[1])
    assert equal(masks[0], masks[2])


def attached(folder, purpose="", seed=0):
    torch.manual_seed(seed)
    adapter = SparseAdapter(density=DENSITY, **SCHEDULES["random"])
    adapter.purpose = purpose
    model = load(folder)
    adapter.attach(model)
    return model, adapter


def test_weights_of_one_shape_and_adapters_of_one_process_differ(tiny_model):
    _, first = attached(tiny_model)
    q, o = (first.deltas[f"model.layers.{layer}.self_attn.q_proj.weight"].indices for layer in (0, 1))
    assert q.shape == o.shape
    assert not torch.equal(q, o)
    second = SparseAdapter(density=DENSITY, **SCHEDULES["random"])
    second.attach(load(tiny_model))  # of the same process, without another seed
    assert not torch.equal(q, second.deltas["model.layers.0.self_attn.q_proj.weight"].indices)


def test_a_weight_keeps_its_mask_beside_other_targets(tiny_model):
    name = "model.layers.1.self_attn.v_proj.weight"
    masks = []
    for targets in ("all-linear", ["v_proj"]):
        torch.manual_seed(0)
        adapter = SparseAdapter(targets, DENSITY, **SCHEDULES["random"])
        adapter.attach(load(tiny_model))
        masks.append(adapter.deltas[name].indices)
    assert torch.equal(*masks)


def test_what_a_score_draws_leaves_other_random_numbers_alone(tiny_model):
    after = []
    for options in (CHOSEN, SCHEDULES["random"]):
        torch.manual_seed(0)
        SparseAdapter(density=DENSITY, **options).attach(load(tiny_model))
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_a_state_keeps_its_mask_wherever_it_is_loaded(tiny_model):
    _, first = attached(tiny_model, purpose="sum")
    model, second = attached(tiny_model, purpose="copy", seed=3)
    second.load_state_dict(first.state_dict())
    assert equal(
        {name: delta.indices for name, delta in first.deltas.items()},
        {name: delta.indices for name, delta in second.deltas.items()},
    )
    second.remove()
    base = state(load(tiny_model))
    assert all(torch.equal(tensor, base[name]) for name, tensor in state(model).items())
