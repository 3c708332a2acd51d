"""What a merge can write: a model, a sparse adapter, or a LoRA adapter. Changes arrive one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_modules.finite import finite
from lightning_modules.merging.lora import as_lora
from lightning_modules.rounding import Rounding, name_of, rounding
from lightning_modules.sparse.delta import SparseDelta, write_entries
from lightning_modules.sparse.storage import fingerprint, write_sparse

# Name and change of each parameter, shaped.
Changes = Iterable[tuple[str, Tensor | SparseDelta]]


@torch.no_grad()
def write_model(folder: Path, changes: Changes, model: Any, *, dtype: torch.dtype) -> str:
    """Add changes to a model in place and write it.

    Args:
        folder: An existing folder.
        changes: What is added, in float32.
        model: A transformers model in float32.
        dtype: Of the file.

    Returns:
        Sentences: the share of the norm of all changes that the type keeps, and a warning where it is small.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    found = Rounding()
    for name, change in changes:
        weight = weights[name]
        if isinstance(change, SparseDelta):
            entries = weight.view(-1).index_select(0, change.indices)
            found += rounding(entries, change.values, dtype)
            write_entries(weight, change.indices, entries + change.values)
        else:
            found += rounding(weight, change, dtype)
            weight.add_(change)
        finite(weight, f"{name}, merged")
    model.to(dtype).save_pretrained(folder)
    return _kept(found, dtype)


def _kept(found: Rounding, dtype: torch.dtype) -> str:
    name = name_of(dtype)
    said = f"{name} keeps {found.share:.1%} of the norm of the change (relative error {found.error:.2g})."
    if found.suffices:
        return said
    remedy = (
        "Write the model with --dtype float32, or an adapter with --to sparse or --to lora."
        if dtype != torch.float32
        else "The change is far smaller than the weights: write an adapter with --to sparse or --to lora."
    )
    return f"{said}\nWarning: the rest is rounded away, so the model is not the merge that was asked for. {remedy}"


def write_sparse_adapter(folder: Path, changes: Changes, model: nn.Module, *, source: str) -> str:
    """Write changes as a sparse adapter.

    Args:
        folder: An existing folder.
        changes: Sparse deltas.
        model: The base model, for the fingerprints of its weights.
        source: The base model's name.

    Returns:
        What there is to say about it: nothing.

    Raises:
        ValueError: If a change is dense.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    fingerprints: dict[str, str] = {}

    def checked() -> Iterator[tuple[str, SparseDelta]]:
        for name, change in changes:
            if not isinstance(change, SparseDelta):
                raise ValueError(
                    f"to='sparse': the method's result for {name} is dense. Take --to model or --to lora, or "
                    "a method that merges sparse experts entry by entry, such as overlap_average."
                )
            fingerprints[name] = fingerprint(weights[name])
            yield name, change

    # Read before the configuration is written: the fingerprints come with them.
    deltas = list(checked())
    write_sparse(folder, deltas, {"base_model_name_or_path": source, "fingerprint": fingerprints})
    return ""


def write_lora(folder: Path, changes: Changes, model: nn.Module, *, source: str, rank: int) -> str:
    """Write the best approximation of changes by LoRA factors, as a PEFT folder with alpha = rank.

    Args:
        folder: An existing folder.
        changes: What is added; parameters of linear layers, or zeros.
        model: The base model.
        source: The base model's name.
        rank: Of all factors.

    Returns:
        A sentence: the share of the squared norm of all changes that the factors hold.

    Raises:
        ValueError: If another parameter than that of a linear layer changes, or none at all.
    """
    from peft import LoraConfig, TaskType
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, whose weight is (in, out)

    tensors: dict[str, Tensor] = {}
    modules, transposed = [], False
    whole = lost = 0.0
    for name, change in changes:
        delta = change.dense() if isinstance(change, SparseDelta) else change
        if not bool(delta.any()):
            continue
        module_name = name.removesuffix(".weight")
        module = model.get_submodule(module_name) if module_name != name else None
        if not isinstance(module, nn.Linear | Conv1D):
            raise ValueError(
                f"to='lora': the merge changes {name}, which belongs to no linear layer. Take --to model."
            )
        if isinstance(module, Conv1D):
            delta, transposed = delta.T, True
        A, B = (finite(factor, f"{name}, as LoRA") for factor in as_lora(delta, rank))
        whole += float(delta.square().sum())
        lost += float((delta - B @ A).square().sum())
        modules.append(module_name)
        tensors[f"base_model.model.{module_name}.lora_A.weight"] = A
        tensors[f"base_model.model.{module_name}.lora_B.weight"] = B
    if not modules:
        raise ValueError("to='lora': the merge changes nothing, and PEFT loads no empty adapter.")
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=source,
        r=rank,
        lora_alpha=rank,
        target_modules=modules,
        fan_in_fan_out=transposed,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return f"Rank {rank} holds {1 - lost / whole:.1%} of the squared norm of the change."
