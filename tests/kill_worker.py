"""Lets a run be killed again and again and go on; started by test_killed.py, which looks at what is left.

Runs are forked from a process that has imported everything, so that a start takes no seconds of imports. Half of them
are killed a random time after a random step, half in the middle of writing a checkpoint: before or after a random one
of the calls that write, bring to the disk, rename or remove files, or when a file is written in part.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import lightning_modules.training_cli
from lightning_modules.cli import main
from lightning_modules.sft import SFTModule

MOST_STEPS = 5  # that a life makes


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def die_some_time(draw: random.Random) -> None:
    """Die a random time after a random step."""
    left, delay = draw.randint(1, MOST_STEPS), draw.uniform(0, 0.04)
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made == left:
            threading.Thread(target=lambda: (time.sleep(delay), die()), daemon=True).start()

    SFTModule.on_train_batch_start = count  # type: ignore[method-assign]


def die_while_writing(draw: random.Random) -> None:
    """Die at a random one of the calls that change files, before, in the middle of or after it."""
    left, when = draw.randint(1, 8 * MOST_STEPS), draw.choice(["before", "middle", "after"])
    calls = 0

    def watched(function: Any, middle: Any = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == left and when == "middle" and middle is not None:
                middle(function, *args, **kwargs)
                die()
            if calls == left and when == "before":
                die()
            result = function(*args, **kwargs)
            if calls >= left:
                die()
            return result

        return call

    def half(function: Any, content: Any, path: Any) -> None:
        function(content, path)
        os.truncate(path, draw.randint(0, os.path.getsize(path)))

    torch.save = watched(torch.save, half)
    os.fsync = watched(os.fsync)
    for name in ("replace", "rename", "unlink"):
        setattr(Path, name, watched(getattr(Path, name)))


def start(config: str, arm: Any = None, draw: random.Random | None = None) -> int:
    """Fork a run that goes on from the newest checkpoint, wait for its end, and return its status."""
    child = os.fork()
    if child == 0:
        log = os.open(f"{config}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if arm is not None:
            arm(draw)
        os._exit(main(["fit", "-c", config, "--ckpt_path", "latest"]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(config: str, kills: int, seed: int) -> None:
    folder = Path(config).parent / "checkpoints"
    for number in range(kills):
        arm = die_while_writing if number % 2 else die_some_time
        status = start(config, arm, random.Random(seed + number))
        half_written = [p.name for p in folder.glob(".*") if "ckpt" in p.name]
        whole = sorted(p.name for p in folder.glob("*.ckpt"))
        print(
            f"{number + 1} {arm.__name__}: ended with {status}, left {whole} and {half_written}", flush=True
        )
        if status != -signal.SIGKILL:
            return
    print(f"kills {kills}", flush=True)
    print(f"last run ended with {start(config)}", flush=True)


if __name__ == "__main__":
    assert lightning_modules.training_cli
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
