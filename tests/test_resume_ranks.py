"""Checkpoints of several processes: resumed exactly, on another number of processes, in both forms."""

from __future__ import annotations

import pytest
import torch
import yaml
from parallel_runs import (
    ROWS,
    STEPS,
    columns,
    learned,
    run,
    strategy_options,
    write_config,
)
from same import assert_same

from lightning_modules.checkpoint_io import CompleteCheckpointIO
from lightning_modules.cli import main
from lightning_modules.sharded_files import whole_tensors

pytestmark = pytest.mark.slow

HALF = 3


def saved(folder):
    """A checkpoint of either form, in whole tensors."""
    return whole_tensors(CompleteCheckpointIO().load_checkpoint(folder / "checkpoints" / "last.ckpt"))


@pytest.fixture(scope="module", params=["sparse_dense", "grpo_full"])
def straight(request, tiny_model, tmp_path_factory):
    """An uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp(f"straight_{request.param}")
    assert main(["fit", "-c", str(write_config(request.param, tiny_model, folder))]) == 0
    return request.param, folder


@pytest.mark.parametrize("form", ["file", "folder"])
def test_saved_by_two_resumed_by_one_two_and_four(straight, form, tiny_model, tmp_path):
    case, reference = straight
    config = write_config(case, tiny_model, tmp_path / "two")
    sharded = {"save_distributed_checkpoint": form == "folder"}
    run("fit", "-c", str(config), *strategy_options("fsdp2", 2, **sharded), f"--trainer.max_steps={HALF}")
    checkpoint = tmp_path / "two" / "checkpoints" / "last.ckpt"
    assert checkpoint.is_dir() == (form == "folder")

    one = tmp_path / "one"
    assert main(["fit", "-c", str(write_config(case, tiny_model, one)), "--ckpt_path", str(checkpoint)]) == 0
    assert_equal_weights(learned(one), learned(reference))
    metric = "train/reward" if case.startswith("grpo") else "train/loss"
    torch.testing.assert_close(
        torch.tensor(columns(one, metric)),
        torch.tensor(columns(reference, metric))[HALF:],
        rtol=1e-5,
        atol=1e-5,
    )
    processes = 4 if form == "file" else 2
    more = tmp_path / "more"
    config = write_config(case, tiny_model, more)
    options = [*strategy_options("fsdp2", processes), "--ckpt_path", str(checkpoint)]
    run("fit", "-c", str(config), *options)
    assert_equal_weights(learned(more), learned(reference))


def assert_equal_weights(one, two) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_resume_bit_for_bit(strategy, tiny_model, tmp_path):
    """Everything that the last checkpoint of the resumed run holds is what the uninterrupted run's holds."""
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    options = strategy_options(strategy, 2)
    run("fit", "-c", str(write_config("grpo_lora", tiny_model, whole)), *options)
    run(
        "fit",
        "-c",
        str(write_config("grpo_lora", tiny_model, first)),
        *options,
        f"--trainer.max_steps={HALF}",
    )
    checkpoint = first / "checkpoints" / "last.ckpt"
    config = write_config("grpo_lora", tiny_model, second)
    run("fit", "-c", str(config), *options, "--ckpt_path", str(checkpoint))
    one, two = saved(whole), saved(second)
    for key in ("state_dict", "optimizer_states", "rng_states", "counters", "global_step", "epoch"):
        assert_same(one[key], two[key], key)
    assert one["global_step"] == STEPS
    assert len(one["rng_states"]) == 2
    loaders = [c["loops"]["fit_loop"]["state_dict"]["combined_loader"] for c in (one, two)]
    assert_same(*loaders)


def test_latest_goes_on_from_the_newest_checkpoint_and_starts_without_one(tiny_model, tmp_path, capsys):
    config = write_config("sft_lora", tiny_model, tmp_path)
    options = ["fit", "-c", str(config), "--ckpt_path", "latest"]
    assert main([*options, "--trainer.max_steps", "2"]) == 0
    assert "starting anew" in capsys.readouterr().err
    assert main(options) == 0
    assert f"Going on from {tmp_path / 'checkpoints' / 'last.ckpt'}" in capsys.readouterr().err
    straight = tmp_path / "straight"
    assert main(["fit", "-c", str(write_config("sft_lora", tiny_model, straight))]) == 0
    assert_same(learned(tmp_path), learned(straight))
    loaded = yaml.safe_load(config.read_text())
    assert loaded["data"]["init_args"]["batch_size"] == ROWS
