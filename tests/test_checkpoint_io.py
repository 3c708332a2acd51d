"""Checkpoints on disk: complete or invisible, checked when they are read, nothing unpickled."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch

from lightning_modules.checkpoint_io import AsyncCompleteCheckpointIO, CompleteCheckpointIO
from lightning_modules.cli import main
from lightning_modules.sharded_files import (
    MANIFEST,
    META,
    previous_name,
    read_sharded,
    whole_tensors,
    write_sharded,
)


def checkpoint(step: int = 3) -> dict:
    torch.manual_seed(step)
    return {
        "global_step": step,
        "state_dict": {"a": torch.randn(5, 3), "b": torch.arange(4).int(), "empty": torch.zeros(0, 2)},
        "optimizer_states": [
            {
                "state": {0: {"step": torch.tensor(2.0), "exp_avg": torch.randn(5, 3)}},
                "param_groups": [{"lr": 0.1}],
            }
        ],
        "callbacks": {"x": [1, "two"]},
    }


def assert_equal(one, two) -> None:
    assert one.keys() == two.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_equal(value, two[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, two[key]), key
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            assert_equal(value[0], two[key][0])
        else:
            assert value == two[key]


def test_a_folder_comes_back_as_it_was(tmp_path):
    write_sharded(checkpoint(), tmp_path / "x.ckpt")
    assert_equal(whole_tensors(read_sharded(tmp_path / "x.ckpt")), checkpoint())
    assert sorted(p.name for p in (tmp_path / "x.ckpt").iterdir()) == [
        MANIFEST,
        META,
        "shard-00000.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]


def test_rows_are_read_without_the_rest(tmp_path):
    write_sharded(checkpoint(), tmp_path / "x.ckpt")
    saved = read_sharded(tmp_path / "x.ckpt")["state_dict"]["a"]
    assert saved.shape == (5, 3)
    whole = checkpoint()["state_dict"]["a"]
    for first in range(6):
        for end in range(first, 6):
            assert torch.equal(saved[first:end], whole[first:end])


def test_a_new_folder_takes_the_place_of_an_earlier_one(tmp_path):
    target = tmp_path / "last.ckpt"
    write_sharded(checkpoint(1), target)
    # A run that was killed between the two renames has left this.
    shutil.copytree(target, tmp_path / previous_name("last.ckpt"))
    write_sharded(checkpoint(2), target)
    assert read_sharded(target)["global_step"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_whose_writer_fails_leaves_the_earlier_one(tmp_path):
    target = tmp_path / "last.ckpt"
    write_sharded(checkpoint(1), target)
    broken = {**checkpoint(2), "callbacks": {"x": lambda: None}}
    with pytest.raises((OSError, AttributeError, pickle.PicklingError)):
        write_sharded(broken, target)
    assert read_sharded(target)["global_step"] == 1


def damage(folder, file, change) -> None:
    path = folder / file
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("file", [MANIFEST, META, "shard-00000.safetensors"])
@pytest.mark.parametrize("kind", ["flip", "cut", "gone"])
def test_damage_is_named(file, kind, tmp_path):
    folder = tmp_path / "x.ckpt"
    write_sharded(checkpoint(), folder)
    if kind == "gone":
        (folder / file).unlink()
    elif kind == "cut":
        damage(folder, file, lambda data: data[: len(data) // 2])
    else:
        damage(folder, file, lambda data: data[:-7] + bytes([data[-7] ^ 4]) + data[-6:])
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        whole_tensors(CompleteCheckpointIO().load_checkpoint(folder))


def test_parts_of_other_checkpoints_are_refused(tmp_path):
    for step in (1, 2):
        write_sharded(checkpoint(step), tmp_path / f"{step}.ckpt")
    for file in (META, "shard-00000.safetensors"):
        mixed = tmp_path / f"{file}.ckpt"
        shutil.copytree(tmp_path / "1.ckpt", mixed)
        shutil.copyfile(tmp_path / "2.ckpt" / file, mixed / file)
        with pytest.raises(ValueError, match="damaged"):
            whole_tensors(read_sharded(mixed))


def test_a_manifest_cannot_name_files_outside(tmp_path):
    folder = tmp_path / "x.ckpt"
    write_sharded(checkpoint(), folder)
    from lightning_modules.sharded_files import _text_hash

    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["content"]["tensors"]["state_dict.a"]["parts"][0][0] = "../other.safetensors"
    manifest["sha256"] = _text_hash(manifest["content"])
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="no file name"):
        read_sharded(folder)


def test_a_file_is_replaced_at_once_and_stale_parts_go(tmp_path):
    target = tmp_path / "last.ckpt"
    io = CompleteCheckpointIO()
    io.save_checkpoint(checkpoint(1), target)
    (tmp_path / ".123-last.ckpt").write_bytes(b"half a checkpoint")  # of a run that was killed
    io.save_checkpoint(checkpoint(2), target)
    assert_equal(io.load_checkpoint(target), checkpoint(2))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_an_unwritable_place_is_named_and_the_earlier_checkpoint_stays(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"last\.ckpt cannot be written"):
        CompleteCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "file" / "last.ckpt")


class Evil:
    """Would run code when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_is_unpickled(tmp_path):
    torch.save({"global_step": 1, "x": Evil(str(tmp_path / "ran"))}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt"):
        CompleteCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04" + bytes(50)])
def test_nonsense_is_no_checkpoint(content, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        CompleteCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")


def test_every_flipped_bit_of_a_file_is_noticed_or_harmless(tmp_path):
    target = tmp_path / "x.ckpt"
    io = CompleteCheckpointIO()
    io.save_checkpoint(checkpoint(), target)
    sound = target.read_bytes()
    noticed = harmless = 0
    positions = range(0, len(sound), 37)
    for position in positions:
        target.write_bytes(sound[:position] + bytes([sound[position] ^ 16]) + sound[position + 1 :])
        try:
            assert_equal(io.load_checkpoint(target), checkpoint())
        except ValueError as error:
            noticed += "x.ckpt" in str(error)
        else:
            harmless += 1
    assert noticed + harmless == len(positions)
    assert noticed > 0.9 * len(positions)


def test_in_a_thread_the_earlier_one_goes_when_the_new_one_is_there(tmp_path, monkeypatch):
    io = AsyncCompleteCheckpointIO()
    there: list[bool] = []
    remove = CompleteCheckpointIO.remove_checkpoint

    def watched(self, path):
        there.append((tmp_path / f"{int(path.stem) + 1}.ckpt").is_file())
        remove(self, path)

    monkeypatch.setattr(CompleteCheckpointIO, "remove_checkpoint", watched)
    io.save_checkpoint(checkpoint(1), tmp_path / "1.ckpt")
    for step in range(2, 6):
        io.save_checkpoint(checkpoint(step), tmp_path / f"{step}.ckpt")
        io.remove_checkpoint(tmp_path / f"{step - 1}.ckpt")
    io.teardown()
    assert there == [True] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["5.ckpt"]
    assert_equal(io.load_checkpoint(tmp_path / "5.ckpt"), checkpoint(5))


def test_in_a_thread_a_failed_write_keeps_the_earlier_one(tmp_path):
    io = AsyncCompleteCheckpointIO()
    io.save_checkpoint(checkpoint(1), tmp_path / "1.ckpt")
    (tmp_path / "file").write_text("in the way")
    io.save_checkpoint(checkpoint(2), tmp_path / "file" / "2.ckpt")
    io.remove_checkpoint(tmp_path / "1.ckpt")
    with pytest.raises(OSError, match="cannot be written"):
        io.teardown()
    assert (tmp_path / "1.ckpt").is_file()


def test_a_folder_becomes_a_file_from_the_command_line(tmp_path, capsys):
    write_sharded(checkpoint(), tmp_path / "x.ckpt")
    target = tmp_path / "whole.ckpt"
    assert main(["consolidate", str(tmp_path / "x.ckpt"), str(target)]) == 0
    assert_equal(CompleteCheckpointIO().load_checkpoint(target), checkpoint())
    assert main(["consolidate", str(tmp_path / "x.ckpt"), str(target)]) == 1
    assert main(["consolidate", str(target), str(tmp_path / "y.ckpt")]) == 1
    err = capsys.readouterr().err
    assert "exists already" in err
    assert "no checkpoint folder" in err


def test_a_folder_stays_until_the_file_that_replaces_it_is_there(tmp_path, monkeypatch):
    target = tmp_path / "last.ckpt"
    write_sharded(checkpoint(1), target)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="cannot be written"):
            CompleteCheckpointIO().save_checkpoint(checkpoint(2), target)
    assert read_sharded(target)["global_step"] == 1
    CompleteCheckpointIO().save_checkpoint(checkpoint(2), target)
    assert CompleteCheckpointIO().load_checkpoint(target)["global_step"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_link_to_a_folder_is_replaced(tmp_path):
    write_sharded(checkpoint(1), tmp_path / "first.ckpt")
    (tmp_path / "last.ckpt").symlink_to("first.ckpt")
    write_sharded(checkpoint(2), tmp_path / "last.ckpt")
    assert read_sharded(tmp_path / "last.ckpt")["global_step"] == 2
    assert read_sharded(tmp_path / "first.ckpt")["global_step"] == 1
