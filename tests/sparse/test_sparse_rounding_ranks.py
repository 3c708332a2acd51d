"""Ranks that hold parts of a sparse adapter agree on what rounding takes, and one of them says it."""

from __future__ import annotations

import json

import pytest
import torch
from parallel_runs import columns, run, strategy_options, write_config

pytestmark = pytest.mark.slow
NAMES = ("sparse/kept", "sparse/rounding_error", "sparse/unmoved")


def test_sharded_ranks_measure_what_one_process_does(tiny_model, tmp_path):
    measured = []
    stats = '--trainer.callbacks+={"class_path": "SparseStats", "init_args": {"every_n_steps": 1, "image": false}}'
    adam = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}}
    for name, options in (("one", []), ("two", strategy_options("fsdp2", 2))):
        folder = tmp_path / name
        config = write_config("sparse", tiny_model, folder)
        options = [*options, "--model.dtype=bfloat16", f"--model.optimizer={json.dumps(adam)}", stats]
        out = run("fit", "-c", str(config), *options, "--trainer.max_steps=3")
        assert out.count("Measured after the first update") == 1
        measured.append(torch.tensor(columns(folder, *NAMES)))
    assert len(measured[0]) == 3
    torch.testing.assert_close(*measured, rtol=0.05, atol=0.02)  # gradients of bfloat16 differ a little
    assert 0 < measured[0][2, 1] < 1
