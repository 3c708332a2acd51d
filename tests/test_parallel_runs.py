"""Two processes under DDP and FSDP2 do what one process does: same losses, same weights, for every module."""

from __future__ import annotations

import pytest
from parallel_runs import CASES, assert_equal_runs, run, strategy_options, write_config

from lightning_modules.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=CASES)
def single(request, tiny_model, tmp_path_factory):
    """A run of each case in one process."""
    folder = tmp_path_factory.mktemp(request.param)
    assert main(["fit", "-c", str(write_config(request.param, tiny_model, folder))]) == 0
    return request.param, folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one(single, strategy, tiny_model, tmp_path):
    case, folder = single
    config = write_config(case, tiny_model, tmp_path)
    run("fit", "-c", str(config), *strategy_options(strategy, 2))
    worst = assert_equal_runs(tmp_path, folder, case)
    print(f"{case}, {strategy}, 2 processes: weights differ by at most {worst:.1e}")
