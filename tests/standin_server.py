"""A small real HTTP server with the endpoints of vLLM that the sampler calls, for what needs no engine: errors, names.

It draws the ids `[5, 6]` for every prompt, each with probability 1/2; a test changes what it needs changed.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]


class StandIn:
    """Answers like a vLLM server that serves `base`.

    Attributes:
        calls: Path and content of each call so far.
        keys: The Authorization header of each call.
        adapters: Folders by name.
        changed: Functions that answer a path in its stead, given what it would answer.
    """

    def __init__(self, base: str = "base", context: int = 64) -> None:
        self.base, self.context = base, context
        self.calls: list[tuple[str, Any]] = []
        self.keys: list[str | None] = []
        self.adapters: dict[str, str] = {}
        self.weights = "default"
        self.changed: dict[str, Callable[[Answer], Answer]] = {}
        standin = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, content: Any) -> None:
                standin.calls.append((self.path, content))
                standin.keys.append(self.headers["Authorization"])
                path = self.path.split("?")[0]
                given = standin.own(path, content)
                status, body = standin.changed.get(path, lambda usual: usual)(given)
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def own(self, path: str, content: Any) -> Answer:
        """What it answers unless a test changes it."""
        if path == "/v1/models":
            cards = [{"id": self.base, "root": self.base, "max_model_len": self.context}]
            return 200, {"data": cards + [{"id": name, "parent": self.base} for name in self.adapters]}
        if path == "/v1/load_lora_adapter":
            self.adapters[content["lora_name"]] = content["lora_path"]
        if path == "/v1/unload_lora_adapter":
            del self.adapters[content["lora_name"]]
        if path == "/update_weight_version":
            self.weights = content["new_version"]
        if path == "/weight_info":
            return 200, {"weight_version": self.weights}
        if path == "/v1/completions":
            if content["model"] not in (self.base, *self.adapters):
                return 404, {"error": {"message": f"The model `{content['model']}` does not exist."}}
            only = content.get("allowed_token_ids")
            ids = only or [5, 6]
            choice = {
                "token_ids": ids,
                "finish_reason": "length",
                "logprobs": {"token_logprobs": [0.0 if only else math.log(0.5)] * len(ids)},
            }
            return 200, {"model": content["model"], "choices": [choice]}
        return 200, {}

    def asked(self, path: str) -> list[Any]:
        """Contents of the calls of a path."""
        return [content for called, content in self.calls if called.split("?")[0] == path]
