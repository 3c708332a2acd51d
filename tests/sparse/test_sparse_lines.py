"""Whole rows and columns are trained without the gradient of the other entries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_modules.sparse.adapter import SparseAdapter
from lightning_modules.sparse.schedules import Static
from lightning_modules.sparse.scores import random
from lightning_modules.sparse.weight import SparseWeight


def gradients(structure, density, *, autocast=False, dtype=torch.float32):
    """Of values and of the input, and the indices."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(7, 9, dtype=dtype))
    adapter = SparseAdapter(["0"], density, random, structure, schedule=Static(batches=0))
    adapter.attach(layer)
    nn.init.normal_(adapter.weights[0].values)
    x = torch.randn(2, 5, 7, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(x).square().sum().backward()
    weight = adapter.weights[0]
    return weight.values.grad, x.grad, weight.indices


@pytest.mark.parametrize("structure", ["row", "column"])
@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize(
    ("autocast", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)]
)
def test_they_equal_the_whole_gradient(structure, density, autocast, dtype, monkeypatch):
    def never(self, gradient):
        raise AssertionError("the whole gradient was made")

    with monkeypatch.context() as patch:
        patch.setattr(SparseWeight, "gather", never)
        of_values, of_x, indices = gradients(structure, density, autocast=autocast, dtype=dtype)
    monkeypatch.setattr(SparseWeight, "lines", None)
    all_values, all_x, same = gradients(structure, density, autocast=autocast, dtype=dtype)
    assert torch.equal(indices, same)
    assert of_values.any()
    torch.testing.assert_close(of_values, all_values)
    torch.testing.assert_close(of_x, all_x)


def test_other_structures_make_it():
    layer = nn.Sequential(nn.Linear(7, 9))
    for structure, density, dim in [
        ("element", 0.3, None),
        ("block", 0.3, None),
        ("row", 0.3, 0),
        ("column", 0.3, 1),
        ("element", 1.0, None),
    ]:
        adapter = SparseAdapter(["0"], density, random, structure, block=2, schedule=Static(batches=0))
        adapter.attach(layer)
        assert adapter.weights[0].line_dim == dim, structure
        adapter.remove()
