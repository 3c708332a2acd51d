"""FSDP2 where ranks differ: dead groups, unequal lengths, generation in step; and its settings."""

from __future__ import annotations

import json

import pytest
import torch
from parallel_runs import assert_equal_runs, columns, learned, run, strategy_options, write_config

from lightning_modules.cli import main

pytestmark = pytest.mark.slow


def uneven_rows(folder) -> None:
    """Eight rows a step: the first four, those of rank 0, are dead and short, the others long and alive."""
    rows = [
        {"question": f"{i} " + "y" * (0 if i % 8 < 4 else 20 + 5 * (i % 8)), "answer": str(i)}
        | {"task": "dead" if i % 8 < 4 else "alive"}
        for i in range(24)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


UNEVEN = ["--data.shuffle=false", '--model.rewards=["parallel_runs.spread_unless_dead"]']


@pytest.fixture(scope="module")
def uneven(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    config = write_config("grpo_full", tiny_model, folder)
    uneven_rows(folder)
    assert main(["fit", "-c", str(config), *UNEVEN]) == 0
    dead = columns(folder, "train/dead_groups", "train/grad_norm")
    assert all(share >= 0.5 for share, _ in dead)
    assert sum(norm > 0 for _, norm in dead) >= 2
    return folder


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "in step"])
def test_a_rank_with_dead_groups_only_and_unequal_prompts(uneven, whole, tiny_model, tmp_path):
    """Rank 0 has no row to learn from, and fewer tokens, so fewer micro-batches and shorter generations."""
    config = write_config("grpo_full", tiny_model, tmp_path)
    uneven_rows(tmp_path)
    options = strategy_options("fsdp2", 2, whole_for_generation=whole)
    run("fit", "-c", str(config), *UNEVEN, *options, "--data.val_batch_size=2")
    assert_equal_runs(tmp_path, uneven, "grpo_full")
    for name in ("val/reward", "val/completion_length"):
        torch.testing.assert_close(
            torch.tensor(columns(tmp_path, name)), torch.tensor(columns(uneven, name)), rtol=1e-5, atol=1e-5
        )


def test_sft_validates_in_step_with_uneven_batches(tiny_model, tmp_path):
    """Six rows of validation, some with choices, in batches of two on two ranks, layer by layer."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, options in zip(
        folders, ([], strategy_options("fsdp2", 2, whole_for_generation=False)), strict=True
    ):
        config = write_config("sft_lora", tiny_model, folder)
        rows = [
            {"question": f"{i} + 1", "answer": "b" if i in (0, 3) else str(i + 1), "task": "t"}
            | {"options": ["a", "b", "c"] if i in (0, 3) else []}
            for i in range(5)
        ]
        (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        more = ["--data.choices_column=options", "--data.val_batch_size=2", "--trainer.max_steps=2"]
        (folder / "train.jsonl").write_text((folder / "val.jsonl").read_text() * 2)
        arguments = ["fit", "-c", str(config), *options, *more]
        if options:
            run(*arguments)
        else:
            assert main(arguments) == 0
    for name in ("val/loss", "val/exact_match", "val/rouge_l", "val/choice_accuracy"):
        one, two = (torch.tensor(columns(folder, name)) for folder in folders)
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "processes", "settings", "options"),
    [
        (
            "sft_full",
            4,
            {"replicas": 2, "reshard_after_forward": False},
            ["--model.gradient_checkpointing=true"],
        ),
        ("sparse", 4, {}, []),
        ("sft_lora", 2, {"cpu_offload": True}, []),
    ],
    ids=["hybrid and checkpointing", "four processes", "cpu offload"],
)
def test_settings_change_no_number(case, processes, settings, options, tiny_model, tmp_path):
    reference, folder = tmp_path / "one", tmp_path / "many"
    assert main(["fit", "-c", str(write_config(case, tiny_model, reference))]) == 0
    config = write_config(case, tiny_model, folder)
    run("fit", "-c", str(config), *strategy_options("fsdp2", processes, **settings), *options)
    assert_equal_runs(folder, reference, case)


def test_mixed_precision_stays_close_and_keeps_float32_weights(tiny_model, tmp_path):
    reference, folder = tmp_path / "one", tmp_path / "two"
    assert main(["fit", "-c", str(write_config("sft_full", tiny_model, reference))]) == 0
    config = write_config("sft_full", tiny_model, folder)
    options = strategy_options("fsdp2", 2, param_dtype="bfloat16", reduce_dtype="float32")
    run("fit", "-c", str(config), *options)
    one, two = (torch.tensor(columns(f, "train/loss")) for f in (reference, folder))
    assert not torch.equal(one, two)
    torch.testing.assert_close(one, two, rtol=0.02, atol=0.02)
    assert {tensor.dtype for tensor in learned(folder).values()} == {torch.float32}
