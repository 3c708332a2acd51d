"""Experts: the stacks of all layers of a model under one set of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_modules.library.layers import ExpertStack
from lightning_modules.library.store import AdapterLibrary


@dataclass(frozen=True)
class Experts:
    """What a router may know of the experts that it chooses among.

    Attributes:
        names: Their names, in the order of the stacks (E).
        tasks: The tasks of each expert.
        layers: The stack of each layer, by the layer's name in the model.
        library: Where they come from; None for new ones.
        data_tasks: The tasks of the training data, where they are known.
        settings: What was done to them after loading. A change makes cached arrays invalid.
    """

    names: tuple[str, ...]
    tasks: Mapping[str, tuple[str, ...]]
    layers: Mapping[str, ExpertStack]
    library: AdapterLibrary | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    data_tasks: tuple[str, ...] = ()

    def described(
        self, kind: str, settings: Mapping[str, Any], compute: Callable[[ExpertStack], Tensor]
    ) -> dict[str, Tensor]:
        """Return an array for each expert and layer, from the library's cache where it is there.

        Args:
            kind: Name of the arrays.
            settings: What else they depend on.
            compute: Makes the arrays of a stack's experts (E, ...).

        Returns:
            Layer to (E, ...).
        """
        if self.library is None:
            return {layer: compute(stack) for layer, stack in self.layers.items()}
        settings = {**settings, **self.settings, "layers": sorted(self.layers)}
        found = [self.library.find_arrays(name, kind, settings) for name in self.names]
        if any(arrays is None for arrays in found):
            made = {layer: compute(stack) for layer, stack in self.layers.items()}
            for number, name in enumerate(self.names):
                if found[number] is None:
                    own = {layer: made[layer][number].contiguous().cpu() for layer in made}
                    self.library.put_arrays(name, kind, own, settings)
            return made
        return stacked([arrays for arrays in found if arrays is not None])


def stacked(arrays: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Turn one mapping per expert into one array per name, experts first."""
    return {name: torch.stack([one[name] for one in arrays]) for name in arrays[0]}
