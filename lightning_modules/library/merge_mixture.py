"""A mixture of experts that is the same for all tokens, as one plain LoRA.

Shapes: E experts, H heads, r rank.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lightning_modules.base_names import name_base
from lightning_modules.checksums import write_checksums
from lightning_modules.files import complete_folder
from lightning_modules.library.adapter import RoutedAdapter
from lightning_modules.library.layers import LoraStack, RoutedLinear
from lightning_modules.library.mixing import Routing, factor_mixing, output_mixing
from lightning_modules.library.publish import write_expert
from lightning_modules.library.routers.base import Router
from lightning_modules.library.routers.fixed import TaskRouter, UniformRouter, WeightsRouter
from lightning_modules.library.routers.poly import PolyRouter
from lightning_modules.naming import natural
from lightning_modules.sources import resolve_model

Factors = tuple[Tensor, Tensor, float]
"""A (r, in), B (out, r) and alpha / r of one layer."""


def export_mixture(adapter: RoutedAdapter, folder: Path, task: str | None = None) -> None:
    """Write a routed model's mixture as one LoRA folder of PEFT.

    The folder appears complete or not at all; an earlier one of this name is renamed, not overwritten.

    Args:
        adapter: Attached to its model, with a `UniformRouter`, `WeightsRouter`, `TaskRouter` or `PolyRouter`.
        folder: Where to.
        task: The task whose mixture it is, for a `TaskRouter` or `PolyRouter`.

    Raises:
        ValueError: If the mixture is no LoRA.
    """
    factors = mixture_as_lora(adapter, task)
    with complete_folder(folder) as aside:
        write_expert(aside, factors, adapter.source)
        if adapter.source is not None:
            name_base(
                aside / "adapter_config.json", adapter.source, resolve_model(adapter.source), adapter.choice
            )
        write_checksums(aside)


@torch.no_grad()
def mixture_as_lora(adapter: RoutedAdapter, task: str | None = None) -> dict[str, Factors]:
    """Return a routed model's mixture as factors.

    With `output_mixing` the factors of the experts stand beside each other, so that their ranks add up; with
    `factor_mixing` they are added up, and the rank is the largest of the experts'.

    Args:
        adapter: Attached to its model.
        task: The task whose mixture it is, for routers that go by task.

    Returns:
        By layer: A (r, in), B (out, r), float32, and 1. Layers that the mixture leaves alone are missing.

    Raises:
        ValueError: If the router decides by tokens or prompts, the task is missing, unknown or of no use, the
            experts are sparse, or nothing is changed.
    """
    rows = _rows(adapter.router, task)
    factors = {}
    for name, layer in adapter.layers.items():
        A, B = _mixed(name, layer, _routing(layer, rows))
        if len(A):
            factors[name] = (A, B, 1.0)
    if not factors:
        raise ValueError(
            "The mixture changes nothing: all experts have weight 0. There is nothing to export."
        )
    return factors


def _rows(router: Router, task: str | None) -> Tensor | None:
    """What the router makes of a row of this task, without having seen a prompt."""
    name = type(router).__name__
    if not isinstance(router, UniformRouter | WeightsRouter | TaskRouter | PolyRouter):
        raise ValueError(
            f"{name} mixes experts by what it reads, so no single LoRA does what it does. Export the routed model "
            "as a library, or route by UniformRouter, WeightsRouter, TaskRouter or PolyRouter."
        )
    by_task = isinstance(router, TaskRouter | PolyRouter)
    if by_task == (task is None):
        known = (
            ", ".join(sorted(router.numbers, key=natural))
            if isinstance(router, TaskRouter | PolyRouter)
            else ""
        )
        raise ValueError(
            f"task: {name} mixes experts by task. Give one of {known}."
            if by_task
            else f"task={task!r}: {name} treats all tasks alike. Leave task out."
        )
    rows: Tensor | None = router.encode([] if task is None else [task], [] if task is None else [""])
    return rows


def _routing(layer: RoutedLinear, rows: Tensor | None) -> Routing:
    """The router's decision for a row, whatever its tokens: weights (E) or (H, E), or (k) with an index (k)."""
    base = layer.base_layer
    was_training = layer.router.training
    layer.router.eval()  # Poly may draw its weights in training
    try:
        routing: Routing = layer.router(base.weight.new_zeros(1, 1, base.in_features), rows)
    finally:
        layer.router.train(was_training)
    if routing.weight.dim() == 3 and not routing.heads:
        raise ValueError(
            f"{type(layer.router).__name__} weighs experts by token, so no single LoRA does what it does. Take a "
            "router of fixed weights."
        )
    if rows is None:
        return routing
    return replace(
        routing, weight=routing.weight[0], index=None if routing.index is None else routing.index[0]
    )


def _mixed(name: str, layer: RoutedLinear, routing: Routing) -> tuple[Tensor, Tensor]:
    """Factors of one layer's mixture: A (r, in), B (out, r)."""
    stack = layer.experts
    if not isinstance(stack, LoraStack):
        raise ValueError(
            f"{name} has sparse experts, whose mixture is no LoRA. Merge them: quiver merge --to sparse, or --to "
            "lora for an approximation."
        )
    A, B = (factor.float() for factor in stack.factors())
    weight = routing.weight.float()
    index = torch.arange(len(stack), device=A.device) if routing.index is None else routing.index
    used = [
        (number, own)
        for number, own in zip(index.tolist(), weight.unbind(-1), strict=True)
        if stack.ranks[number] and bool(own.any())
    ]
    if not used:
        return A[0, :0], B[0, :, :0]
    if layer.mixing is output_mixing and not routing.heads:
        return (
            torch.cat([A[number, : stack.ranks[number]] for number, _ in used]),
            torch.cat([own * B[number, :, : stack.ranks[number]] for number, own in used], dim=1),
        )
    if layer.mixing is not factor_mixing:
        mixing = getattr(layer.mixing, "__name__", layer.mixing)
        raise ValueError(
            f"mixing={mixing}: only output_mixing and factor_mixing can be exported as one LoRA."
        )
    rank = max(stack.ranks[number] for number, _ in used)
    mean_A, mean_B = torch.zeros_like(A[0, :rank]), torch.zeros_like(B[0, :, :rank])
    for number, own in used:
        # One weight for all features, or one for each of H equal parts of them.
        of_A, of_B = (own.repeat_interleave(side // own.numel()) for side in (A.shape[2], B.shape[1]))
        mean_A += of_A * A[number, :rank]
        mean_B += of_B[:, None] * B[number, :, :rank]
    return mean_A, mean_B
