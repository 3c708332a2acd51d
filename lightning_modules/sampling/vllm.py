"""VLLMSampler: rollouts from a vLLM server, whose policy follows the trainer's version by version.

Shapes: B rows.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.distributed import gathered
from lightning_modules.ranges import check_seconds, check_whole
from lightning_modules.sampling.policy_folder import PolicyFolderSampler
from lightning_modules.sampling.vllm_client import ServerError, VLLMClient, in_parallel
from lightning_modules.sampling.vllm_policy import SavedPolicy
from lightning_modules.sampling.vllm_requests import Drawn
from lightning_modules.sampling.vllm_server import VLLMServer, serve_command


@dataclass(frozen=True)
class Served:
    """What every rank needs to know of a server and its policy.

    Attributes:
        url: Of the server.
        key: Bearer token; None for none.
        base: By which the server calls its base model.
        is_adapter: Whether the policy is an adapter, or else the base model itself.
        context: The most tokens of a row; None where the server does not say.
    """

    url: str
    key: str | None
    base: str
    is_adapter: bool
    context: int | None


class VLLMSampler(PolicyFolderSampler[Served]):
    """Samples with a vLLM server: one that you run, or one that it starts on this machine.

    Before each rollout the policy of this version is written as a folder and loaded into the server: a LoRA adapter
    under a new name, full fine-tuning by a reload of all weights. A rollout that another policy drew is refused.
    docs/vllm.md tells how to start a server.

    Args:
        url: Of a running server, `http://127.0.0.1:8000` say. None starts one on a free port of 127.0.0.1, which ends
            with the run. A key of your server goes into the environment variable VLLM_API_KEY.
        timeout: Seconds to wait for an answer; a completion is one answer.
        max_retries: How often a call is made again where the server cannot be reached or is too busy.
        max_concurrency: Requests that each rank has under way at once. The server batches them.
        sync_folder: Where policies are written for the server: a folder that it sees under the same path. None makes a
            temporary one, for a server on this machine.
        server_args: Further arguments of the `vllm serve` that is started, such as `[--max-model-len, "4096"]`.
        executable: Its command: a name or a path, so that vLLM may live in an environment of its own.
        startup_timeout: Seconds that it may take to start.
    """

    def __init__(
        self,
        url: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 3,
        max_concurrency: int = 256,
        sync_folder: str | None = None,
        server_args: list[str] | None = None,
        executable: str = "vllm",
        startup_timeout: float = 900.0,
    ) -> None:
        super().__init__(sync_folder)
        if url is not None:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
                raise ValueError(
                    "url: must be like http://127.0.0.1:8000, without user and password; a key goes into the "
                    "environment variable VLLM_API_KEY."
                )
            if server_args:
                raise ValueError(
                    "server_args are for a server that the sampler starts, but url names one that runs. Leave one of "
                    "the two out."
                )
        check_seconds("timeout", timeout)
        check_seconds("startup_timeout", startup_timeout)
        check_whole("max_retries", max_retries, least=0, hint="0 tries once.")
        check_whole("max_concurrency", max_concurrency)
        self.url = url
        self.timeout = timeout
        self.max_retries = max_retries
        self.max_concurrency = max_concurrency
        self.server_args = server_args
        self.executable = executable
        self.startup_timeout = startup_timeout
        self._server: VLLMServer | None = None
        self._client: VLLMClient | None = None
        self._served: Served | None = None

    def sync(self, version: int, save: Callable[[Path], None]) -> None:
        """Save the policy and load it into the server, unless it is there in this version.

        Raises:
            ValueError: If the server cannot serve it or refuses it.
            OSError: If the server cannot be reached.
        """
        if self.url is None and self._client is None and len(set(gathered(socket.gethostname()))) > 1:
            raise ValueError(
                "url=null starts a server on this machine alone, but ranks run on several. Start a vLLM server that "
                "all of them reach, and give its url and a sync_folder that it sees."
            )
        super().sync(version, save)

    def load(self, policy: SavedPolicy) -> Served:
        """Load a policy into the server, which is started or looked at before the first one."""
        if self._client is None:
            client = self._connect(policy)
            served = self._look_at(client, policy)
            if policy.rank is None:
                self.check_reload(client.device())
            self._client = client
        else:
            assert self._served is not None
            client, served = self._client, self._served
        try:
            if served.is_adapter:
                client.load_adapter(policy.name, policy.folder)
            else:
                client.load_weights(policy.name, policy.folder)
        except ServerError as error:
            raise ValueError(
                f"The vLLM server at {client.url} refuses the policy ({error.status}): {error.said} "
                f"{_remedy(error, policy)}"
            ) from None
        return served

    def adopt(self, loaded: Served) -> None:
        """Connect to the server that rank 0 found or started."""
        self._served, self.context = loaded, loaded.context
        if self._client is None:
            self._client = self._connection(loaded.url, loaded.key)

    def forget(self, name: str) -> None:
        """Unload an earlier adapter; earlier weights are gone already."""
        assert self._client is not None
        assert self._served is not None
        if self._served.is_adapter:
            self._client.unload_adapter(name)

    def draw(
        self, name: str, prompts: Sequence[list[int]], parameters: Sequence[dict[str, Any]]
    ) -> list[Drawn]:
        """Send one request per row."""
        client, served = self._client, self._served
        assert client is not None
        assert served is not None
        model = name if served.is_adapter else served.base

        def complete(row: tuple[list[int], dict[str, Any]]) -> Drawn:
            return client.complete(model, *row)

        # The base model keeps its name whatever its weights, so these are asked for, before and after.
        weights = set() if served.is_adapter else {client.weights()}
        try:
            drawn = in_parallel(complete, list(zip(prompts, parameters, strict=True)), self.max_concurrency)
        except ServerError as error:
            if error.status != 404:
                raise
            raise ValueError(
                f"The vLLM server at {client.url} no longer has the policy {name!r}: it was started anew, or somebody "
                "unloaded it. Go on from the last checkpoint with --ckpt_path."
            ) from None
        if served.is_adapter:
            return drawn
        weights.add(client.weights())
        own = name if weights == {name} else f"weights {sorted(weights)}"
        return [replace(one, model=own if one.model == model else one.model) for one in drawn]

    def close(self) -> None:
        """Unload the policy, and end the server that the sampler started."""
        if self._server is not None:
            died = self._server.ended() is not None
            self._server.stop()
            if self.sync_folder is None and not died:
                self._server.log.unlink(missing_ok=True)
        elif self._served is not None and self._served.is_adapter and self._policy:
            with suppress(OSError, ValueError):  # nothing depends on it any more
                last = VLLMClient(self._served.url, timeout=5.0, max_retries=0, key=self._served.key)
                last.unload_adapter(self._policy)
        super().close()
        self._server = self._client = self._served = None

    def _connection(self, url: str, key: str | None) -> VLLMClient:
        ended = (lambda: None) if self._server is None else self._server.ended
        return VLLMClient(url, timeout=self.timeout, max_retries=self.max_retries, key=key, ended=ended)

    def _connect(self, policy: SavedPolicy) -> VLLMClient:
        """Reach the user's server, or start one."""
        if self.url is not None:
            return self._connection(self.url, os.environ.get("VLLM_API_KEY"))
        command = serve_command(self.executable, self.place, self.dtype, policy.room, self.revision)
        log = policy.folder.with_name("server.log")
        self._server = VLLMServer([*command, *(self.server_args or [])], log)
        client = self._connection(self._server.url, self._server.key)
        self._server.wait(client, self.startup_timeout)
        return client

    def _look_at(self, client: VLLMClient, policy: SavedPolicy) -> Served:
        """Check what the server serves, and which log-probabilities it returns."""
        base = client.models()[0]
        name, root = str(base["id"]), str(base.get("root"))
        if Path(self.place).name not in (Path(name).name, Path(root).name):
            rank_zero_warn(
                f"The vLLM server at {client.url} serves {name!r} ({root}), and the policy's base model is "
                f"{self.place!r}. If these are not the same weights, rollouts are of another model."
            )
        # A token that is the only one allowed has the probability 1, but not before temperature and cuts.
        probe = {"max_tokens": 1, "allowed_token_ids": [1], "ignore_eos": True, "logprobs": 0}
        [logprob, *_] = client.complete(name, [1], probe).logprobs or [None]
        if logprob is None or abs(logprob) > 1e-3:
            raise ValueError(
                f"The vLLM server at {client.url} returns log-probabilities from before temperature and cuts. Start it "
                "with --logprobs-mode processed_logprobs."
            )
        return Served(client.url, client.key, name, policy.rank is not None, base.get("max_model_len"))


def _remedy(error: ServerError, policy: SavedPolicy) -> str:
    """Say what to do about a policy that the server did not take."""
    if policy.rank is None:
        if error.status == 404:
            return (
                "It offers no reload of weights. Start it with VLLM_SERVER_DEV_MODE=1 in its environment, or train an "
                "adapter."
            )
        return f"It must be able to read {policy.folder}: set sync_folder to a folder that both machines see."
    if error.status == 404 and "adapter" not in error.said.lower():
        return (
            "It loads no adapters. Start it with --enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its "
            "environment."
        )
    if "rank" in error.said.lower():
        return f"Start it with --max-lora-rank {policy.room}."
    return (
        f"The adapter has rank {policy.rank}: start it with --enable-lora --max-lora-rank {policy.room}. It must be "
        f"able to read {policy.folder}: set sync_folder to a folder that both machines see."
    )
