"""A vLLM server of our own on loopback: started, waited for, explained when it dies, and stopped."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lightning_modules.sampling.own_ranks import without_ranks
from lightning_modules.sampling.vllm_client import VLLMClient
from lightning_modules.secrets import redact_message, remember

_LAST_LINES = 4
_SECONDS_TO_END = 20.0


def serve_command(
    executable: str, model: str, dtype: str, rank: int | None, revision: str | None = None
) -> list[str]:
    """Return the command of a server for a policy, without address.

    Args:
        executable: Name or path of vLLM's console script.
        model: Of the base model: a hub id or a folder.
        dtype: Of its weights, such as `bfloat16`.
        rank: Room for LoRA adapters; None for a model whose weights are replaced.
        revision: Of the base model on the hub.
    """
    lora = [] if rank is None else ["--enable-lora", "--max-lora-rank", str(rank)]
    # Log-probabilities of what is drawn from, and no settings from the model's generation config.
    neutral = ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    version = [] if revision is None else ["--revision", revision, "--tokenizer-revision", revision]
    return [find_executable(executable), "serve", model, "--dtype", dtype, *version, *lora, *neutral]


def find_executable(name: str) -> str:
    """Find a console script beside this Python, on the PATH, or by its path.

    Raises:
        ValueError: If there is none.
    """
    beside = Path(sys.executable).parent / name  # a path stays as it is
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ValueError(
            f"executable={name!r}: there is no such command, so no vLLM server can be started. Install vLLM (pip "
            "install 'lightning-quiver[vllm]'), name the vllm of another environment, or start a server and "
            "give its url."
        )
    return found


class VLLMServer:
    """A `vllm serve` on a free port of 127.0.0.1, with an API key of its own. It ends when this process does.

    Args:
        command: As `serve_command` returns it, and further arguments.
        log: The file that takes what the server prints.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        self.key = secrets.token_urlsafe(32)
        remember([self.key])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        keeper = Path(__file__).with_name("vllm_keeper.py")
        address = ["--host", "127.0.0.1", "--port", str(port)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(keeper), *command, *address],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={
                    **without_ranks(os.environ),
                    "VLLM_API_KEY": self.key,
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
                    "VLLM_SERVER_DEV_MODE": "1",
                },
            )

    def wait(self, client: VLLMClient, seconds: float) -> None:
        """Wait until the server answers.

        Args:
            client: Of its url.
            seconds: How long to wait.

        Raises:
            ConnectionError: If it dies.
            TimeoutError: If it takes longer.
        """
        limit = time.monotonic() + seconds
        while not client.is_healthy():
            if (end := self.ended()) is not None:
                raise ConnectionError(end)
            if time.monotonic() > limit:
                raise TimeoutError(
                    f"The vLLM server does not answer after {seconds:g} s. Set a larger startup_timeout of the "
                    f"sampler. {self._last_words()}"
                )
            time.sleep(0.2)

    def ended(self) -> str | None:
        """Say how the process ended; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        return (
            f"The vLLM server that the sampler started has ended with exit code {code}. Mend what its log says; then "
            f"start, or go on from the last checkpoint with --ckpt_path: a new server is started. {self._last_words()}"
        )

    def stop(self) -> None:
        """End the server and its children, and wait for that."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _last_words(self) -> str:
        lines = (
            self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        )
        telling = [line for line in lines if "error" in line.lower()] or lines
        return redact_message(f"It said: {' | '.join(telling[-_LAST_LINES:])} (the whole log: {self.log})")
