"""Damaged files of every kind end in a clear error or in the result of the intact file, and the count is printed.

Many more cases: `python benchmarks/fuzz_files.py --cases 4000 --seed 1`.
"""

from __future__ import annotations

import random
import sys
from collections import Counter

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import fuzz_files

CASES = 500


@pytest.fixture(scope="module")
def kinds(tiny_model, tmp_path_factory):
    return fuzz_files.kinds(tmp_path_factory.mktemp("fuzz"), tiny_model)


def test_every_kind_of_damage_ends_well(kinds, capsys):
    counts: Counter[str] = Counter()
    failures = []
    for case in fuzz_files.run_cases(kinds, CASES, seed=0):
        counts[case.outcome if case.outcome in fuzz_files.GOOD else "failed"] += 1
        if case.outcome not in fuzz_files.GOOD:
            failures.append(case)
    with capsys.disabled():
        print(f"\nfuzz: {counts.total()} damaged files of {len(kinds)} kinds: {dict(counts)}")
    assert failures == []
    assert counts["error"] > counts.total() * 0.7


def test_the_same_seed_damages_the_same_way():
    one, two = (
        [fuzz_files.damage(bytes(range(200)), b"other", rng) for rng in [random.Random(3)] * 30]
        for _ in range(2)
    )
    assert one == two
    assert len({how for how, _ in one}) == 9


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (KeyError("a"), "traceback: KeyError"),
        (ValueError("nothing is said of the file"), "traceback: ValueError"),  # not raised by our code
        (None, "wrong result"),
    ],
)
def test_the_judgement_is_not_blind(tmp_path, problem, expected):
    def read():
        if problem is not None:
            raise problem
        return 2

    kind = fuzz_files.Kind("any", [tmp_path / "file"], read)
    assert fuzz_files.outcome(kind, tmp_path / "file", 1).startswith(expected)
