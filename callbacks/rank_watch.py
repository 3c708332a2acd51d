"""When one of several ranks dies, all stop within a minute, and say which one died and of what."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import lightning.pytorch as lightning

from callbacks.graceful_stop import StoppedError
from lightning_modules.distributed import gathered
from lightning_modules.errors import describe

_SECONDS_TO_BLAME = 2.0  # between the first sign of trouble and naming its cause
_SECONDS_TO_GREET = 2.0
_MOST_BYTES = 1 << 20  # of a message; a traceback is shorter
_SECONDS_TO_END = 40.0  # after that, in which a rank can end by itself


class RankDeathError(ConnectionError):
    """Another rank died; the message says which and of what."""


class RankWatch(lightning.Callback):
    """Keeps a line open from every rank to rank 0: the operating system cuts it when a process dies.

    Without it the survivors get an error of the network that names nobody; over NCCL, or while they are busy
    without exchanging anything, they go on for minutes; and Lightning kills rank 0 in the middle of its message.

    Attributes:
        died: What killed the run, where that was another rank.
    """

    def __init__(self) -> None:
        self.died: RankDeathError | None = None
        self._line: _Line | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Open the line."""
        if trainer.world_size == 1 or self._line is not None:
            return
        self._line = _Line(trainer)
        if trainer.is_global_zero:
            _replace_observer()

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Tell the others, and hear whether one of them was the first to fail."""
        if self._line is None:
            return
        if isinstance(exception, StoppedError | KeyboardInterrupt):  # asked for, and the others know
            self._line.close()
            return
        cause = self._line.fail(exception)
        if cause["rank"] != trainer.global_rank:
            self.died = RankDeathError(_message(cause))
            exception.add_note(str(self.died))
            if trainer.is_global_zero:
                sys.stderr.write(cause["detail"])

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Close the line."""
        if self._line is not None:
            self._line.close()
            self._line = None


class _Line:
    """Connections between rank 0 and all others, and the thread that listens to them.

    A message is a JSON object: {rank, process, host} greets, {failure} tells of an error, {bye} of a good end, and
    {cause} is rank 0's verdict.
    """

    def __init__(self, trainer: lightning.Trainer) -> None:
        self._trainer = trainer
        self._me = {"rank": trainer.global_rank, "process": os.getpid(), "host": socket.gethostname()}
        self._lock = threading.Lock()
        self._ended = False
        self._failures: list[dict[str, Any]] = []
        self._cause: dict[str, Any] | None = None
        self._known = threading.Event()
        self._peers: dict[Connection, dict[str, Any]] = {}
        self._listener: socket.socket | None = None
        host, port, self._key, self._zero = self._place()
        if self._listener is None:
            self._join(host, port)
        threading.Thread(target=self._listen, name="rank-watch", daemon=True).start()

    def _place(self) -> tuple[str, int, str, dict[str, Any]]:
        """Where rank 0 listens, a word that only ranks of this run know, and who rank 0 is."""
        mine = None
        if self._me["rank"] == 0:
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            host = "127.0.0.1" if host in ("localhost", "127.0.0.1", "::1") else host
            self._listener = _listener(host)
            port = self._listener.getsockname()[1]
            mine = (host, port, secrets.token_hex(16), self._me)
        place: tuple[str, int, str, dict[str, Any]] = gathered(mine)[0]
        return place

    def _join(self, host: str, port: int) -> None:
        connection = _connection(socket.create_connection((host, port), timeout=30))
        self._peers[connection] = self._zero
        _send(connection, {**self._me, "key": self._key})

    # ------------------------------------------------------------------ called by the main thread

    def fail(self, exception: BaseException) -> dict[str, Any]:
        """Tell of an error of this rank; return what failed first."""
        *lines, last = describe(exception).rstrip("\n").split("\n")
        detail = "".join(line + "\n" for line in lines)
        kind = f"{type(exception).__name__}: " if lines else ""
        what = f"failed: {kind}{last.removeprefix('quiver: error: ')}"
        self._add({**self._me, "what": what, "detail": detail})
        if self._me["rank"] != 0:
            for connection in list(self._peers):
                _send(connection, {"failure": self._failures[-1]})
        self._known.wait(_SECONDS_TO_BLAME + 3)
        return self._cause or self._failures[0]

    def close(self) -> None:
        """End well."""
        self._ended = True
        for connection in list(self._peers):
            _send(connection, {"bye": True})

    # ------------------------------------------------------------------ the thread

    def _listen(self) -> None:
        while not self._ended:
            ready = wait([*self._peers, *([self._listener] if self._listener else [])], timeout=0.5)
            for one in ready:
                if isinstance(one, Connection):
                    self._hear(one)
                else:
                    assert self._listener is not None
                    self._greet(self._listener.accept()[0])
            first = self._failures[0]["time"] if self._failures else None
            if self._me["rank"] == 0 and first and time.monotonic() - first > _SECONDS_TO_BLAME:
                self._blame()
            if self._cause is not None:
                self._wait_for_the_end()
                return

    def _greet(self, line: socket.socket) -> None:
        """Take a rank in; a stranger who is silent, slow or does not know the word is sent away."""
        try:
            hello = json.loads(_first_message(line))
            known = hmac.compare_digest(str(hello.pop("key", "")).encode(), self._key.encode())
            peer = {"rank": int(hello["rank"]), "process": int(hello["process"]), "host": str(hello["host"])}
        except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            known = False
        if known:
            self._peers[_connection(line)] = peer
        else:
            line.close()

    def _hear(self, connection: Connection) -> None:
        try:
            message = json.loads(connection.recv_bytes(_MOST_BYTES))
        except (OSError, EOFError, ValueError):
            message = None
        peer = self._peers[connection]
        if message is None or "bye" in message:
            del self._peers[connection]
            connection.close()
        if message is None:  # without a word
            self._add({**peer, "what": self._how_it_ended(peer["rank"]), "detail": "", "silent": True})
            if peer["rank"] == 0:
                self._set_cause(self._failures[-1])
        elif "failure" in message:
            self._add(message["failure"])
        elif "cause" in message:
            self._set_cause(message["cause"])
        elif "bye" in message and peer["rank"] == 0:
            self._ended = True

    def _how_it_ended(self, rank: int) -> str:
        """What the operating system says of a process that Lightning started; else what is known."""
        children = getattr(self._trainer.strategy.launcher, "procs", [])
        if self._me["rank"] == 0 and 0 < rank <= len(children):
            for _ in range(20):
                code = children[rank - 1].poll()
                if code is not None:
                    return (
                        f"was killed by {signal.Signals(-code).name}"
                        if code < 0
                        else f"ended with code {code}"
                    )
                time.sleep(0.05)
        return "ended without a message: it was killed, it crashed, or its machine is gone"

    def _add(self, failure: dict[str, Any]) -> None:
        with self._lock:
            already = any(one["rank"] == failure["rank"] for one in self._failures)
            if not already:
                self._failures.append({**failure, "time": time.monotonic()})

    def _blame(self) -> None:
        """Name the cause: a process that vanished; else the first that told of an error."""
        silent = [one for one in self._failures if one.get("silent")]
        self._set_cause((silent or self._failures)[0])
        for connection in list(self._peers):
            _send(connection, {"cause": self._cause})

    def _set_cause(self, cause: dict[str, Any]) -> None:
        self._cause = cause
        self._known.set()

    def _wait_for_the_end(self) -> None:
        """Let the main thread end by itself; where it hangs, write what loggers hold and end the process."""
        assert self._cause is not None
        deadline = time.monotonic() + _SECONDS_TO_END
        while time.monotonic() < deadline:
            if self._trainer.state.stage is None:  # Lightning is done, and a program may go on
                return
            time.sleep(0.5)
        detail = self._cause["detail"] if self._me["rank"] == 0 else ""
        sys.stderr.write(f"{detail}[rank {self._me['rank']}] {_message(self._cause)}\n")
        sys.stderr.flush()
        writer = threading.Thread(target=self._finalize, daemon=True)
        writer.start()
        writer.join(5)
        os._exit(1)

    def _finalize(self) -> None:
        for logger in self._trainer.loggers:
            logger.finalize("failed")


def _message(cause: dict[str, Any]) -> str:
    hint = " Often memory ran out: see dmesg." if cause.get("silent") else ""
    return (
        f"Rank {cause['rank']} (process {cause['process']} on {cause['host']}) {cause['what'].rstrip('.')}.{hint} "
        "The other ranks stopped with it; --ckpt_path latest goes on from the last checkpoint."
    )


def _listener(host: str) -> socket.socket:
    """Listen where the ranks meet, not on all interfaces, unless that address is not this machine's own."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)  # type: ignore[arg-type]
    except OSError:  # behind a translated address, say
        return socket.create_server(("", 0))


def _first_message(line: socket.socket) -> bytes:
    """Read one message in the format of `multiprocessing.connection`, within a time and a size."""
    deadline = time.monotonic() + _SECONDS_TO_GREET

    def take(count: int) -> bytes:
        data = b""
        while len(data) < count:
            line.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = line.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    size = int.from_bytes(take(4), "big", signed=True)
    if not 0 < size <= 4096:
        raise ValueError(f"a first message of {size} bytes")
    return take(size)


def _connection(line: socket.socket) -> Connection:
    """Wrap a socket; the system probes the other machine, which may vanish without a sign."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(line.detach())


def _send(connection: Connection, message: dict[str, Any]) -> None:
    with suppress(OSError):  # it is gone, which the thread will notice
        connection.send_bytes(json.dumps(message).encode())


def _replace_observer() -> None:
    """Retire Lightning's thread that kills this process within 5 s of the end of a child, unheard."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._run = lambda: True  # type: ignore[attr-defined]


def follow_parent() -> None:
    """End this process when the one that started it as a rank is gone, before or after there is a line."""
    if "LOCAL_RANK" not in os.environ and "SLURM_PROCID" not in os.environ:
        return
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(_SECONDS_TO_END)  # in which the line says more, and Python ends well
        os._exit(1)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()
