"""`quiver library export`: a mixture of a library's experts as one plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_modules.library.adapter import RoutedAdapter
from lightning_modules.library.merge_mixture import export_mixture
from lightning_modules.library.mixing import Mixing, output_mixing
from lightning_modules.library.route_command import base_of
from lightning_modules.library.routers.base import Router
from lightning_modules.library.routers.fixed import UniformRouter
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.sources import load_model, written_choice


def export_library(
    library: str,
    output: str,
    router: Router = UniformRouter(),  # noqa: B008  a setting; the model's layers get copies
    mixing: Mixing = output_mixing,
    experts: list[str] | None = None,
    task: str | None = None,
    base: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
) -> None:
    """Write a mixture of experts as one LoRA adapter of PEFT.

    Args:
        library: The library.
        output: The folder to make; must not exist.
        router: Says the weights, the same for all inputs: `UniformRouter`, `WeightsRouter` or, with `task`,
            `TaskRouter`.
        mixing: `lightning_modules.library.mixing.output_mixing` adds ranks up; `factor_mixing` keeps the rank.
        experts: Names of experts to mix; by default all.
        task: The task that the mixture is for, where the router asks for one.
        base: The base model, as in `model:` of a configuration; by default what the experts name.
        model_kwargs: Which version of it, and how it is read, as in a configuration; `revision` by default what the
            experts name.

    Raises:
        ValueError: If the library is empty, `output` exists, or the router chooses by input.
    """
    if Path(output).exists():
        raise ValueError(f"output={output!r} exists already. Give a new folder, or remove that one.")
    adapter = RoutedAdapter(router, library, experts, mixing=mixing)
    source, choice = base_of(AdapterLibrary(library), base)
    kwargs = {**choice, **(model_kwargs or {})}
    adapter.source, adapter.choice = written_choice(source, kwargs)
    # Experts take the type of the base, so that a base in half precision would round what is written.
    adapter.attach(load_model(source, {**kwargs, "dtype": torch.float32}))
    export_mixture(adapter, Path(output), task)
    print(f"Wrote one LoRA adapter of {len(adapter.stacked.names)} experts to {output}")  # noqa: T201
