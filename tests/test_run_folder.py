"""A run has its folder to itself, and one that cannot be written is refused before anything is loaded."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
from small_runs import quiver, start_quiver, write_run

from lightning_modules.cli import main
from lightning_modules.files import naming
from lightning_modules.run_folder import taken

CSV = {
    "class_path": "lightning.pytorch.loggers.CSVLogger",
    "init_args": {"save_dir": "run", "name": "", "version": "", "flush_logs_every_n_steps": 1},
}


class Wait(lightning.Callback):
    """Trains until a file appears."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        Path("training").touch()
        while not Path("go").exists():
            time.sleep(0.05)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def saver(folder="run/checkpoints"):
    return {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": folder, "every_n_train_steps": 1, "save_top_k": -1},
    }


def wait_for(path: Path, process) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)


def message(capsys) -> str:
    return capsys.readouterr().err.rstrip("\n").split("\n")[-1]


# ---------------------------------------------------------------- in use


def test_folder_in_use_is_refused_and_given_back(tiny_model, tmp_path, capsys):
    file = write_run(tiny_model, module="SFTModule", callbacks=[{"class_path": "test_run_folder.Wait"}])
    first = start_quiver("fit", "-c", file)
    try:
        wait_for(Path("training"), first)
        assert main(["fit", "-c", file]) == 1
        said = message(capsys)
        place = tmp_path.resolve() / "run"
        assert said.startswith(f"quiver: error: The run folder {place} is in use by process {first.pid} on ")
        assert (
            f"{socket.gethostname()} (quiver fit -c run.yaml). Wait for that run or stop it, or give" in said
        )
        # Killed, it cannot tidy up; the lock of the operating system ends with it.
        first.kill()
        first.wait(30)
    finally:
        first.kill()
        first.communicate()
    Path("go").touch()
    assert main(["fit", "-c", file]) == 0, capsys.readouterr().err
    assert not Path("run/.quiver.lock").exists()


def test_same_checkpoint_folder_is_in_use_too(tiny_model, tmp_path, capsys):
    file = write_run(tiny_model, module="SFTModule", callbacks=[saver()], enable_checkpointing=True)
    with taken(tmp_path / "run" / "checkpoints"):
        assert main(["fit", "-c", file, "--trainer.default_root_dir", "elsewhere"]) == 1
        said = message(capsys)
    assert (
        f"The run folder {tmp_path.resolve() / 'run' / 'checkpoints'} is in use by process {os.getpid()}"
        in said
    )
    assert not Path("elsewhere").exists(), "what the refused run made is removed"


def test_folders_are_taken_once_and_left_as_they_were(tmp_path):
    folder = tmp_path / "a" / "b"
    with taken(folder):
        assert folder.is_dir()
        with pytest.raises(ValueError, match="is in use by process"), taken(folder):
            pass
        with taken(folder / "c"):
            pass
        assert not (folder / "c").exists()
    assert not (tmp_path / "a").exists()
    with taken(folder):
        (folder / "result").touch()
    assert [one.name for one in folder.iterdir()] == ["result"]


def test_validation_keeps_the_metrics_of_the_training_run(tiny_model, capsys):
    file = write_run(tiny_model, module="SFTModule", logger=CSV, log_every_n_steps=1)
    assert main(["fit", "-c", file]) == 0
    trained = Path("run/metrics.csv").read_text()
    assert main(["validate", "-c", file]) == 0
    assert Path("run/metrics.csv").read_text() == trained
    validated = Path("run/metrics-validate.csv").read_text()
    assert "val/" in validated
    assert main(["predict", "-c", file]) == 0, capsys.readouterr().err
    names = {one.name for one in Path("run").glob("metrics*")}
    assert names == {"metrics.csv", "metrics-validate.csv"}, "predict logs nothing"
    before = {one: one.stat().st_mtime_ns for one in Path("run").rglob("*")}
    assert main(["validate", "-c", file, "--ckpt_path", "run/none.ckpt"]) == 1
    assert "there is no checkpoint run/none.ckpt" in message(capsys)
    assert {one: one.stat().st_mtime_ns for one in Path("run").rglob("*")} == before
    assert Path("run/metrics.csv").read_text() == trained
    with taken(Path("run")):
        assert main(["validate", "-c", file]) == 1
        assert "is in use by" in message(capsys)


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    target = tmp_path / "precious"
    target.write_text("text")
    (tmp_path / "run").mkdir()
    for place in (target, tmp_path / "dangling"):
        (tmp_path / "run" / ".quiver.lock").symlink_to(place)
        with pytest.raises(OSError, match=r"\.quiver\.lock is a link"), taken(tmp_path / "run"):
            pass
        (tmp_path / "run" / ".quiver.lock").unlink()
    assert target.read_text() == "text"
    assert not (tmp_path / "dangling").exists()


@pytest.mark.slow
def test_ranks_of_one_run_do_not_refuse_each_other(tiny_model):
    file = write_run(
        tiny_model, module="SFTModule", data={"batch_size": 1}, devices=2, strategy="ddp", logger=CSV
    )
    code, _, err = quiver("fit", "-c", file)
    assert code == 0, err
    assert not Path("run/.quiver.lock").exists()


# ---------------------------------------------------------------- cannot be written


def test_path_under_a_file_is_refused(tiny_model, tmp_path, capsys):
    Path("file").touch()
    file = write_run(tiny_model, module="SFTModule", default_root_dir="file/run")
    assert main(["fit", "-c", file]) == 1
    place = tmp_path.resolve() / "file" / "run"
    assert message(capsys) == (
        f"quiver: error: The run folder {place} cannot be written: Not a directory. Name one that can "
        "(trainer.default_root_dir, save_dir of the loggers, dirpath of ModelCheckpoint)."
    )


def on_small_disk(command: str, options: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command where the folder `disk` is a file system of its own, which vanishes with it."""
    Path("disk").mkdir()
    mounting = f"mount -t tmpfs -o {options} tmpfs disk"
    isolated = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*isolated, mounting], capture_output=True).returncode
    ):
        pytest.skip("a file system cannot be mounted here (unshare --mount --map-root-user)")
    script = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{script}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*isolated, f"{mounting} && {command}"], capture_output=True, text=True, timeout=300, env=environment
    )


def test_read_only_disk_is_refused_before_the_model_loads(tiny_model, tmp_path):
    file = write_run(tiny_model, module="SFTModule", default_root_dir="disk/run")
    done = on_small_disk(f"quiver fit -c {file}", "ro")
    assert done.returncode == 1
    place = tmp_path.resolve() / "disk" / "run"
    assert (
        f"The run folder {place} cannot be written: Read-only file system. Name one that can" in done.stderr
    )
    assert "Loading weights" not in done.stderr


def test_full_disk_is_refused_before_the_model_loads(tiny_model, tmp_path):
    file = write_run(tiny_model, module="SFTModule", default_root_dir="disk/run")
    done = on_small_disk(f"quiver fit -c {file}", "size=500k")
    assert done.returncode == 1
    place = tmp_path.resolve() / "disk" / "run"
    assert (
        f"The run folder {place} has less than 1 MiB of free space (No space left on device)." in done.stderr
    )
    assert "Loading weights" not in done.stderr


class Fill(lightning.Callback):
    """Leaves almost nothing of a disk from the third step on."""

    def __init__(self, leave: int) -> None:
        self.leave = leave

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            free = shutil.disk_usage("disk").free
            with Path("disk/filler").open("wb") as file:
                file.write(b" " * max(0, free - self.leave))


@pytest.mark.parametrize("what", ["checkpoint", "metrics", "rollouts"])
def test_disk_that_fills_up_in_mid_run(what, tiny_model):
    """One clear line, and the checkpoints from before can be read."""
    fill = {"class_path": "test_run_folder.Fill", "init_args": {"leave": 4096 if what == "checkpoint" else 0}}
    table = [{"class_path": "RolloutTable"}] if what == "rollouts" else []
    csv = {**CSV, "init_args": {**CSV["init_args"], "save_dir": "disk/run"}}
    file = write_run(
        tiny_model,
        module="GRPOModule" if table else "SFTModule",
        max_steps=6 if what == "checkpoint" else 80,  # a page of memory takes some more lines
        max_epochs=-1,
        log_every_n_steps=1,
        default_root_dir="disk/run",
        logger=csv if what == "metrics" else False,
        # Where metrics or rollouts shall be the first to fail, checkpoints are on another disk.
        callbacks=[fill, *table, saver("disk/run/checkpoints" if what == "checkpoint" else "checkpoints")],
        enable_checkpointing=True,
    )
    done = on_small_disk(f"quiver fit -c {file}; code=$?; cp -r disk/run kept; exit $code", "size=8m")
    assert done.returncode == 1, done.stderr
    *_, said = done.stderr.rstrip("\n").split("\n")
    name = {"checkpoint": ".ckpt", "metrics": "metrics.csv", "rollouts": "rollouts.jsonl"}[what]
    assert said.startswith("quiver: error: ")
    assert name in said
    assert "cannot be written" in said
    assert "--ckpt_path latest" in said
    assert "Traceback" not in done.stderr
    folder = Path("kept/checkpoints") if what == "checkpoint" else Path("checkpoints")
    kept = sorted(folder.glob("*.ckpt"))
    steps = sorted(torch.load(one, weights_only=True)["global_step"] for one in kept)
    assert steps == list(range(1, len(steps) + 1))
    assert (len(steps) == 2) if what == "checkpoint" else (2 <= len(steps) < 80)
    assert not list(folder.glob(".*"))


def test_limit_of_file_size_names_the_file(tmp_path):
    """EFBIG, in a process of its own: the limit cannot be raised again by all."""
    code = (
        "import resource, signal\nfrom pathlib import Path\n"
        "from lightning_modules.files import complete_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    with complete_file(Path('big')) as file:\n        file.write_bytes(b'x' * 5000)\n"
        "except OSError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[Errno 27] File too large: 'big'\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_errors_of_safetensors_are_named():
    with pytest.raises(OSError, match="No space left on device: 'adapter'"), naming(Path("adapter")):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="other"), naming(Path("adapter")):
        raise RuntimeError("other")
