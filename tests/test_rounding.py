"""The share of a change that a type of few digits keeps, against a loop, and who says it."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_modules import rounding as module
from lightning_modules.rounding import Rounding, rounding, sum_of


def by_loop(base, change, dtype):
    """Share of the norm, relative error and share of still entries, one entry at a time."""
    wanted = kept = lost = 0.0
    changes = still = 0
    for before, delta in zip(base.flatten().tolist(), change.flatten().tolist(), strict=True):
        after = torch.tensor(before + delta, dtype=torch.float32).to(dtype).item()
        arrives = after - torch.tensor(before).to(dtype).item()
        wanted += delta**2
        kept += min(abs(arrives), abs(delta)) ** 2 if arrives * delta > 0 else 0.0
        lost += (arrives - delta) ** 2
        changes += delta != 0
        still += delta != 0 and arrives == 0
    return math.sqrt(kept / wanted), math.sqrt(lost / wanted), still / changes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("on_grid", [True, False])
def test_the_measure_is_that_of_a_loop(dtype, size, on_grid, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 50)
    torch.manual_seed(0)
    base = 0.2 * torch.randn(12, 20)
    base = base.to(dtype).float() if on_grid else base
    change = size * torch.randn(12, 20) * (torch.rand(12, 20) > 0.2)
    found = rounding(base, change, dtype)
    assert (found.share, found.error, found.unmoved) == pytest.approx(by_loop(base, change, dtype), rel=1e-4)
    halves = sum_of(rounding(base[rows], change[rows], dtype) for rows in (slice(5), slice(5, 12)))
    assert (halves.share, halves.error) == pytest.approx((found.share, found.error))
    assert found.suffices == (found.share >= 0.9)
    if dtype == torch.float32 and size > 1e-4:
        assert found.share > 0.9999
        assert found.error < 1e-3
        assert found.unmoved == 0


def test_changes_that_vanish_arrive_or_are_none():
    ones = torch.ones(4)
    gone = rounding(ones, torch.full((4,), 1e-3), torch.bfloat16)
    assert (gone.share, gone.error, gone.unmoved, gone.changes) == (0, 1, 1, 4)
    exact = rounding(ones, torch.full((4,), 0.5), torch.bfloat16)
    assert (exact.share, exact.error, exact.unmoved) == (1, 0, 0)
    # 0.6 steps of 2^-7 become a whole one: all of the change arrives, and more than was wanted.
    more = rounding(ones, torch.full((4,), 0.6 / 128), torch.bfloat16)
    assert more.share == 1
    assert more.error == pytest.approx(0.4 / 0.6, rel=1e-6)
    nothing = rounding(ones, torch.zeros(4), torch.bfloat16)
    assert (nothing.share, nothing.error, nothing.unmoved, nothing.suffices) == (1, 0, 0, True)
    assert sum_of([]) == Rounding()
