"""Many experts in one run learn what each would learn alone."""

from __future__ import annotations

import lightning.pytorch as lightning
import pytest
import torch
from peft import LoraConfig

from datamodules.batches import TextBatch
from datamodules.loader import EvalLoader
from lightning_modules import AdapterLibraryModule, SFTModule
from lightning_modules.library.routers.fixed import TaskRouter

TASKS = [f"task_{i}" for i in range(8)]
STEPS, ROWS = 10, 3


def row(task: int, number: int) -> tuple[str, str]:
    return f"Task {task}: what follows {number * 7 % 23}?", "ab"[(task + number) % 2] * (
        1 + (task * number) % 4
    )


def batches(tasks: list[int], *, absent: dict[int, set[int]] | None = None) -> EvalLoader:
    """Each step has ROWS rows of each task, the tasks mixed; `absent` takes tasks out of some steps."""
    made = []
    for step in range(STEPS):
        rows = [
            (task, *row(task, step * ROWS + i))
            for i in range(ROWS)
            for task in tasks
            if task not in (absent or {}).get(step, set())
        ]
        made.append(
            TextBatch(
                [prompt for _, prompt, _ in rows],
                [answer for _, _, answer in rows],
                [TASKS[task] for task, _, _ in rows],
                list(range(len(rows))),
                {},
                [[] for _ in rows],
            )
        )
    return EvalLoader(lambda indices: made[indices[0]], STEPS, 1)


def fit(module, loader) -> None:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


@pytest.fixture
def together(tiny_model):
    def build(**options):
        torch.manual_seed(1)
        return AdapterLibraryModule(
            router=TaskRouter(), experts=TASKS, rank=4, alpha=12, model=tiny_model, optimizer=adamw,
            gradient_clip_val=0.05, **options,
        )  # fmt: skip

    return build


def alone(tiny_model, start, number: int, loader, clip=0.05) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Train one expert as a plain LoRA of PEFT from the same start."""
    module = SFTModule(
        model=tiny_model, optimizer=adamw, gradient_clip_val=clip,
        adapter=LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"),
    )  # fmt: skip
    module.configure_model()
    layers = {name: module.model.get_submodule(f"base_model.model.{name}") for name in start}
    with torch.no_grad():
        for name, (A, B) in start.items():
            layers[name].lora_A.default.weight.copy_(A[number])
            layers[name].lora_B.default.weight.copy_(B[number])
    fit(module, loader)
    return {
        name: (layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach())
        for name, layer in layers.items()
    }


def factors(module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        name: (layer.experts.A.detach().clone(), layer.experts.B.detach().clone())
        for name, layer in module.adapter.layers.items()
    }


@pytest.mark.parametrize("budget", [4096, 200])
def test_eight_private_experts_equal_each_alone(tiny_model, together, budget):
    module = together(max_tokens_per_microbatch=budget)
    module.configure_model()
    start = factors(module)
    fit(module, batches(list(range(8))))
    trained = factors(module)
    worst = 0.0
    for number in range(8):
        own = alone(tiny_model, start, number, batches([number]))
        for name, (A, B) in own.items():
            worst = max(worst, float((trained[name][0][number] - A).abs().max()))
            worst = max(worst, float((trained[name][1][number] - B).abs().max()))
            assert not torch.equal(B, start[name][1][number])
    print("largest difference after 10 steps:", worst)
    assert worst < 1e-5


def test_an_expert_without_rows_is_left_alone(tiny_model, together):
    """Expert 3 is missing in the last four steps: it ends as if they had not been, others as before."""
    absent = {step: {3} for step in range(6, STEPS)}
    module = together()
    module.configure_model()
    start = factors(module)
    fit(module, batches([2, 3], absent=absent))
    own = alone(tiny_model, start, 3, EvalLoader(batches([3])._collate, 6, 1))
    for name, (A, B) in own.items():
        torch.testing.assert_close(factors(module)[name][0][3], A, rtol=0, atol=1e-5)
        torch.testing.assert_close(factors(module)[name][1][3], B, rtol=0, atol=1e-5)
        assert torch.equal(factors(module)[name][1][5], start[name][1][5])  # never had a row
