"""When one of several ranks dies, all end soon, with an error code, and say which one died and of what."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import lightning.pytorch as lightning
import pytest
from small_runs import start_quiver, write_rows, write_run

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


class Die(lightning.Callback):
    """Ends one rank in the middle of its third step; the others may be busy and hear nothing of it."""

    def __init__(self, how: str, rank: int = 1, others_are_busy: bool = False, hook: str = "step") -> None:
        self.how, self.rank, self.others_are_busy, self.hook = how, rank, others_are_busy, hook

    def on_sanity_check_start(self, trainer, pl_module):
        Path(f"process-{trainer.global_rank}").write_text(str(os.getpid()))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        Path(f"process-{trainer.global_rank}").write_text(str(os.getpid()))
        if batch_idx != 2:
            return
        if trainer.global_rank == self.rank:
            if self.others_are_busy:
                time.sleep(2)  # until they are
            Path("died").touch()
            if self.how == "raises":
                raise RuntimeError("the reward model burst")
            if self.how == "exits":
                os._exit(7)
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.others_are_busy:
            time.sleep(300)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def run_and_die(model, *, strategy="ddp", command=None, **death) -> tuple[int, str, float]:
    """Return exit code, stderr, and seconds between the death and the end of the last process."""
    file = write_run(
        model,
        module="SFTModule",
        max_steps=20,
        devices=2,
        strategy=strategy,
        data={"train_file": "many.jsonl"},
        callbacks=[{"class_path": "test_ranks_die.Die", "init_args": death}],
    )
    write_rows("many.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(100)])
    process = start_quiver("fit", "-c", file, command=command)
    _, err = process.communicate(timeout=300)  # also ends when the last rank closes the pipe
    seconds = time.time() - Path("died").stat().st_mtime
    ranks = [int(file.read_text()) for file in Path().glob("process-*")]
    assert len(ranks) == 2
    assert all(is_gone(one) for one in ranks)
    assert seconds < 60
    print(f"{death} {strategy}: {seconds:.1f} s")
    return process.returncode, err, seconds


def test_rank_1_raises(tiny_model):
    code, err, _ = run_and_die(tiny_model, how="raises")
    assert code == 1
    assert 'raise RuntimeError("the reward model burst")' in err
    last = err.rstrip("\n").split("\n")[-1]
    assert last.startswith("quiver: error: Rank 1 (process ")
    assert "failed: RuntimeError: the reward model burst. The other ranks stopped with it" in last
    assert "gloo/transport" not in err, "the survivor's own error says nothing"


def test_rank_0_raises(tiny_model):
    code, err, _ = run_and_die(tiny_model, how="raises", rank=0)
    assert code == 1
    assert 'raise RuntimeError("the reward model burst")' in err
    assert "quiver: error: the reward model burst\n" in err
    assert "gloo/transport" not in err


@pytest.mark.parametrize(
    ("how", "words"), [("killed", "was killed by SIGKILL"), ("exits", "ended with code 7")]
)
def test_rank_1_vanishes(how, words, tiny_model):
    code, err, _ = run_and_die(tiny_model, how=how)
    assert code == 1
    last = err.rstrip("\n").split("\n")[-1]
    assert last.startswith("quiver: error: Rank 1 (process ")
    assert words in last
    assert "--ckpt_path latest goes on from the last checkpoint." in last


def test_rank_0_is_killed(tiny_model):
    code, err, _ = run_and_die(tiny_model, how="killed", rank=0)
    assert code == -signal.SIGKILL
    assert "quiver: error: Rank 0 (process " in err
    assert "ended without a message: it was killed, it crashed, or its machine is gone" in err


@pytest.mark.parametrize("rank", [0, 1])
def test_others_that_are_busy_stop_too(rank, tiny_model):
    """As where a rank hangs in NCCL, which notices nothing."""
    code, err, _ = run_and_die(tiny_model, how="killed", rank=rank, others_are_busy=True)
    assert code == (1 if rank == 1 else -signal.SIGKILL)
    assert f"Rank {rank} (process " in err


def test_under_torchrun(tiny_model):
    bin_ = Path(sys.executable).parent
    command = [str(bin_ / "torchrun"), "--standalone", "--nproc_per_node", "2", str(bin_ / "quiver")]
    code, err, _ = run_and_die(tiny_model, how="raises", command=command)
    assert code != 0
    assert 'raise RuntimeError("the reward model burst")' in err
    assert "quiver: error: the reward model burst" in err
