"""Readers and writers at once: nothing lost, nothing torn, and damage would be noticed."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import REPOSITORY

from lightning_modules.library.publish import write_expert
from lightning_modules.library.store import AdapterLibrary

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import library_load


@pytest.mark.slow
def test_nothing_is_lost_or_torn_under_load(tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forked processes must not wait for threads that they did not get
    try:
        found = library_load.run(tmp_path / "library", readers=10, writers=4, seconds=4, seed=1)
    finally:
        torch.set_num_threads(threads)
    assert [counts["problems"] for counts in found.values()] == [[], [], []]
    assert found["readers"]["reads"] > 0
    assert found["writers"]["adds"] > 0
    print(found)


def test_the_comparison_notices_what_is_wrong(tmp_path):
    """The check of the load test is not blind: each kind of loss is told."""
    library = AdapterLibrary(tmp_path / "library", create=True)
    for number, name in enumerate(("a", "b", "c"), 1):
        folder = tmp_path / name
        folder.mkdir()
        write_expert(folder, library_load.content(name, number), "base")
        library.add(folder, tasks=[f"version_{number}"])
    compare = library_load._compare
    sound = {"a": 1, "b": 2, "c": 3}
    assert compare(library.root, sound, set())["problems"] == []
    assert compare(library.root, {**sound, "d": 4}, set())["problems"] == ["d is lost"]
    assert compare(library.root, {"a": 1, "b": 2}, {"c"})["problems"] == ["c is there again"]
    assert compare(library.root, {"a": 1, "b": 2}, set())["problems"] == ["c came from nowhere"]
    assert compare(library.root, {**sound, "c": 4}, set())["problems"] == ["c is another version"]
    torn = tmp_path / "torn"
    torn.mkdir()
    write_expert(torn, library_load.content("a", 2), "base")
    library.add(torn, "e", tasks=["version_5"])
    assert not library_load.is_whole(library["e"])
