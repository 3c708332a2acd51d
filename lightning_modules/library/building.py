"""Experts for a routed model: new ones, or those of a library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_modules.library.clusters import read_clusters
from lightning_modules.library.experts import Experts
from lightning_modules.library.layers import ExpertStack
from lightning_modules.library.loading import choose_experts, new_stack, open_experts, stacks_of
from lightning_modules.library.store import AdapterLibrary


def name_experts(
    experts: int | list[str] | dict[str, list[str]] | str | None, data_tasks: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Name new experts and their tasks.

    Args:
        experts: How many skills, the names of tasks that get an expert each, a mapping from expert to its tasks, a
            file of clusters, or None for an expert for each task of the data.
        data_tasks: The tasks of the training data, where they are known.

    Returns:
        Expert to tasks.

    Raises:
        ValueError: If there would be no expert, one without tasks, or a name twice.
    """
    if isinstance(experts, int):
        if experts < 1:
            raise ValueError(f"experts={experts}: there must be at least 1.")
        return {f"skill_{number}": tuple(data_tasks) for number in range(experts)}
    if isinstance(experts, str):
        return {name: tuple(tasks) for name, tasks in read_clusters(experts).items()}
    if isinstance(experts, dict):
        if empty := [name for name, tasks in experts.items() if not tasks]:
            raise ValueError(f"experts: {empty[0]!r} has no task.")
        return {name: tuple(tasks) for name, tasks in experts.items()}
    names = list(data_tasks) if experts is None else experts
    if not names:
        raise ValueError("experts: name the new experts, or say how many skills there shall be.")
    if len(set(names)) < len(names):
        raise ValueError(f"experts={names}: name each expert once.")
    return {name: (name,) for name in names}


def new_experts(
    tasks: Mapping[str, tuple[str, ...]],
    targets: Sequence[str],
    model: nn.Module,
    rank: int,
    alpha: float,
    *,
    same_start: bool,
    data_tasks: tuple[str, ...],
) -> Experts:
    """Make new LoRA experts.

    Args:
        tasks: Expert to tasks.
        targets: Names of the layers that they change.
        model: The base model.
        rank: Of each expert.
        alpha: LoRA's alpha.
        same_start: Whether all start from the same A.
        data_tasks: The tasks of the training data.
    """
    stacks: dict[str, ExpertStack] = {
        layer: new_stack(
            len(tasks),
            model.get_submodule(layer).get_parameter("weight"),
            rank,
            alpha,
            same_start=same_start,
        )
        for layer in targets
    }
    return Experts(tuple(tasks), tasks, stacks, data_tasks=data_tasks)


def load_experts(
    library: AdapterLibrary,
    names: Sequence[str] | None,
    subtract: Sequence[str],
    model: nn.Module,
    *,
    trained: bool,
    data_tasks: tuple[str, ...],
) -> Experts:
    """Load experts of a library.

    Args:
        library: Where they are.
        names: Which; None for all.
        subtract: Experts whose mean is taken off the others, which are not routed to.
        model: The base model.
        trained: Whether they are to be trained.
        data_tasks: The tasks of the training data.

    Raises:
        ValueError: If an expert is unknown, broken or of another base model, or none is left.
    """
    general = choose_experts(library, subtract) if subtract else []
    own = [name for name in choose_experts(library, names) if name not in general]
    if not own:
        raise ValueError("subtract names all experts, so there is none left to route to.")
    opened = open_experts(library, [*own, *general], model)
    stacks = stacks_of(
        {name: opened[name] for name in own},
        model,
        trained=trained,
        subtract=[opened[name] for name in general],
    )
    # What cached arrays depend on besides each expert: what was subtracted, by content, and how factors are rounded.
    weights = sorted({weight for name in own for weight in opened[name].names})
    settings: dict[str, Any] = {"dtype": [str(model.get_parameter(weight).dtype) for weight in weights]}
    if general:
        settings["subtract"] = sorted([*library[name].checksums.values()] for name in general)
    tasks = {name: library[name].tasks or (name,) for name in own}
    return Experts(tuple(own), tasks, stacks, library, settings, data_tasks)
