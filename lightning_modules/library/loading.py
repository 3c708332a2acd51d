"""From folders and settings to stacks of experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_modules.library.entry import AdapterEntry
from lightning_modules.library.layers import ExpertStack, LoraStack
from lightning_modules.library.sparse_stack import sparse_stacks
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.merging.experts import Expert
from lightning_modules.merging.lora import LoraFactors
from lightning_modules.naming import natural
from lightning_modules.sparse.storage import fingerprint


def choose_experts(library: AdapterLibrary, names: Sequence[str] | None) -> list[str]:
    """Return the names of the experts to use, checked.

    Args:
        library: Where they are.
        names: Some of its experts; None means all.

    Raises:
        ValueError: If the library is empty, or a name is unknown or given twice.
    """
    if not len(library):
        raise ValueError(f"The library {library.root} is empty. Add adapters: quiver library add.")
    if names is None:
        return list(library)
    for name in names:
        if name not in library:
            known = ", ".join(sorted(library, key=natural))
            raise ValueError(f"experts: the library {library.root} has no {name!r}. It has {known}.")
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"experts={list(names)}: name each expert once, and at least one.")
    return list(names)


def open_experts(library: AdapterLibrary, names: Sequence[str], model: nn.Module) -> dict[str, Expert]:
    """Open experts and check that they belong to a model.

    Raises:
        ValueError: If one is broken, or belongs to another base model.
    """
    opened = {}
    for name in names:
        opened[name] = library[name].open()
        check_base(library[name], model)
        opened[name].fit(model)
    return opened


def check_base(entry: AdapterEntry, model: nn.Module) -> None:
    """Check that an expert was trained on this base model.

    Raises:
        ValueError: If a weight has other numbers.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, expected in entry.fingerprint.items():
        if name in weights and fingerprint(weights[name]) != expected:
            raise ValueError(
                f"{entry.folder} was trained on other weights: {name} differs in this model. Its base model is "
                f"{entry.base or 'not named'}."
            )


def stacks_of(
    experts: Mapping[str, Expert],
    model: nn.Module,
    *,
    trained: bool,
    subtract: Sequence[Expert] = (),
) -> dict[str, ExpertStack]:
    """Stack experts layer by layer, by `lora_stacks` or `sparse_stacks`.

    Args:
        experts: Open experts by name, all of one kind.
        model: The base model.
        trained: Whether the stacks are to be trained.
        subtract: Experts whose mean change is taken off each expert's change.

    Raises:
        ValueError: If LoRA and sparse experts are mixed, or sparse ones are to be trained or subtracted from.
    """
    sparse = [name for name, expert in experts.items() if expert.is_sparse]
    others = [name for name in experts if name not in sparse]
    if not sparse and not any(expert.is_sparse for expert in subtract):
        return dict(lora_stacks(experts, model, trained=trained, subtract=subtract))
    if sparse and others:
        raise ValueError(
            f"experts: {sparse[0]!r} is sparse and {others[0]!r} is a LoRA. The experts of one model are of one "
            f"kind: choose with experts: [{', '.join(others)}] or experts: [{', '.join(sparse)}]."
        )
    if subtract:
        raise ValueError(
            "subtract: is for LoRA experts. Leave it out, or choose LoRA experts with experts: [...]."
        )
    if trained:
        raise ValueError(
            f"train_experts: {sparse[0]!r} is sparse, and the places of its changes are fixed. Route it frozen "
            "(train_experts: false), or train it alone with SparseAdapterModule."
        )
    return dict(sparse_stacks(experts, model))


def lora_stacks(
    experts: Mapping[str, Expert],
    model: nn.Module,
    *,
    trained: bool,
    subtract: Sequence[Expert] = (),
) -> dict[str, LoraStack]:
    """Stack LoRA experts layer by layer.

    Args:
        experts: Open experts by name.
        model: The base model.
        trained: Whether the stacks are to be trained.
        subtract: Experts whose mean change is taken off each expert's change, as general knowledge (arXiv
            2505.10939). Deviation: PEFT subtracts mean factors in place; here it is the change itself, by factors
            beside each other, and files stay as they are.

    Returns:
        Name of each changed layer to its stack; frozen ones have the type of the layer's weight.
    """
    stacks = {}
    for weight in dict.fromkeys(name for expert in experts.values() for name in expert.names):
        layer = weight.removesuffix(".weight")
        base = model.get_parameter(weight)
        common = [
            factors._replace(scaling=-factors.scaling / len(subtract))
            for factors in (expert.factors(weight) for expert in subtract if weight in expert.names)
        ]
        own = [
            beside([expert.factors(weight), *common]) if weight in expert.names else None
            for expert in experts.values()
        ]
        stacks[layer] = stack_factors(own, base if not trained else base.float(), trained=trained)
    return stacks


def beside(parts: Sequence[LoraFactors]) -> LoraFactors:
    """Return the factors of the sum of several changes: ranks add up."""
    if len(parts) == 1:
        return parts[0]
    return LoraFactors(
        torch.cat([part.A for part in parts]), torch.cat([part.B * part.scaling for part in parts], dim=1)
    )


def stack_factors(own: Sequence[LoraFactors | None], weight: Tensor, *, trained: bool) -> LoraStack:
    """Stack the factors of one layer, lower ranks filled up with zeros.

    Args:
        own: Factors of each expert; None for one that leaves this layer alone (E).
        weight: The layer's weight (out, in).
        trained: Whether the stack is to be trained.
    """
    rank = max(len(factors.A) for factors in own if factors is not None)
    A, B = (
        weight.new_zeros(len(own), rank, weight.shape[1]),
        weight.new_zeros(len(own), weight.shape[0], rank),
    )
    scale = torch.ones(len(own))
    for number, factors in enumerate(own):
        if factors is not None:
            A[number, : len(factors.A)] = factors.A.to(A)
            B[number, :, : len(factors.A)] = (factors.B if trained else factors.B * factors.scaling).to(B)
            scale[number] = factors.scaling if trained else 1.0
    present = torch.tensor([factors is not None for factors in own])
    ranks = [0 if factors is None else len(factors.A) for factors in own]
    return LoraStack(A, B, scale, present, ranks, trained=trained)


def new_stack(num_experts: int, weight: Tensor, rank: int, alpha: float, *, same_start: bool) -> LoraStack:
    """Make new experts of a layer as PEFT starts LoRA: A uniform in +-1/sqrt(in), B zero.

    Args:
        num_experts: E.
        weight: The layer's weight (out, in).
        rank: Of each expert.
        alpha: LoRA's alpha.
        same_start: Give all experts the same A, so that their factors can be compared later, as clustering does.
            Else each gets its own, which skills that are mixed need.
    """
    A = weight.new_empty(1 if same_start else num_experts, rank, weight.shape[1], dtype=torch.float32)
    for one in A:
        nn.init.kaiming_uniform_(one, a=math.sqrt(5))
    A = A.expand(num_experts, -1, -1).clone()
    B = A.new_zeros(num_experts, weight.shape[0], rank)
    present = torch.ones(num_experts, dtype=torch.bool)
    scale = torch.full((num_experts,), alpha / rank)
    return LoraStack(A, B, scale, present, [rank] * num_experts, trained=True)
