"""Experts: the stacks of all layers of a model under one set of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
        fingerprints: Hash of the base weight of each layer, where weights are there to be read.
    """

    names: tuple[str, ...]
    tasks: Mapping[str, tuple[str, ...]]
    layers: Mapping[str, ExpertStack]
    library: AdapterLibrary | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    data_tasks: tuple[str, ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def changed_by(self, name: str) -> list[str]:
        """Return the layers that an expert changes."""
        number = self.names.index(name)
        return [layer for layer, stack in self.layers.items() if bool(stack.present[number])]

    def described(
        self, kind: str, settings: Mapping[str, Any], compute: Callable[[ExpertStack], Tensor]
    ) -> dict[str, Tensor]:
        """Return an array for each expert and layer, from the library's cache where it is there.

        An expert's arrays are kept without rows of zeros at their end, which only fill up a stack in which another
        expert has a higher rank. Of experts that are being trained nothing is kept.

        Args:
            kind: Name of the arrays.
            settings: What else they depend on.
            compute: Makes the arrays of a stack's experts (E, ...).

        Returns:
            Layer to (E, ...), as long as the longest.
        """
        trained = any(p.requires_grad for stack in self.layers.values() for p in stack.parameters())
        if self.library is None or trained:
            return {layer: compute(stack) for layer, stack in self.layers.items()}
        settings = {**settings, **self.settings, "layers": sorted(self.layers)}
        found = [self._found(name, kind, settings) for name in self.names]
        if any(arrays is None for arrays in found):
            made = {layer: compute(stack).cpu() for layer, stack in self.layers.items()}
            for number, name in enumerate(self.names):
                if found[number] is None:
                    own = {layer: _without_filling(made[layer][number]) for layer in made}
                    self.library.put_arrays(name, kind, own, settings)
                    found[number] = own
        return stacked([arrays for arrays in found if arrays is not None])

    def _found(self, name: str, kind: str, settings: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Return what the library keeps of an expert; None where that does not fit the layers."""
        assert self.library is not None
        arrays = self.library.find_arrays(name, kind, settings)
        if arrays is None or arrays.keys() != self.layers.keys():
            return None
        fits = (arrays[layer].shape[-1:] == (stack.in_features,) for layer, stack in self.layers.items())
        return {layer: _without_filling(array) for layer, array in arrays.items()} if all(fits) else None


def _without_filling(array: Tensor) -> Tensor:
    """Drop the last rows of an array (r, in) that are zero; vectors stay as they are."""
    if array.dim() < 2:
        return array.contiguous()
    used = array.flatten(1).any(1).nonzero()[:, 0]
    return array[: int(used[-1]) + 1 if len(used) else 0].contiguous()


def stacked(arrays: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Turn one mapping per expert into one array per name, experts first; shorter ones are filled up with zeros."""
    return {name: _stack([one[name] for one in arrays]) for name in arrays[0]}


def _stack(arrays: Sequence[Tensor]) -> Tensor:
    if arrays[0].dim() < 2:
        return torch.stack(list(arrays))
    return nn.utils.rnn.pad_sequence(list(arrays), batch_first=True)
