"""`--ckpt_path latest`: the furthest complete checkpoint of the newest run."""

from __future__ import annotations

import os

import pytest
import torch

from lightning_modules.checkpoint_io import CompleteCheckpointIO
from lightning_modules.latest import RUN, latest_checkpoint, next_run_number
from lightning_modules.sharded_files import previous_name, write_sharded


def checkpoint(step, run=None, batches=None, epochs=0) -> dict:
    progress = {"epoch_loop.batch_progress": {"total": {"completed": step if batches is None else batches}}}
    loops = {"fit_loop": {**progress, "epoch_progress": {"total": {"processed": epochs}}}}
    number = {} if run is None else {RUN: run}
    return {"global_step": step, "state_dict": {"a": torch.ones(500)}, "loops": loops, **number}


def save(folder, name, *arguments, sharded=False, **settings):
    write = write_sharded if sharded else CompleteCheckpointIO().save_checkpoint
    write(checkpoint(*arguments, **settings), folder / name)


def in_time(folder, *names) -> None:
    """Let files look as if they were written one after the other."""
    for number, name in enumerate(names):
        os.utime(folder / name, (1000 + number, 1000 + number))


def test_order_comes_from_inside(tmp_path):
    """Names hold decimals, copies have other times, a clock jumped: the furthest step of the newest run counts."""
    save(tmp_path, "best-3-3.38.ckpt", 30, run=2)
    save(tmp_path, "last.ckpt", 20, run=2, sharded=True)
    save(tmp_path, "last.1.ckpt", 900, run=1)
    save(tmp_path, "old.ckpt", 5000)
    in_time(tmp_path, "best-3-3.38.ckpt", "last.ckpt", "last.1.ckpt", "old.ckpt")
    assert latest_checkpoint([tmp_path]).name == "best-3-3.38.ckpt"
    assert next_run_number([tmp_path, tmp_path / "none"]) == 3


@pytest.mark.parametrize(
    ("behind", "ahead"),
    [
        ({"batches": 2}, {"batches": 3}),  # before the validation that follows the step, and in it
        ({"epochs": 0}, {"epochs": 1}),  # before the epoch was closed, and after
    ],
)
def test_progress_within_a_step_counts(tmp_path, behind, ahead):
    save(tmp_path, "ahead.ckpt", 3, run=1, **ahead)
    save(tmp_path, "behind.ckpt", 3, run=1, **behind)
    in_time(tmp_path, "ahead.ckpt", "behind.ckpt")
    assert latest_checkpoint([tmp_path]).name == "ahead.ckpt"


def test_without_numbers_the_time_decides(tmp_path):
    assert latest_checkpoint([tmp_path / "none"]) is None
    assert next_run_number([tmp_path]) == 1
    save(tmp_path, "epoch=0.ckpt", 9)
    save(tmp_path, "last.ckpt", 6, sharded=True)
    save(tmp_path, "broken.ckpt", 7)
    in_time(tmp_path, "epoch=0.ckpt", "last.ckpt", "broken.ckpt")
    assert latest_checkpoint([tmp_path]).name == "broken.ckpt"
    (tmp_path / "broken.ckpt").write_bytes(b"PK")
    with pytest.warns(UserWarning, match="broken.ckpt is no complete checkpoint and is passed over"):
        assert latest_checkpoint([tmp_path]).name == "last.ckpt"
    (tmp_path / "last.ckpt").rename(tmp_path / previous_name("last.ckpt"))  # killed between two renames
    with pytest.warns(UserWarning, match="passed over"):
        assert latest_checkpoint([tmp_path]).name == "last.previous.ckpt"


def test_damaged_ones_are_passed_over(tmp_path):
    save(tmp_path, "good.ckpt", 1, run=1)
    save(tmp_path, "lacks_a_file.ckpt", 2, run=1, sharded=True)
    next((tmp_path / "lacks_a_file.ckpt").glob("shard-*.safetensors")).unlink()
    save(tmp_path, "flipped.ckpt", 3, run=1)
    data = bytearray((tmp_path / "flipped.ckpt").read_bytes())
    data[data.index(torch.ones(8).numpy().tobytes())] ^= 1  # within a tensor
    (tmp_path / "flipped.ckpt").write_bytes(data)
    (tmp_path / "empty.ckpt").touch()
    with pytest.warns(UserWarning, match="passed over") as warned:
        assert latest_checkpoint([tmp_path]).name == "good.ckpt"
    passed = " ".join(str(one.message) for one in warned)
    assert all(name in passed for name in ("lacks_a_file.ckpt", "flipped.ckpt", "empty.ckpt"))
