"""A worker process of a user's own loader that dies ends the run with an error that says so."""

from __future__ import annotations

import os
import signal
import sys

from small_runs import write_run
from torch.utils.data import DataLoader, Dataset

from datamodules import JsonlDataModule
from lightning_modules.cli import main


class Batches(Dataset):
    """Whole batches, one of which kills the process that asks for it."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)  # as when memory runs out
        return self.batches[index]


class OwnLoader(JsonlDataModule):
    def train_dataloader(self):
        return DataLoader(Batches(list(super().train_dataloader()) * 4), batch_size=None, num_workers=1)


def test_killed_worker_ends_the_run(tiny_model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = write_run(tiny_model, module="SFTModule", max_steps=8)
    assert main(["fit", "-c", file, "--data", "test_loader_worker.OwnLoader"]) == 1
    *_, message = capfd.readouterr().err.rstrip("\n").split("\n")
    assert message.startswith("quiver: error: DataLoader worker (pid")
    assert "Killed" in message or "exited unexpectedly" in message
    assert "num_workers" in message
