"""A resumed run goes on in its W&B run, and W&B that cannot be reached stops nothing."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from small_runs import quiver, start_quiver, write_run
from test_wandb import items, of_kind

WANDB = {
    "class_path": "lightning.pytorch.loggers.WandbLogger",
    "init_args": {"project": "quiver", "save_dir": "run"},
}
SAVER = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"dirpath": "run/checkpoints", "every_n_train_steps": 1, "save_last": True},
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def online(port: int) -> dict[str, str]:
    """The environment of a user of a W&B server at a port of this machine."""
    return {
        "WANDB_MODE": "online",
        "WANDB_SILENT": "false",
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_INIT_TIMEOUT": "4",
        "WANDB_FINISH_TIMEOUT": "5",
    }


def write(model, *, steps, **options):
    return write_run(
        model,
        module="SFTModule",
        max_steps=steps,
        log_every_n_steps=1,
        logger=WANDB,
        callbacks=[SAVER],
        enable_checkpointing=True,
        **options,
    )


def runs() -> list[Path]:
    """The .wandb files, oldest first."""
    return sorted(Path("run/wandb").glob("*run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)


def finished(file: Path) -> Path:
    """Wait for W&B's own process, which may write after the run has ended."""
    for _ in range(300):
        if of_kind(file, "exit"):
            return file
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def history(file: Path) -> list[dict]:
    return [items(record.item) for record in of_kind(finished(file), "history")]


def losses(file: Path) -> list[tuple[int, int]]:
    """W&B's step and ours of each logged loss."""
    rows = [row for row in history(file) if "train/loss" in row]
    return [(row["_step"], row["trainer/global_step"]) for row in rows]


def test_resumed_run_goes_on_in_its_wandb_run(tiny_model):
    code, _, err = quiver("fit", "-c", write(tiny_model, steps=2))
    assert code == 0, err
    again = ["fit", "-c", write(tiny_model, steps=4), "--ckpt_path", "run/checkpoints/last.ckpt"]
    code, _, err = quiver(*again)
    assert code == 0, err
    first, second = runs()
    [one], [two] = of_kind(first, "run"), of_kind(second, "run")
    assert one.run_id == two.run_id
    assert [ours for _, ours in losses(first) + losses(second)] == [0, 1, 2, 3]
    steps = [step for step, _ in losses(first) + losses(second)]
    assert steps == sorted(set(steps)), "W&B's own steps go on too"

    # An id of one's own makes another run of it.
    code, _, err = quiver(*again, "--trainer.logger.init_args.id", "branch", "--trainer.max_steps", "5")
    assert code == 0, err
    assert of_kind(finished(runs()[-1]), "run")[0].run_id == "branch"


def test_unreachable_wandb_does_not_stop_a_run(tiny_model):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]  # nothing listens there from here on
    code, _, err = quiver("fit", "-c", write(tiny_model, steps=3), **online(port))
    assert code == 0, err
    [file] = runs()  # the attempt left nothing
    assert file.parent.name.startswith("offline-run-")
    [run] = of_kind(finished(file), "run")
    assert "W&B cannot be reached (Timed out" in err
    assert err.count(f"Run {run.run_id} is kept on this disk, and nothing is lost.") == 2  # start and end
    assert f"wandb sync {file.parent}" in err
    assert [ours for _, ours in losses(file)] == [0, 1, 2]


def test_wrong_key_is_refused_before_the_model_loads(tiny_model):
    options = {**online(1), "WANDB_API_KEY": "short"}
    code, _, err = quiver("fit", "-c", write(tiny_model, steps=3), **options)
    assert code == 1
    *_, message = err.rstrip("\n").split("\n")
    assert message.startswith("quiver: error: W&B refuses this user: ")
    assert message.endswith("Run `wandb login`, or keep the run on this disk: WANDB_MODE=offline.")
    assert "Loading weights" not in err
    assert not Path("run").exists()


class Server(BaseHTTPRequestHandler):
    """As much of W&B's server as a client asks for to start a run; it forgets what it gets."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        project = {"name": "quiver", "entity": {"name": "me"}}
        bucket = {
            "id": "1",
            "name": self.server.run_id(body),
            "displayName": "run",
            "description": None,
            "config": "{}",
            "sweepName": None,
            "historyLineCount": 0,
            "summaryMetrics": "{}",
            "tags": [],
            "eventsTail": "[]",
            "historyTail": "[]",
            "project": project,
            "wandbConfig": "{}",
        }
        viewer = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        files = {"runID": "1", "uploadHeaders": [], "files": []}
        answer = {
            "data": {
                "upsertBucket": {"bucket": bucket, "inserted": True},
                "viewer": viewer,
                "createRunFiles": files,
            }
        }
        self.reply(answer if b"query" in body else {})

    def do_GET(self):
        self.reply({})

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.reply({})

    def reply(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def test_connection_lost_in_mid_run_loses_nothing(tiny_model):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True

    def run_id(body):
        found = json.loads(body).get("variables", {}).get("name") if b"UpsertBucket" in body else None
        return found or "run"

    server.run_id = run_id
    threading.Thread(target=server.serve_forever, daemon=True).start()
    file = write(tiny_model, steps=3, data={})
    process = start_quiver("fit", "-c", file, **online(server.server_port))
    for _ in range(600):
        if runs() and of_kind(runs()[0], "run"):
            break
        time.sleep(0.1)
    server.shutdown()
    server.server_close()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[:6000]
    [written] = runs()
    assert written.parent.name.startswith("run-"), "it had started online"
    assert [ours for _, ours in losses(written)] == [0, 1, 2]
