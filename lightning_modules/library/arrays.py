"""Files of arrays that can be made again: prototypes, spectra, mean activations."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_modules.files import UNREADABLE


def write_arrays(file: Path, arrays: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write arrays and their checksum.

    Args:
        file: Where to.
        arrays: By name.
        facts: What else the file shall tell.
    """
    held = {name: array.detach().cpu().contiguous() for name, array in arrays.items()}
    save_file(held, file, metadata={**facts, "sha256": _checksum(held)})


def read_arrays(file: Path) -> dict[str, Tensor] | None:
    """Read arrays, or return None where there are none, or not those that were written: they are made again."""
    try:
        with safe_open(file, "pt") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            expected = (opened.metadata() or {}).get("sha256")
    except (*UNREADABLE, ValueError, TypeError):
        return None
    return arrays if expected == _checksum(arrays) else None


def _checksum(arrays: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
