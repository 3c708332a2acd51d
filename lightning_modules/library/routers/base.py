"""The Router seam.

Shapes: B rows, S positions, E experts, k chosen ones.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.batches import Prompt
from lightning_modules.library.experts import Experts
from lightning_modules.library.mixing import Routing


class Router(nn.Module, ABC):
    """Chooses experts. The user makes one; each layer gets a copy with what it needs for its own inputs.

    A new router is `forward`, and `for_layer` if layers differ. Whatever it learns are parameters of the copies.

    Attributes:
        num_examples: How many prompts of each expert's tasks `describe` wants to see. 0 for most.
        kind: Name of the arrays that `describe` makes.
        needs_library: Whether it makes sense for trained experts alone.
        one_expert_per_row: Whether each row goes to one expert alone, whose loss and gradient then are its own.
        describes_inputs: Whether what `describe` makes depends on the base model, not on texts alone.
        mixes_factors: Whether its papers mix experts' factors, not their outputs.
        reads_rows: Whether rows make a difference, so that `encode` sees them before each forward pass.
    """

    num_examples: int = 0
    kind: str = ""
    one_expert_per_row: bool = False
    needs_library: bool = False
    describes_inputs: bool = False
    mixes_factors: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.reads_rows = type(self).encode is not Router.encode

    def prepare(self, experts: Experts) -> None:
        """Meet the experts. Comes first, once.

        Args:
            experts: All of them, in all layers.

        Raises:
            ValueError: If this router cannot choose among them.
        """
        self.names = experts.names

    def for_layer(self, layer: str) -> Router:
        """Return the copy that a layer uses.

        Args:
            layer: Its name in the model.
        """
        return copy.deepcopy(self)

    def encode(self, tasks: Sequence[str], prompts: Sequence[Prompt]) -> Any:
        """Turn what is known of rows into what `forward` gets as `rows`; once for all layers.

        Args:
            tasks: The task of each row (B).
            prompts: The prompt of each row (B).

        Returns:
            Anything; None if rows make no difference.

        Raises:
            ValueError: If a task is unknown to this router.
        """
        return None

    def describe(
        self, prompts: Sequence[Prompt], mean_inputs: Callable[[], dict[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Describe an expert by examples of its tasks, for routers with `num_examples`.

        Args:
            prompts: Some of its training prompts.
            mean_inputs: Runs the base model on them; returns the mean over prompts of each layer's input at the
                last prompt token, by layer (in).

        Returns:
            Arrays to keep in the library under `kind`.
        """
        raise NotImplementedError(f"{type(self).__name__} sets num_examples, so it must define describe")

    def description_settings(self) -> dict[str, Any]:
        """Return what the arrays of `describe` depend on besides the expert."""
        return {"examples": self.num_examples}

    def covers(self, arrays: Mapping[str, Tensor], widths: Mapping[str, int]) -> bool:
        """Return whether the kept arrays of an expert serve this router; others are made again.

        Args:
            arrays: What `describe` made once.
            widths: The inputs of each layer that the expert changes, by the layer's name.
        """
        return True

    def per_expert_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters whose first dimension counts experts."""
        return []

    @abstractmethod
    def forward(self, x: Tensor, rows: Any) -> Routing:
        """Choose.

        Args:
            x: Inputs of the layer (B, S, in).
            rows: What `encode` made of the rows.

        Returns:
            Experts and weights.
        """


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products keep the type of their factors, under mixed precision too."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def missing_descriptions(router: Router, experts: Experts) -> list[str]:
    """Name the experts that a router has to see examples of first."""
    if not router.num_examples:
        return []
    if experts.library is None:
        raise ValueError(
            f"router={type(router).__name__} knows experts by examples, which are kept in a library. Set library."
        )
    return [name for name in experts.names if kept_arrays(router, experts, name) is None]


def kept_arrays(router: Router, experts: Experts, name: str) -> dict[str, Tensor] | None:
    """Return what the library keeps of an expert for a router; None where it is not there or does not fit.

    Args:
        router: Whose arrays.
        experts: With a library.
        name: Of the expert.
    """
    assert experts.library is not None
    arrays = experts.library.find_arrays(name, router.kind, kept_settings(router, experts, name))
    widths = {layer: experts.layers[layer].in_features for layer in experts.changed_by(name)}
    return arrays if arrays is not None and router.covers(arrays, widths) else None


def kept_settings(router: Router, experts: Experts, name: str) -> dict[str, Any]:
    """Return what the kept arrays of an expert depend on besides the expert."""
    settings = router.description_settings()
    if router.describes_inputs:
        settings["base"] = {layer: experts.fingerprints.get(layer) for layer in experts.changed_by(name)}
    return settings
