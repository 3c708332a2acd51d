"""SparseExpert: puts a sparse adapter from disk into a model by scatter, and takes it out again."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_modules.rounding import Rounding, name_of, rounding
from lightning_modules.sparse.delta import write_entries
from lightning_modules.sparse.storage import SparseFolder


class SparseExpert:
    """A trained sparse adapter, for inference.

    Args:
        folder: What `SparseAdapter.save` or `quiver merge --to sparse` wrote.

    Raises:
        ValueError: If a file is missing or broken, or indices or values make no sense.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = SparseFolder(folder)
        self.deltas = {name: self.folder.delta(name) for name in self.folder.names}
        self._replaced: list[Tensor] = []

    def apply(self, model: nn.Module) -> SparseExpert:
        """Write base + values into the weights of `model`.

        Args:
            model: The base model that the adapter was trained on; no other expert is in it.

        Returns:
            This expert. There is a warning if the weights' type keeps less than 90% of the norm of the change.

        Raises:
            ValueError: If it is applied already, or `model` is another base model. Nothing is changed then.
        """
        if self._replaced:
            raise ValueError(f"{self.folder.folder} is in a model already. Call remove() first.")
        self.folder.check_base(model)
        weights = dict(model.named_parameters(remove_duplicate=False))
        arrives: dict[torch.dtype, Rounding] = {}
        with torch.no_grad():
            for name, delta in self.deltas.items():
                weight = weights[name].detach()
                indices = delta.indices.to(weight.device)
                values = delta.values.to(weight.device)
                base = weight.flatten().index_select(0, indices)
                found = rounding(base, values, weight.dtype)
                arrives[weight.dtype] = arrives.get(weight.dtype, Rounding()) + found
                write_entries(weight, indices, (base + values).to(weight.dtype))
                self._replaced.append(base)
        self._model = model
        for dtype, found in arrives.items():
            if not found.suffices:
                warnings.warn(
                    f"{self.folder.folder}: {name_of(dtype)} keeps {found.share:.1%} of the norm of its change "
                    f"(relative error {found.error:.2g}). Load the base model in float32: dtype=torch.float32.",
                    stacklevel=2,
                )
        return self

    def remove(self) -> None:
        """Restore the base weights bit for bit."""
        if not self._replaced:
            return
        weights = dict(self._model.named_parameters(remove_duplicate=False))  # it may have moved meanwhile
        for base, (name, delta) in zip(self._replaced, self.deltas.items(), strict=True):
            weight = weights[name].detach()
            write_entries(weight, delta.indices.to(weight.device), base.to(weight))
        self._replaced = []
