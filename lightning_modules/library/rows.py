"""RoutingState: which rows the layers of a routed model work on, and what the router made of them.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.library.mixing import Routing


@dataclass
class RoutingState:
    """State that the layers of one model share; each adapter has its own.

    It stays until the next batch, so that layers which gradient checkpointing runs again see the same.

    Attributes:
        rows: What the router made of the rows' tasks and prompts, for example (B) task numbers.
        tasks: The tasks of these rows (B), for those who watch.
        prompts: Their prompts (B).
        count: B; None before the first `hear`.
        alike: Whether what was heard of one row holds for every row, however many there are.
        enabled: Whether experts take part; else the base model answers alone.
    """

    rows: Any = None
    tasks: tuple[str, ...] = ()
    prompts: tuple[Any, ...] = ()
    count: int | None = None
    alike: bool = False
    enabled: bool = True

    def hear(
        self,
        router: nn.Module,
        tasks: Sequence[str],
        prompts: Sequence[Any],
        device: torch.device,
        *,
        alike: bool = False,
    ) -> None:
        """Take in which rows come next.

        Args:
            router: A `Router`, whose `encode` reads them.
            tasks: The task of each row (B).
            prompts: The prompt of each row (B).
            device: Where the layers are; what the router makes goes there once for all of them.
            alike: Whether this one row stands for every row to come.

        Raises:
            ValueError: If there are not as many tasks as prompts, or the router does not know a task.
        """
        if len(tasks) != len(prompts):
            raise ValueError(
                f"route: {len(tasks)} tasks and {len(prompts)} prompts. Give one of each for every row."
            )
        self.rows = _moved(router.encode(tasks, prompts), device)  # type: ignore[operator]
        self.tasks, self.prompts = tuple(tasks), tuple(prompts)
        self.count, self.alike = len(tasks), alike

    def rows_of(self, router: nn.Module, num_rows: int) -> Any:
        """Return what a router made of the rows of a forward pass.

        Args:
            router: The router of a layer.
            num_rows: Rows of the forward pass.

        Raises:
            ValueError: If the router reads rows, and heard of none or of another number.
        """
        if self.count == num_rows or self.alike or not getattr(router, "reads_rows", False):
            return self.rows
        name = type(router).__name__
        if self.count is None:
            raise ValueError(
                f"router={name} routes by the rows' tasks or prompts, and has heard of no row. Call "
                "adapter.route(tasks, prompts) before the model, or adapter.route_all(task) once."
            )
        raise ValueError(
            f"router={name} has heard of {self.count} rows, and the model gets {num_rows}. Call "
            "adapter.route(tasks, prompts) with the task and prompt of each row before the model, or "
            "adapter.route_all(task) where all rows are alike."
        )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Return to the rows of now afterwards."""
        before = replace(self)
        try:
            yield
        finally:
            for field in fields(self):
                setattr(self, field.name, getattr(before, field.name))


def follow_generate(model: nn.Module) -> None:
    """Let a model's `generate` repeat the rows that were heard of where it repeats inputs.

    Beams and several sequences for a prompt: `num_beams` or `num_return_sequences` neighbours for each row.

    Args:
        model: A transformers model with routed layers. Without `generate` it is left alone.
    """
    if hasattr(model, _EXPAND):
        vars(model).update(generate=MethodType(_generate, model), **{_EXPAND: MethodType(_expand, model)})


_EXPAND = "_expand_inputs_for_generation"


def _generate(model: Any, *arguments: Any, **options: Any) -> Any:
    with _routed(model).state.kept():
        return type(model).generate(model, *arguments, **options)


def _expand(model: Any, *arguments: Any, **options: Any) -> Any:
    times = options.get("expand_size", 1)
    layer = _routed(model)
    state: RoutingState = layer.state
    if options.get("input_ids") is not None:
        state.rows_of(layer.router, len(options["input_ids"]))
    if times > 1 and state.count is not None and not state.alike:
        tasks = [task for task in state.tasks for _ in range(times)]
        prompts = [prompt for prompt in state.prompts for _ in range(times)]
        state.hear(layer.router, tasks, prompts, layer.base_layer.weight.device)
    own = vars(model).pop(_EXPAND)
    try:
        return getattr(model, _EXPAND)(*arguments, **options)
    finally:
        vars(model)[_EXPAND] = own


def _routed(model: nn.Module) -> Any:
    """Return one of the routed layers of a model."""
    return next(
        module for module in model.modules() if isinstance(getattr(module, "state", None), RoutingState)
    )


def _moved(rows: Any, device: torch.device) -> Any:
    """Put what a router made of rows on a device; forms of its own making stay where they are."""
    if isinstance(rows, Tensor):
        return rows.to(device)
    if isinstance(rows, Routing):
        return replace(
            rows, weight=rows.weight.to(device), index=None if rows.index is None else rows.index.to(device)
        )
    return rows
