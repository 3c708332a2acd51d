"""The machine that a benchmark runs on. Import it before torch: both sides get Quiver's setting for OpenMP's threads.

A user's own GOMP_SPINCOUNT or OMP_WAIT_POLICY wins, so `GOMP_SPINCOUNT=300000` measures with OpenMP's default.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from lightning_modules.threads import bound_spinning

bound_spinning()


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Run `count` processes beside the block that keep a core busy each."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
