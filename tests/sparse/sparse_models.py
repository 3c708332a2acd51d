"""The tiny model under a sparse adapter, in a plain training loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_modules.sparse import scores
from lightning_modules.sparse.adapter import SparseAdapter
from lightning_modules.sparse.schedules import FirstEpochs, GrowAndDrop, OneShot, Static

IDS = torch.arange(2, 26).view(2, 12) * 9 % 257
CHOSEN = {"score": scores.weight_magnitude, "schedule": Static(0)}
PHASES = {
    "chosen": CHOSEN,
    "observing": {"schedule": Static(99), "score": scores.snip},
    "dense": {"schedule": OneShot(99), "score": scores.snip},
    "replaced": {"schedule": GrowAndDrop(2, 99), "score": scores.gradient_magnitude},
    "kept": {"schedule": FirstEpochs(1), "score": scores.gradient_magnitude},
}


def load(folder, dtype=torch.float32, **options) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).train()


def loss_of(model, ids=IDS):
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def trained(model) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def setup(folder, *, lr=0.01, dtype=torch.float32, optimizer=torch.optim.AdamW, **options):
    model = load(folder, dtype)
    adapter = SparseAdapter(**{**CHOSEN, **options})
    assert adapter.attach(model) is model
    optim = optimizer(trained(model), lr=lr)
    adapter.watch(optim)
    return model, adapter, optim


def train(model, optim, steps=3, ids=IDS) -> None:
    for _ in range(steps):
        optim.zero_grad()
        loss_of(model, ids).backward()
        optim.step()


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()}


def assert_equal_states(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
