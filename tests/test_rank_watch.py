"""RankWatch's line: strangers on its port change nothing, and it listens where the ranks meet."""

from __future__ import annotations

import json
import os
import socket
import time

import lightning.pytorch as lightning

from callbacks.rank_watch import _connection, _Line, _send


def wait_for(condition, seconds=30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def test_strangers_change_nothing(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    trainer = lightning.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    line = _Line(trainer)
    address = line._listener.getsockname()
    assert address[0] == "127.0.0.1"
    key = line._key
    nonsense = [
        b"hi",  # and then silence
        b"",
        b"\xff\xff\xff\xff",
        (1 << 30).to_bytes(4, "big"),
        framed(b"[1]"),
        framed(b"null"),
        framed(b"\xff\xfe"),
        framed(b"[" * 4000),
        framed(json.dumps({"key": "wrong", "rank": 1, "process": 1, "host": "x"}).encode()),
        framed(json.dumps({"key": key}).encode()),  # no rank
        framed(json.dumps({"key": key, "rank": "x", "process": 1, "host": "x"}).encode()),
    ]
    strangers = [socket.create_connection(address[:2]) for _ in nonsense]
    for stranger, data in zip(strangers, nonsense, strict=True):
        stranger.sendall(data)
    friend = _connection(socket.create_connection(address[:2]))
    _send(friend, {"key": key, "rank": 1, "process": os.getpid(), "host": "here"})
    assert wait_for(lambda: [peer["rank"] for peer in line._peers.values()] == [1])
    _send(friend, {"failure": {"rank": 1, "process": 1, "host": "here", "what": "failed: x", "detail": ""}})
    assert wait_for(lambda: bool(line._failures))
    assert line._failures[0]["what"] == "failed: x"
    line._ended = True
    for stranger in strangers:
        stranger.close()
