"""Runs a command and ends it, with all its children, when the process that asked for it is gone.

    python vllm_keeper.py COMMAND...

Standard input is a pipe that the asking process holds open: when it ends, in whatever way, or closes the pipe, the
command is stopped. A file of its own that imports nothing of Quiver, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

_SECONDS_TO_END = 10.0


def main(command: list[str]) -> int:
    """Run `command` until it ends or standard input does; return its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Ctrl-C reaches us too, but the pipe says when to stop. A handler, since the command would inherit SIG_IGN.
        signal.signal(number, lambda *_: None)
    # Its own session, so that its children can be stopped with it.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_stop_at_end_of_input, args=(child,), daemon=True).start()
    code = child.wait()
    _signal(child, signal.SIGKILL)  # what is left of its children
    return code


def _stop_at_end_of_input(child: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1024):
        pass
    _signal(child, signal.SIGTERM)
    try:
        child.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        _signal(child, signal.SIGKILL)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
