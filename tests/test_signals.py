"""Signals: whatever process gets one and whenever, the run leaves a checkpoint that resumes exactly."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
import yaml
from small_runs import ADDITIONS, quiver, start_quiver, write_rows, write_run
from test_resume import assert_same

from lightning_modules.cli import main
from lightning_modules.latest import latest_checkpoint

STEPS = 6


class SignalAt(lightning.Callback):
    """Sends a signal to processes of the run at some moment, and notes how far it had come by then.

    Args:
        moment: `start`, `sanity`, `step`, `long_step`, `saving` or `validation`.
        ranks: Which ranks get it.
        name: The signal.
        step: The training step of the moment.
    """

    def __init__(self, moment: str, ranks: list[int] = (0,), name: str = "SIGTERM", step: int = 3) -> None:
        self.moment, self.ranks, self.name, self.step = moment, ranks, name, step

    def send(self, trainer, moment):
        at = trainer.fit_loop.total_batch_idx + 1
        if moment == self.moment and trainer.global_rank in self.ranks and at in (0, self.step):
            Path("sent").touch()
            os.kill(os.getpid(), getattr(signal, self.name))

    def on_fit_start(self, trainer, pl_module):
        self.send(trainer, "start")

    def on_sanity_check_start(self, trainer, pl_module):
        self.send(trainer, "sanity")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.send(trainer, "step")
        if self.moment == "long_step" and trainer.fit_loop.total_batch_idx + 1 == self.step:
            self.send(trainer, "long_step")
            time.sleep(2)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.send(trainer, "saving")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1 and not trainer.sanity_checking:
            self.send(trainer, "validation")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def here(capfd):
    """Run the command in this process; return exit code and stderr."""

    def run(*arguments) -> tuple[int, str]:
        capfd.readouterr()
        code = main(list(arguments))
        return code, capfd.readouterr().err

    return run


def write(model, folder, *, callbacks=(), saver=None, **trainer):
    """A run of 6 steps that validates after steps 3 and 6, in 3 batches that draw random tokens."""
    write_rows("many.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(12)])
    write_rows("val.jsonl", ADDITIONS)
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "dirpath": f"{folder}/checkpoints",
            **(saver or {"every_n_train_steps": 1, "save_last": True}),
        },
    }
    csv = {"save_dir": folder, "name": "", "version": ""}
    return write_run(
        model,
        name=f"{folder}.yaml",
        module="GRPOModule",
        init_args={"val_sampling": {"max_new_tokens": 4, "temperature": 1.0}},
        data={"train_file": "many.jsonl", "val_file": "val.jsonl", "val_batch_size": 1},
        **{"max_steps": STEPS, "val_check_interval": 3, "num_sanity_val_steps": 1, **trainer},
        log_every_n_steps=1,
        default_root_dir=folder,
        logger={"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": csv},
        callbacks=[*callbacks, checkpoint],
        enable_checkpointing=True,
    )


def state(folder):
    return torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True)


def values(folder) -> dict:
    """Metrics by step and name, without timings."""
    import csv

    found = {}
    for file in sorted(Path(folder).glob("metrics*.csv"), key=lambda p: (p.name == "metrics.csv", p.name)):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if value and "time/" not in name:
                        found[int(row["step"]), name] = value
    return found


def assert_equal_runs(one, other) -> None:
    ours, theirs = state(one), state(other)
    for key in ("state_dict", "optimizer_states", "rng_states", "counters", "global_step"):
        assert_same(ours[key], theirs[key], key)
    assert values(one) == values(other)


@pytest.fixture(scope="module")
def straight(tiny_model, tmp_path_factory):
    """The folder of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["fit", "-c", write(tiny_model, "run")]) == 0
    finally:
        os.chdir(before)
    return folder / "run"


def interrupt(here, model, *, code, **moment) -> str:
    sent = {"class_path": "test_signals.SignalAt", "init_args": moment}
    returned, err = here("fit", "-c", write(model, "run", callbacks=[sent]))
    assert returned == code, err
    assert Path("sent").exists()
    return err


@pytest.mark.parametrize(
    ("moment", "step", "name", "code"),
    [
        ("long_step", 2, "SIGTERM", 143),
        ("saving", 2, "SIGINT", 130),
        ("validation", 3, "SIGTERM", 143),  # inside an epoch
        ("step", 3, "SIGTERM", 143),  # a validation is due after it
    ],
)
def test_resumed_run_equals_an_undisturbed_one(moment, step, name, code, tiny_model, straight, here):
    err = interrupt(here, tiny_model, code=code, moment=moment, step=step, name=name)
    checkpoint = "run/checkpoints/interrupted.ckpt"
    assert f"{name}: finishing this step, then saving a checkpoint." in err
    assert f"Go on with: --ckpt_path {Path(checkpoint).resolve()}" in err
    assert "Traceback" not in err
    late = Path(checkpoint).stat().st_mtime - Path("sent").stat().st_mtime
    assert late < 30
    print(f"{moment} {step}: saved {late:.1f} s after the signal")
    code, err = here("fit", "-c", write(tiny_model, "run"), "--ckpt_path", "latest")
    assert f"Going on from {Path(checkpoint).resolve()}." in err
    assert code == 0, err
    assert_equal_runs("run", straight)


BY_EPOCH = {"max_steps": -1, "max_epochs": 2, "val_check_interval": 1.0}


@pytest.fixture(scope="module")
def two_epochs(tiny_model, tmp_path_factory):
    """A run of two epochs that saves at the end of each."""
    folder = tmp_path_factory.mktemp("two_epochs")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["fit", "-c", write(tiny_model, "run", saver={"save_last": True}, **BY_EPOCH)]) == 0
    finally:
        os.chdir(before)
    return folder / "run"


@pytest.mark.parametrize(
    ("moment", "step", "name", "code"),
    [
        ("step", 2, "SIGINT", 130),  # before anything is saved
        ("step", 6, "SIGTERM", 143),  # the last of an epoch
        ("validation", 6, "SIGINT", 130),
        ("step", 9, "SIGHUP", 129),  # after the first save
        ("step", 12, "SIGTERM", 0),  # the last of all: nothing is left to stop
    ],
)
def test_an_epoch_that_was_cut_short_is_finished(moment, step, name, code, tiny_model, two_epochs, here):
    """The run stops once in the middle, and an earlier run's files lie in its folder."""
    saver = {"save_last": True}
    sent = {
        "class_path": "test_signals.SignalAt",
        "init_args": {"moment": moment, "step": step, "name": name},
    }
    early = {**BY_EPOCH, "max_epochs": -1, "max_steps": 1}
    assert (
        here("fit", "-c", write(tiny_model, "run", saver={**saver, "every_n_train_steps": 1}, **early))[0]
        == 0
    )
    earlier = {one: one.read_bytes() for one in Path("run/checkpoints").glob("*.ckpt")}
    Path("run/metrics.csv").unlink()
    returned, err = here("fit", "-c", write(tiny_model, "run", callbacks=[sent], saver=saver, **BY_EPOCH))
    assert returned == code, err
    if code:
        assert "reached" not in err
        returned, err = here(
            "fit", "-c", write(tiny_model, "run", saver=saver, **BY_EPOCH), "--ckpt_path", "latest"
        )
        assert returned == 0, err
        assert "Going on from" in err
    assert {one: one.read_bytes() for one in earlier} == earlier
    newest = latest_checkpoint([Path("run/checkpoints")])
    ours = torch.load(newest, weights_only=True)
    theirs = torch.load(latest_checkpoint([two_epochs / "checkpoints"]), weights_only=True)
    for key in ("state_dict", "optimizer_states", "rng_states", "counters", "global_step", "epoch"):
        assert_same(ours[key], theirs[key], key)
    assert values("run") == values(two_epochs)


def test_last_validation_is_finished(tiny_model, straight, here):
    err = interrupt(here, tiny_model, code=0, moment="validation", step=STEPS)
    assert "The last step is done and saved: " in err
    assert torch.load("run/checkpoints/interrupted.ckpt", weights_only=True)["global_step"] == STEPS
    assert_equal_runs("run", straight)


@pytest.mark.parametrize("moment", ["start", "sanity"])
def test_before_the_first_step_there_is_nothing_to_save(moment, tiny_model, here):
    err = interrupt(here, tiny_model, code=143, moment=moment)
    assert "Traceback" not in err
    assert not list(Path("run").rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "ranks"), [("step", [0, 1]), ("step", [1]), ("validation", [0]), ("start", [0])]
)
def test_two_ranks(moment, ranks, tiny_model):
    """One process of two, the one that the user started, or both."""
    sent = {"class_path": "test_signals.SignalAt", "init_args": {"moment": moment, "ranks": ranks}}
    two = {"devices": 2, "strategy": "ddp", "val_check_interval": 3 if moment == "validation" else 2}
    more = [{"prompt": f"{i}+2=", "answer": str(i + 2)} for i in range(24)]
    file = write(tiny_model, "run", callbacks=[sent], **two)
    write_rows("many.jsonl", more)
    write_rows("val.jsonl", more[:6])
    code, _, err = quiver("fit", "-c", file)
    assert code == 143, err
    assert "Traceback" not in err
    if moment == "start":
        return
    checkpoint = Path("run/checkpoints/interrupted.ckpt")
    assert checkpoint.stat().st_mtime - Path("sent").stat().st_mtime < 30
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3
    file = write(tiny_model, "run", **two)
    write_rows("many.jsonl", more)
    write_rows("val.jsonl", more[:6])
    code, _, err = quiver("fit", "-c", file, "--ckpt_path", str(checkpoint))
    assert code == 0, err
    assert state("run")["global_step"] == STEPS


@pytest.mark.parametrize("deaf", [False, True])
def test_second_ctrl_c_stops_at_once(deaf, tiny_model):
    sent = {
        "class_path": "test_signals.SignalAt",
        "init_args": {"moment": "long_step", "step": 2, "name": "SIGINT"},
    }
    hang = {"class_path": "test_signals.Hang", "init_args": {"deaf": deaf}}
    file = write(tiny_model, "run", callbacks=[*([] if deaf else [sent]), hang])
    process = start_quiver("fit", "-c", file)
    while not Path("hanging").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    if deaf:
        process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert not Path("run/checkpoints/interrupted.ckpt").exists()


class Hang(lightning.Callback):
    """Never comes to the end of its second step: in Python, or in a call that no signal interrupts.

    Args:
        deaf: Whether to wait in such a call, as collectives do.
    """

    def __init__(self, deaf: bool = False) -> None:
        self.deaf = deaf

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            Path("hanging").touch()
            if self.deaf:
                mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
                library.pthread_mutex_lock(mutex)
                library.pthread_mutex_lock(mutex)
            time.sleep(300)


def leave_a_thread(completions, **columns):
    """A reward whose helper never ends."""
    threading.Thread(target=time.sleep, args=(300,), name="helper-of-a-reward").start()
    return [float(i % 2) for i, _ in enumerate(completions)]


def test_a_thread_of_a_reward_does_not_keep_the_process(tiny_model):
    file = write_run(tiny_model, init_args={"rewards": ["test_signals.leave_a_thread"]}, max_steps=1)
    code, _, err = quiver("fit", "-c", file)
    assert code == 0, err
    assert "Left behind: thread helper-of-a-reward" in err


# ---------------------------------------------------------------- SLURM


def in_slurm(monkeypatch, folder: Path, *, fails: bool = False, **variables) -> None:
    """Be a job's only task, with a `scontrol` that writes down what it is asked for."""
    tools = folder / "tools"
    tools.mkdir()
    scontrol = tools / "scontrol"
    answer = "echo 'slurm_requeue error: Job is pending' >&2; exit 1" if fails else "exit 0"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/scontrol.log\n{answer}\n')
    scontrol.chmod(0o755)
    environment = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        **variables,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # Lightning sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "code", "variables", "job"),
    [
        ("SIGUSR1", 138, {}, "1234"),
        ("SIGTERM", 143, {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "5"}, "77_5"),
    ],
)
def test_slurm_job_saves_is_requeued_and_goes_on(
    name, code, variables, job, tiny_model, tmp_path, straight, here, monkeypatch
):
    in_slurm(monkeypatch, tmp_path, **variables)
    sent = {"class_path": "test_signals.SignalAt", "init_args": {"moment": "step", "step": 2, "name": name}}
    options = ["-c", "trainer/slurm.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    options += ["--trainer.strategy", "auto", "--trainer.precision", "32-true"]
    returned, err = here("fit", "-c", write(tiny_model, "run", callbacks=[sent]), *options)
    assert returned == code, err
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {job}\n"
    assert f"Requeued SLURM job {job}." in err
    saved = [place.name for place in Path("run").rglob("*.ckpt")]
    assert "interrupted.ckpt" in saved
    assert not [one for one in saved if "hpc" in one], "Lightning's own"
    # What the requeued job does; `--ckpt_path latest` finds the same file.
    again = ["--ckpt_path", "run/checkpoints/interrupted.ckpt"]
    returned, err = here("fit", "-c", write(tiny_model, "run"), *options, *again)
    assert returned == 0, err
    assert_equal_runs("run", straight)


def test_slurm_that_does_not_requeue_is_reported(tiny_model, tmp_path, here, monkeypatch):
    in_slurm(monkeypatch, tmp_path, fails=True)
    sent = {"class_path": "test_signals.SignalAt", "init_args": {"moment": "step", "name": "SIGUSR1"}}
    stop = {"class_path": "GracefulStop", "init_args": {"requeue_on": ["SIGUSR1"]}}
    code, err = here("fit", "-c", write(tiny_model, "run", callbacks=[sent, stop]))
    assert code == 138, err
    assert "SLURM did not requeue job 1234: slurm_requeue error: Job is pending. Submit it again." in err


def test_slurm_job_that_shall_not_be_requeued_is_not(tiny_model, tmp_path, here, monkeypatch):
    in_slurm(monkeypatch, tmp_path)
    sent = {"class_path": "test_signals.SignalAt", "init_args": {"moment": "step", "name": "SIGUSR1"}}
    code, err = here("fit", "-c", write(tiny_model, "run", callbacks=[sent]))
    assert code == 138, err
    assert not (tmp_path / "scontrol.log").exists()
    assert Path("run/checkpoints/interrupted.ckpt").exists()


def test_overlay_adds_to_the_callbacks_of_a_run():
    from lightning_modules.configs import find_config

    overlay = yaml.safe_load(Path(find_config("trainer/slurm.yaml")).read_text())
    assert overlay["trainer"]["callbacks+"][0]["class_path"] == "GracefulStop"
