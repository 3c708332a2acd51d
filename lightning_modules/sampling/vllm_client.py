"""The HTTP side of a vLLM server: JSON out and in, time-outs, retries, and errors that say what to do."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lightning_modules.sampling.vllm_requests import Drawn
from lightning_modules.secrets import redact

T = TypeVar("T")
U = TypeVar("U")

# Too many requests, and gateways whose server is not there.
_BUSY = frozenset({429, 502, 503, 504})
_LONGEST_WAIT = 10.0


class ServerError(ValueError):
    """What a server answered instead of the thing asked for.

    Attributes:
        status: HTTP status.
        said: The server's own message, shortened.
    """

    status: int = 0
    said: str = ""


class VLLMClient:
    """Calls the endpoints of one vLLM server that a rollout needs.

    Args:
        url: Its address, such as `http://127.0.0.1:8000`.
        timeout: Seconds to wait for an answer.
        max_retries: How often a call is made again where the server cannot be reached or is too busy.
        key: Bearer token; None sends none.
        ended: Returns what is known about the end of the server's process, or None. It ends the retries.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        max_retries: int,
        key: str | None = None,
        ended: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.key = key
        self._timeout, self._max_retries, self._ended = timeout, max_retries, ended
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        # A proxy cannot reach this machine's loopback.
        is_local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        proxies = (urllib.request.ProxyHandler({}),) if is_local else ()
        self._opener = urllib.request.build_opener(*proxies)

    # ------------------------------------------------------------------ what is asked

    def is_healthy(self) -> bool:
        """Return whether the server answers at all, without retries."""
        try:
            self._send("/health", None)
        except (OSError, HTTPException):
            return False
        return True

    def models(self) -> list[dict[str, Any]]:
        """Return the cards of the base model, first, and of the adapters that are loaded."""
        cards: list[dict[str, Any]] = self.call("/v1/models")["data"]
        return cards

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load a LoRA adapter. A second time does no harm."""
        # In place, so that it may be sent again when the answer was lost.
        self.call(
            "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
        )

    def unload_adapter(self, name: str) -> None:
        """Forget a LoRA adapter; does nothing if the server has forgotten it."""
        try:
            self.call("/v1/unload_lora_adapter", {"lora_name": name})
        except ServerError as error:
            if error.status != 404:
                raise

    def load_weights(self, name: str, folder: Path) -> None:
        """Replace all weights by those of a folder, when nothing runs, and forget what was computed with the old.

        Args:
            name: By which `weights` calls them afterwards.
            folder: A Hugging Face folder that the server can read.
        """
        self.call("/pause?mode=wait", {})
        try:
            self.call(
                "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            )
            self.call("/reset_prefix_cache", {})
            self.call("/update_weight_version", {"new_version": name})
        finally:
            self.call("/resume", {})

    def weights(self) -> str:
        """Return the name of the weights that `load_weights` loaded last."""
        return str(self.call("/weight_info")["weight_version"])

    def device(self) -> str:
        """Return the kind of device that the server computes on; empty where it does not say."""
        try:
            return str(self.call("/server_info?config_format=json")["vllm_config"]["device_config"]["device"])
        except (ServerError, KeyError, TypeError):
            return ""

    def complete(self, model: str, prompt: list[int], parameters: dict[str, Any]) -> Drawn:
        """Draw one completion.

        Args:
            model: Name of an adapter or of the base model.
            prompt: Token ids.
            parameters: As `sampling_parameters` returns them.
        """
        asked = {
            "model": model,
            "prompt": prompt,
            "return_token_ids": True,
            "include_stop_str_in_output": True,
        }
        answer = self.call("/v1/completions", {**asked, **parameters})
        [choice] = answer["choices"]
        if choice.get("token_ids") is None:
            raise ValueError(f"The server at {self.url} returns no token ids. Update its vLLM.")
        return Drawn(
            model=answer["model"],
            token_ids=choice["token_ids"],
            logprobs=(choice.get("logprobs") or {}).get("token_logprobs") or [],
            finish=choice.get("finish_reason"),
        )

    # ------------------------------------------------------------------ how it is asked

    def call(self, path: str, content: dict[str, Any] | None = None) -> Any:
        """GET, or POST where there is content, again where the server cannot be reached or is too busy.

        Args:
            path: Of the endpoint.
            content: What is sent as JSON.

        Returns:
            The answer; a string where it is no JSON.

        Raises:
            ServerError: If the server refuses.
            TimeoutError: If it does not answer in time.
            ConnectionError: If it cannot be reached.
        """
        problem: Exception | None = None
        for number in range(self._max_retries + 1):
            if number:
                time.sleep(min(2.0 ** (number - 1), _LONGEST_WAIT))
            if (end := self._ended()) is not None:
                raise ConnectionError(end)
            try:
                return self._send(path, content)
            except urllib.error.HTTPError as error:
                if error.code not in _BUSY:
                    raise self._refused(path, error) from None
                problem = error
            except (OSError, HTTPException) as error:  # a URLError is an OSError
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                if isinstance(reason, TimeoutError):
                    raise TimeoutError(
                        f"The vLLM server at {self.url} did not answer {path} within {self._timeout:g} s. Set a larger "
                        "timeout of the sampler, or a smaller batch or max_new_tokens. Go on from the last checkpoint "
                        "with --ckpt_path."
                    ) from None
                problem = error
        if (end := self._ended()) is not None:
            raise ConnectionError(end)
        raise ConnectionError(
            f"The vLLM server at {self.url} cannot be reached, after {self._max_retries + 1} attempts "
            f"({redact(str(problem))}). See that it runs and that url is right; then start, or go on from the last "
            "checkpoint with --ckpt_path."
        )

    def _send(self, path: str, content: dict[str, Any] | None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        with self._opener.open(request, timeout=self._timeout) as answer:
            text = answer.read().decode("utf-8", "replace")
        try:
            return json.loads(text)
        except ValueError:
            return text

    def _refused(self, path: str, error: urllib.error.HTTPError) -> ServerError:
        said = redact(_message(error.read().decode("utf-8", "replace")))
        remedy = "Look at its log, and go on from the last checkpoint with --ckpt_path."
        if error.code == 401:
            remedy = "Give its key in the environment variable VLLM_API_KEY."
        refused = ServerError(f"The vLLM server at {self.url} refuses {path} ({error.code}): {said} {remedy}")
        refused.status, refused.said = error.code, said
        return refused


def _message(text: str) -> str:
    """Find the message in the JSON of an error."""
    try:
        found = json.loads(text)
        found = found.get("error", found.get("detail", found))
        text = str(found.get("message", found)) if isinstance(found, dict) else str(found)
    except (ValueError, AttributeError):
        pass
    text = " ".join(text.split())
    return text[:600].rstrip(".") + "."


def in_parallel(function: Callable[[T], U], items: Sequence[T], workers: int) -> list[U]:
    """Apply a function that waits for something to all items, several at a time.

    The first error is raised at once, and nothing new is begun. Threads that still wait do not keep the process alive,
    as those of concurrent.futures would.

    Args:
        function: What to apply.
        items: To what.
        workers: How many at a time.

    Returns:
        The results, in order.
    """
    waiting = iter(enumerate(items))
    lock, stopped = threading.Lock(), threading.Event()
    done: SimpleQueue[tuple[int, U | None, BaseException | None]] = SimpleQueue()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                position, item = next(waiting, (None, None))
            if position is None:
                return
            try:
                done.put((position, function(item), None))  # type: ignore[arg-type]
            except BaseException as error:  # raised below, in the thread that asked
                stopped.set()
                done.put((position, None, error))

    for _ in range(min(workers, len(items))):
        threading.Thread(target=work, daemon=True).start()
    results: dict[int, U] = {}
    try:
        while len(results) < len(items):
            position, result, error = done.get()
            if error is not None:
                raise error
            results[position] = result  # type: ignore[assignment]
    finally:
        stopped.set()
    return [results[position] for position in range(len(items))]
