"""How calls of a vLLM server fail, against a real HTTP server; and how a server that we start ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from standin_server import StandIn

from lightning_modules.sampling.vllm_client import ServerError, VLLMClient, in_parallel
from lightning_modules.sampling.vllm_server import VLLMServer, find_executable, serve_command


@pytest.fixture
def standin():
    server = StandIn()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("lightning_modules.sampling.vllm_client._LONGEST_WAIT", 0.01)


def client_of(server, **options) -> VLLMClient:
    return VLLMClient(server.url, **{"timeout": 20.0, "max_retries": 2, **options})


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_calls_again_while_the_server_is_busy(standin):
    answers = iter([(503, {}), (429, {})])
    standin.changed["/v1/models"] = lambda usual: next(answers, usual)
    assert client_of(standin).models()[0]["id"] == "base"
    assert len(standin.asked("/v1/models")) == 3
    answers = iter([(503, {})] * 3)
    with pytest.raises(ConnectionError, match=r"cannot be reached, after 3 attempts \(.*503.*--ckpt_path"):
        client_of(standin).models()


def test_says_that_nobody_answers():
    client = VLLMClient(f"http://127.0.0.1:{free_port()}/v1/", timeout=5.0, max_retries=1)
    assert not client.url.endswith("/")
    assert not client.is_healthy()
    with pytest.raises(
        ConnectionError, match=r"cannot be reached, after 2 attempts \(.*refused.*url is right"
    ):
        client.models()


def test_a_server_that_dies_in_the_middle_of_an_answer_is_one_that_cannot_be_reached():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def hang_up() -> None:
            while True:
                try:
                    listening.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=hang_up, daemon=True).start()
        client = VLLMClient(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=5.0, max_retries=1)
        with pytest.raises(ConnectionError, match="cannot be reached, after 2 attempts"):
            client.complete("base", [1], {})


def test_a_late_answer_is_not_waited_for_again(standin):
    held = threading.Event()
    standin.changed["/v1/completions"] = lambda usual: (held.wait(20), usual)[1]
    with pytest.raises(TimeoutError, match=r"did not answer /v1/completions within 0\.2 s.*timeout"):
        client_of(standin, timeout=0.2).complete("base", [1], {})
    held.set()
    assert len(standin.asked("/v1/completions")) == 1


def test_says_what_the_server_said_and_no_secret(standin, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "planted-secret-1")
    client = client_of(standin, key="planted-secret-1")
    client.models()
    assert standin.keys == ["Bearer planted-secret-1"]
    standin.changed["/v1/models"] = lambda _: (400, {"error": {"message": "no\nplanted-secret-1"}})
    with pytest.raises(ServerError, match=r"refuses /v1/models \(400\): no <secret, left out>\.") as found:
        client.models()
    assert found.value.status == 400
    standin.changed["/v1/models"] = lambda _: (401, {"error": "Unauthorized"})
    with pytest.raises(ServerError, match=r"\(401\): Unauthorized\. Give its key in .* VLLM_API_KEY"):
        client.models()


def test_an_old_server_without_token_ids_is_refused(standin):
    def without(usual):
        del usual[1]["choices"][0]["token_ids"]
        return usual

    standin.changed["/v1/completions"] = without
    with pytest.raises(ValueError, match=r"returns no token ids\. Update its vLLM"):
        client_of(standin).complete("base", [1], {})


@pytest.mark.parametrize("workers", [1, 3, 50])
def test_in_parallel_is_a_loop(workers):
    items = list(range(20))
    assert in_parallel(lambda item: item * item, items, workers) == [item * item for item in items]
    assert in_parallel(lambda item: item, [], workers) == []


def test_the_first_error_ends_a_parallel_loop():
    begun = []

    def work(item):
        begun.append(item)
        if item == 3:
            raise ValueError("three")
        return item

    with pytest.raises(ValueError, match="three"):
        in_parallel(work, range(10_000), 2)
    time.sleep(0.1)
    assert len(begun) < 10_000


# ---------------------------------------------------------------------- a server of our own


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_server_that_does_not_start_shows_what_it_said(tmp_path):
    server = VLLMServer(
        python("import sys; print('x\\nValueError: no such model'); sys.exit(3)"), tmp_path / "log"
    )
    client = client_of(server, max_retries=5, ended=server.ended)
    with pytest.raises(
        ConnectionError, match=r"exit code 3\. Mend .*said: ValueError: no such model \(.*log\)"
    ):
        server.wait(client, 60)
    with pytest.raises(ConnectionError, match="exit code 3"):
        client.models()
    server.stop()


def test_a_server_that_takes_too_long_is_given_up(tmp_path):
    server = VLLMServer(python("import time; time.sleep(600)"), tmp_path / "log")
    with pytest.raises(TimeoutError, match=r"does not answer after 0\.1 s\. Set a larger startup_timeout"):
        server.wait(client_of(server), 0.1)
    server.stop()
    assert server.ended() is not None


_FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
_OWNER = """
import sys, time
from pathlib import Path
from lightning_modules.sampling.vllm_server import VLLMServer
server = VLLMServer([sys.executable, "-c", sys.argv[1]], Path(sys.argv[2]))
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie that waits for somebody to ask for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_and_its_children_end_with_a_run_that_is_killed(tmp_path, number):
    log = tmp_path / "log"
    owner = subprocess.Popen([*python(_OWNER), _FAMILY, str(log)], env={**os.environ})
    until(lambda: log.exists() and len(log.read_text().split()) == 2)
    family = [int(word) for word in log.read_text().split()]
    assert all(is_running(pid) for pid in family)
    owner.send_signal(number)
    owner.wait(30)
    until(lambda: not any(is_running(pid) for pid in family))


def test_the_command_of_a_server(tmp_path):
    executable = tmp_path / "vllm"
    executable.write_text("#!/bin/sh\n")
    executable.chmod(0o755)
    assert serve_command(str(executable), "org/model", "bfloat16", 16) == [
        *(
            str(executable),
            "serve",
            "org/model",
            "--dtype",
            "bfloat16",
            "--enable-lora",
            "--max-lora-rank",
            "16",
        ),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
    ]
    assert "--enable-lora" not in serve_command(str(executable), "org/model", "float32", None)
    with pytest.raises(
        ValueError, match=r"executable='no-such-vllm': there is no such command.*\[vllm\].*url"
    ):
        find_executable("no-such-vllm")
