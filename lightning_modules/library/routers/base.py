"""The Router seam.

Shapes: B rows, S positions, E experts, k chosen ones.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    """

    num_examples: int = 0
    kind: str = ""
    one_expert_per_row: bool = False
    needs_library: bool = False

    def __init__(self) -> None:
        super().__init__()

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


def missing_descriptions(router: Router, experts: Experts) -> list[str]:
    """Name the experts that a router has to see examples of first."""
    if not router.num_examples:
        return []
    if experts.library is None:
        raise ValueError(
            f"router={type(router).__name__} knows experts by examples, which are kept in a library. Set library."
        )
    settings = router.description_settings()
    find = experts.library.find_arrays
    return [name for name in experts.names if find(name, router.kind, settings) is None]
