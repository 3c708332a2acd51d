"""OpenMP's threads spin for a bounded time; a user's own setting wins."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from lightning_modules.threads import SPINS, bound_spinning


@pytest.mark.parametrize(
    ("own", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": str(SPINS)}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_what_a_user_sets_wins(own, after):
    bound_spinning(own)
    assert own == after


def read_by_openmp(**settings):
    """Return the setting that OpenMP read in a process that enters Quiver by its command, then imports torch."""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "-c", "from lightning_modules.cli import main; import torch"],
        env={**environment, "OMP_DISPLAY_ENV": "verbose", **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if found is None:
        pytest.skip("torch does not use GNU OpenMP here")
    return int(found[1])


def test_openmp_reads_the_bound():
    assert read_by_openmp() == SPINS
    assert read_by_openmp(GOMP_SPINCOUNT="7") == 7


def test_the_tests_themselves_run_with_a_bound():
    assert {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ)
