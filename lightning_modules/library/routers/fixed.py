"""Routers that look at no input: all experts alike, given weights, or the expert of a row's task.

Shapes: B rows, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.batches import Prompt
from lightning_modules.library.experts import Experts
from lightning_modules.library.mixing import Routing
from lightning_modules.library.routers.base import Router
from lightning_modules.naming import natural
from lightning_modules.ranges import check_numbers


class UniformRouter(Router):
    """All experts with weight 1 / E: "mu" (arXiv 2405.11157) and MHR-mu (arXiv 2211.03831) with factor mixing.

    With output mixing it averages the changes B A, of which several experts are warned. With one expert it is that
    expert: the adapter that all tasks share.
    """

    mixes_factors = True

    def forward(self, x: Tensor, rows: None) -> Routing:
        """Return equal weights (E)."""
        count = len(self.names)
        return Routing(x.new_full((count,), 1 / count))


class WeightsRouter(Router):
    """Given weights, the same for all inputs, which need not sum to 1.

    Args:
        weights: Weight of each expert by name; others get 0. None takes those that `LoraHubModule` found, from a
            library that it exported.
    """

    kind = "weights"

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        super().__init__()
        check_numbers("weights", weights, none=True)
        self.weights = weights

    def prepare(self, experts: Experts) -> None:
        """Look the names up.

        Raises:
            ValueError: If a name is unknown, or the library holds no weights.
        """
        super().prepare(experts)
        weights = self._found(experts) if self.weights is None else self.weights
        if unknown := sorted(weights.keys() - set(experts.names), key=natural):
            raise ValueError(
                f"weights: there is no expert {unknown[0]!r}. There are {', '.join(experts.names)}."
            )
        values = torch.tensor([float(weights.get(name, 0.0)) for name in experts.names])
        self.values = nn.Parameter(values, requires_grad=False)

    def description_settings(self) -> dict[str, Any]:
        """Return nothing: weights depend on the experts alone."""
        return {}

    def per_expert_parameters(self) -> list[nn.Parameter]:
        """Return the weights, which a checkpoint and a library keep."""
        return [self.values]

    def forward(self, x: Tensor, rows: None) -> Routing:
        """Return the weights (E)."""
        return Routing(self.values)

    def _found(self, experts: Experts) -> dict[str, float]:
        """Read the weights that a library holds."""
        if experts.library is None:
            raise ValueError("weights: new experts have none. Name them: weights: {expert: weight, ...}.")
        found = {}
        for name in experts.names:
            arrays = experts.library.find_arrays(name, self.kind, self.description_settings())
            if not arrays:
                raise ValueError(
                    f"weights: the library {experts.library.root} holds no weight of {name!r}. Name the weights, or "
                    "give a library that LoraHubModule exported."
                )
            found[name] = float(next(iter(arrays.values())))  # all layers have the same
        return found


class TaskRouter(Router):
    """The expert of the row's task: private libraries, clusters, and the oracle on tasks that have an expert.

    Args:
        default: Name of the expert that answers rows of other tasks. None refuses them.
    """

    one_expert_per_row = True

    def __init__(self, default: str | None = None) -> None:
        super().__init__()
        self.default = default

    def prepare(self, experts: Experts) -> None:
        """Assign tasks to experts.

        Raises:
            ValueError: If two experts claim a task, or `default` is no expert.
        """
        super().prepare(experts)
        self.numbers = expert_of_task(experts.names, experts.tasks)
        if self.default is not None and self.default not in experts.names:
            raise ValueError(f"default={self.default!r} is no expert. There are {', '.join(experts.names)}.")

    def encode(self, tasks: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
        """Return the number of each row's expert (B).

        Raises:
            ValueError: If a task has no expert.
        """
        default = None if self.default is None else self.names.index(self.default)
        numbers = [self.numbers.get(task, default) for task in tasks]
        if None in numbers:
            raise unknown_task(tasks[numbers.index(None)], self.numbers)
        return torch.tensor(numbers)

    def forward(self, x: Tensor, rows: Tensor) -> Routing:
        """Return weight 1 for the row's expert (B, 1)."""
        index = rows.to(x.device)[:, None]
        return Routing(torch.ones_like(index, dtype=x.dtype), index)


def expert_of_task(names: Sequence[str], tasks: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Number the expert of each task.

    Raises:
        ValueError: If two experts claim a task.
    """
    numbers: dict[str, int] = {}
    for number, name in enumerate(names):
        for task in tasks[name]:
            if task in numbers:
                raise ValueError(
                    f"The experts {names[numbers[task]]!r} and {name!r} both say that {task!r} is their task. "
                    "Name the experts to use with experts: [...]."
                )
            numbers[task] = number
    return numbers


def unknown_task(task: str, known: Mapping[str, int]) -> ValueError:
    """Say that a router does not know a task."""
    close = get_close_matches(task, known, n=1)
    hint = (
        f"Did you mean {close[0]!r}?"
        if close
        else f"It knows {', '.join(sorted(known, key=natural)) or 'no task'}."
    )
    return ValueError(
        f"The router does not know the task {task!r}. {hint} Take a router that reads the input (ArrowRouter), or "
        "UniformRouter, for tasks without an expert."
    )
