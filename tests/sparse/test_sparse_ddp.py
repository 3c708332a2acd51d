"""Two processes choose the same weights, keep the same values, and equal one process on the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sparse_ddp_worker
import torch

WORKER = Path(__file__).parent / "sparse_ddp_worker.py"


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """What the two ranks, and one process alone, saved of each run."""
    out = tmp_path_factory.mktemp("ddp")
    names = list(sparse_ddp_worker.RUNS)
    command = [sys.executable, str(WORKER), tiny_model, str(out / "two"), "2", *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    sparse_ddp_worker.main(tiny_model, str(out / "one"), "1", *names)

    def read(name):
        files = [out / f"two.{name}.0", out / f"two.{name}.1", out / f"one.{name}.0"]
        if not all(file.exists() for file in files):
            pytest.fail(done.stderr[-3000:])
        return [torch.load(file, weights_only=True) for file in files]

    return read


@pytest.mark.parametrize("name", sparse_ddp_worker.RUNS)
def test_two_ranks_equal_each_other_and_one_process(runs, name):
    first, second, alone = runs(name)
    assert len(first["steps"]) == len(second["steps"]) == len(alone["steps"]) == 6
    for step, (ours, theirs, expected) in enumerate(
        zip(first["steps"], second["steps"], alone["steps"], strict=True), 1
    ):
        for parameter, (indices, values) in expected.items():
            assert torch.equal(ours[parameter][0], theirs[parameter][0]), (step, parameter)
            assert torch.equal(ours[parameter][1], theirs[parameter][1]), (step, parameter)
            assert torch.equal(ours[parameter][0], indices), (step, parameter)
            torch.testing.assert_close(ours[parameter][1], values, atol=1e-5, rtol=0)
    assert torch.equal(first["logits"], second["logits"])
    torch.testing.assert_close(first["logits"], alone["logits"], atol=1e-4, rtol=0)
    last = alone["steps"][-1]
    assert max(float(values.abs().max()) for _, values in last.values() if len(values)) > 1e-3
    choices = [{n: i.tolist() for n, (i, _) in one.items()} for one in alone["steps"]]
    changes = [step for step in range(2, 7) if choices[step - 1] != choices[step - 2]]
    # Static_global chooses after step 1, which has no step before it here.
    assert changes == {"static": [2], "fisher": [2], "static_global": [], "first_epochs": [2, 4, 6]}.get(
        name, [2, 4, 6]
    )
    sizes = [len(values) for _, values in last.values()]
    assert (0 in sizes) == (name == "static_global")  # a weight that gets nothing
