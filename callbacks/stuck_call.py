"""Ends a process that a second Ctrl-C finds in a call that never returns."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

from lightning_modules.ranges import check_seconds

_SECONDS_TO_END = 5.0


class StuckCallWatch:
    """Counts Ctrl-C beside Python's handlers, which wait for the main thread.

    A collective whose other rank has stopped never returns to Python, and no handler runs. The interpreter tells a
    file descriptor of each signal at once; a thread reads it.

    Args:
        repeat: Seconds within which a launcher may repeat the terminal's Ctrl-C.
    """

    def __init__(self, repeat: float) -> None:
        check_seconds("repeat", repeat)
        self._repeat = repeat
        self._ended = threading.Event()
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._previous = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._count, name="stuck-call-watch", daemon=True).start()

    def close(self) -> None:
        """End the watch."""
        if not self._ended.is_set():
            self._ended.set()
            signal.set_wakeup_fd(self._previous)
            self._write.close()

    def _count(self) -> None:
        first = None
        with suppress(OSError):
            while numbers := self._read.recv(64):
                if signal.SIGINT not in numbers:
                    continue
                now = time.monotonic()
                first = first or now
                if now - first > self._repeat and not self._ended.wait(_SECONDS_TO_END):
                    sys.stderr.write("SIGINT, twice: a call did not return. Ended without saving.\n")
                    sys.stderr.flush()
                    os._exit(128 + signal.SIGINT)
        self._read.close()
