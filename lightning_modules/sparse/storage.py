"""Sparse adapter folders: `adapter_config.json` and `adapter_model.safetensors`, 8 bytes a trained weight."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_modules.checksums import check_checksums
from lightning_modules.files import UNREADABLE
from lightning_modules.sharding import entries_at
from lightning_modules.sparse.delta import SparseDelta, check_indices

PEFT_TYPE = "QUIVER_SPARSE"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_VALUES, _INDICES = ".values", ".indices"
_SAMPLE = 256


def write_sparse(folder: Path, deltas: Iterable[tuple[str, SparseDelta]], config: Mapping[str, Any]) -> None:
    """Write a sparse adapter into an existing folder.

    Args:
        folder: Where to write.
        deltas: Parameter name and change of each weight; shapes are needed.
        config: What else `adapter_config.json` shall hold, such as `base_model_name_or_path` and
            `fingerprint`.

    Raises:
        ValueError: If indices are not sorted or out of range, values are not finite, or a shape is missing.
    """
    tensors: dict[str, Tensor] = {}
    shapes = {}
    for name, delta in deltas:
        if delta.shape is None:
            raise ValueError(f"{name}: a sparse adapter on disk needs the shape of the weight.")
        check_delta(name, delta.indices, delta.values, math.prod(delta.shape))
        shapes[name] = list(delta.shape)
        tensors[name + _VALUES] = delta.values.detach().float().cpu().contiguous()
        tensors[name + _INDICES] = delta.indices.detach().int().cpu().contiguous()
    text = json.dumps({**config, "peft_type": PEFT_TYPE, "shapes": shapes}, indent=2, sort_keys=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(text, encoding="utf-8")


class SparseFolder:
    """A sparse adapter on disk, read weight by weight through a memory map.

    Args:
        folder: A folder that `write_sparse` made.

    Attributes:
        config: What `adapter_config.json` holds.
        names: Parameter names of the changed weights.

    Raises:
        ValueError: If a file is missing, broken or truncated, or the two do not belong together.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        check_checksums(self.folder, (CONFIG, TENSORS))
        self.config = _read_config(self.folder)
        path = self.folder / TENSORS
        if not path.is_file():
            raise ValueError(f"{path} is missing, so {self.folder} is no complete sparse adapter.")
        try:
            self._file: Any = safe_open(path, "pt")
            found = set(self._file.keys())  # type: ignore[no-untyped-call]
        except UNREADABLE as error:
            raise ValueError(f"{path} is broken or cut off: {error}. Export or copy it again.") from error
        self._shapes: dict[str, tuple[int, ...]] = {
            name: tuple(shape) for name, shape in self.config["shapes"].items()
        }
        self.names = list(self._shapes)
        expected = {name + suffix for name in self.names for suffix in (_VALUES, _INDICES)}
        if found != expected:
            raise ValueError(
                f"{path} does not belong to its {CONFIG}: missing {sorted(expected - found)[:3]}, unknown "
                f"{sorted(found - expected)[:3]}."
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        return self._shapes[name]

    def delta(self, name: str) -> SparseDelta:
        """Read the change of one weight.

        Args:
            name: One of `names`.

        Returns:
            Its change, indices int32.

        Raises:
            ValueError: If indices are out of range or not sorted, or values are missing or not finite.
        """
        values, indices = self._file.get_tensor(name + _VALUES), self._file.get_tensor(name + _INDICES)
        check_delta(f"{self.folder / TENSORS}: {name}", indices, values, math.prod(self.shape(name)))
        return SparseDelta(indices, values, self.shape(name))

    def check_base(self, model: nn.Module) -> None:
        """Check that a model is the base model that this adapter was trained on.

        Args:
            model: A transformers model without adapter.

        Raises:
            ValueError: If a weight is missing, of another shape, or of other numbers.
        """
        weights = dict(model.named_parameters(remove_duplicate=False))
        for name in self.names:
            if name not in weights:
                raise ValueError(
                    f"{self.folder} changes {name}, which this model does not have. {self._base()}"
                )
            if tuple(weights[name].shape) != self.shape(name):
                raise ValueError(
                    f"{self.folder} changes {name} of shape {self.shape(name)}; in this model it is "
                    f"{tuple(weights[name].shape)}. {self._base()}"
                )
            expected = (self.config.get("fingerprint") or {}).get(name)
            if expected is not None and fingerprint(weights[name]) != expected:
                raise ValueError(
                    f"{self.folder} was trained on other weights: {name} differs in this model. "
                    f"{self._base()}"
                )

    def _base(self) -> str:
        return f"Its base model is {self.config.get('base_model_name_or_path') or 'not named'}."


def check_delta(name: str, indices: Tensor, values: Tensor, size: int) -> None:
    """Check a change that came from outside.

    Args:
        name: Of file and weight, for messages.
        indices: (K).
        values: (K).
        size: Number of entries of the weight.

    Raises:
        ValueError: If indices are out of range or not sorted, or values are of another length or not finite.
    """
    check_indices(name, indices, size)
    if values.shape != indices.shape:
        raise ValueError(f"{name}: {values.numel()} values for {indices.numel()} indices.")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name}: {int((~values.isfinite()).sum())} values are NaN or infinite.")


def fingerprint(weight: Tensor) -> str:
    """Return a hash of evenly spaced entries of a weight, the same in float32 and bfloat16.

    Args:
        weight: Any shape; of a sharded one all ranks must ask.

    Returns:
        16 hexadecimal digits.
    """
    sample = entries_at(weight.detach(), _positions(weight.numel())).to("cpu", torch.bfloat16)
    return hashlib.sha256(sample.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


@lru_cache
def _positions(length: int) -> Tensor:
    # On the CPU also where Lightning makes everything elsewhere: they are kept, and hashes must not differ.
    return torch.linspace(0, length - 1, min(_SAMPLE, length), dtype=torch.float64, device="cpu").long()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: If it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:  # a number of 5000 digits, 5000 brackets, a folder
        raise ValueError(f"{path} is no JSON: {error}.") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no sparse adapter: it has no {CONFIG}.")
    config: dict[str, Any] = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != PEFT_TYPE:
        raise ValueError(f"{path} describes no sparse adapter: its peft_type is not {PEFT_TYPE}.")
    if not isinstance(config.get("base_model_name_or_path") or "", str):
        raise ValueError(f"{path}: base_model_name_or_path is no name.")
    if not isinstance(config.get("fingerprint") or {}, dict):
        raise ValueError(f"{path}: fingerprint names no weights. Export the adapter again.")
    shapes = config.get("shapes")
    if not isinstance(shapes, dict) or not all(map(_is_shape, shapes.values())):
        raise ValueError(f"{path} names no shapes. Export the adapter again.")
    return config


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(side) is int and side >= 0 for side in value)
