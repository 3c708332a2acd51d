"""OpenMP threads that wait: how long they spin before they sleep."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPINS = 10_000
"""Turns of the waiting loop before a thread sleeps.

GNU OpenMP, which torch uses on Linux, takes 300,000 by default, milliseconds at the end of each parallel region. A
thread that spins while the one it waits for has no core takes time from it. docs/results/spinning.md has what was
measured, alone and beside other processes.
"""


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bound how long OpenMP's threads spin, in this process and those it starts.

    OpenMP reads its settings when torch is imported, so this comes before. Where torch came first, only the processes
    that this one starts are bounded.

    Args:
        environment: Environment variables. `GOMP_SPINCOUNT` is set unless it or `OMP_WAIT_POLICY` is there.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(SPINS))
