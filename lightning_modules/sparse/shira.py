"""Conversion between our sparse adapter folders and those of PEFT's SHiRA (arXiv 2406.13175)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_modules.adapter_tokenizer import copy_tokenizer
from lightning_modules.checksums import check_checksums, write_checksums
from lightning_modules.files import UNREADABLE, complete_folder
from lightning_modules.sparse.delta import SparseDelta
from lightning_modules.sparse.storage import (
    CONFIG,
    TENSORS,
    SparseFolder,
    check_delta,
    fingerprint,
    read_json,
    write_sparse,
)

_PREFIX, _WEIGHT, _INDICES = "base_model.model.", ".shira_weight", ".shira_indices"


def export_shira(folder: str | Path, output: str | Path) -> None:
    """Write a sparse adapter as a PEFT SHiRA adapter.

    SHiRA has r x (rows + columns) entries in each matrix. The smallest r that holds every matrix is taken, and
    free places are filled with zeros at entries that are not trained.

    Args:
        folder: A sparse adapter.
        output: The folder to make.

    Raises:
        ValueError: If a weight is no matrix, or its entries do not fit: r x (rows + columns) may not exceed
            rows x columns.
    """
    source = SparseFolder(folder)
    deltas = {name: source.delta(name) for name in source.names}
    rank = max((_rank(delta) for delta in deltas.values()), default=1)
    tensors: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        rows, columns = delta.shape or (0, 0)
        count = rank * (rows + columns)
        if count > rows * columns:
            raise ValueError(
                f"{source.folder}: r={rank} needs {count} entries in {name}, which has {rows * columns}. SHiRA "
                "cannot hold adapters this dense; export a merged model instead."
            )
        indices, values = _padded(delta, count)
        module = _PREFIX + name.removesuffix(".weight")
        tensors[module + _WEIGHT] = values
        tensors[module + _INDICES] = torch.stack([indices // columns, indices % columns]).int()
    config = {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.config.get("base_model_name_or_path"),
        "r": rank,
        "mask_type": "random",
        "target_modules": [name.removesuffix(".weight") for name in source.names],
        "inference_mode": True,
    }
    with complete_folder(Path(output)) as aside:
        save_file(tensors, aside / TENSORS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        copy_tokenizer(source.folder, aside)
        write_checksums(aside)


def import_shira(folder: str | Path, output: str | Path, model: nn.Module, base: str | None = None) -> None:
    """Write a PEFT SHiRA adapter as a sparse adapter of ours.

    Args:
        folder: A SHiRA adapter.
        output: The folder to make.
        model: The base model it was trained on, because the files of SHiRA name no shapes.
        base: Its name, where the adapter does not name it.

    Raises:
        ValueError: If `folder` is no SHiRA adapter, is broken, or does not fit `model`.
    """
    source = Path(folder)
    if not (source / CONFIG).is_file():
        raise ValueError(f"{source} is no adapter folder: it has no {CONFIG}.")
    check_checksums(source, (CONFIG, TENSORS))
    config: dict[str, Any] = read_json(source / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{source / CONFIG} describes no adapter.")
    if config.get("peft_type") != "SHIRA":
        raise ValueError(f"{source} is no SHiRA adapter: its peft_type is {config.get('peft_type')!r}.")
    try:
        tensors = load_file(source / TENSORS)
    except UNREADABLE as error:
        raise ValueError(f"{source / TENSORS} is missing, broken or cut off: {error}.") from error
    deltas = dict(_deltas(tensors, source / TENSORS, dict(model.named_parameters(remove_duplicate=False))))
    facts = {
        "base_model_name_or_path": config.get("base_model_name_or_path") or base,
        "fingerprint": {name: fingerprint(model.get_parameter(name)) for name in deltas},
    }
    with complete_folder(Path(output)) as aside:
        write_sparse(aside, deltas.items(), facts)
        copy_tokenizer(source, aside)
        write_checksums(aside)


def _deltas(
    tensors: dict[str, Tensor], file: Path, weights: dict[str, nn.Parameter]
) -> Iterator[tuple[str, SparseDelta]]:
    for key in sorted(tensors):
        if not key.endswith(_WEIGHT):
            continue
        module, values = key.removesuffix(_WEIGHT), tensors[key]
        name = module.removeprefix(_PREFIX) + ".weight"
        places = tensors.get(module + _INDICES)
        if places is None or places.shape != (2, len(values)):
            raise ValueError(f"{file}: {module} lacks shira_indices of shape (2, {len(values)}).")
        if name not in weights or weights[name].dim() != 2:
            raise ValueError(f"{file} changes {name}, which is no matrix of this base model.")
        users = [other for other, weight in weights.items() if weight is weights[name]]
        if len(users) > 1:
            raise ValueError(
                f"{file} changes {name}, which is one weight under the names {', '.join(users)}: in place it "
                "would change for all of them, in SHiRA it does not."
            )
        rows, columns = weights[name].shape
        row, column = places.long()
        if bool((places < 0).any()) or int(row.max()) >= rows or int(column.max()) >= columns:
            raise ValueError(f"{file}: {module}.shira_indices leave the matrix of {rows} x {columns}.")
        indices, order = (row * columns + column).sort()
        check_delta(f"{file}: {name}", indices, values[order], rows * columns)
        yield name, SparseDelta(indices.int(), values[order].float(), (rows, columns))


def _rank(delta: SparseDelta) -> int:
    if delta.shape is None or len(delta.shape) != 2:
        raise ValueError(f"SHiRA adapts matrices, not a weight of shape {delta.shape}.")
    return max(1, math.ceil(len(delta.indices) / sum(delta.shape)))


def _padded(delta: SparseDelta, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` positions and values: those of the delta, and zeros at positions that are free."""
    free = torch.ones(math.prod(delta.shape or ()), dtype=torch.bool)
    free[delta.indices.long()] = False
    spare = free.nonzero().flatten()[: count - len(delta.indices)]
    indices = torch.cat([delta.indices.long(), spare])
    return indices, torch.cat([delta.values, torch.zeros(len(spare))])
