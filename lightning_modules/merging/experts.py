"""Folders as experts: sparse adapters, LoRA adapters of PEFT, and fully fine-tuned models, read lazily."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_modules.base_names import base_named
from lightning_modules.checksums import check_checksums
from lightning_modules.finite import finite
from lightning_modules.merging.lora import LoraFactors
from lightning_modules.merging.lora_config import check_lora_config
from lightning_modules.merging.reading import (
    INDEX,
    MODEL,
    model_files,
    open_tensors,
    read_object,
)
from lightning_modules.merging.vectors import Delta
from lightning_modules.sparse.storage import PEFT_TYPE, SparseFolder

_ADAPTER = "adapter_model.safetensors"
_COPY = ".base_layer.weight"  # PEFT adds the frozen weight of a head that has factors
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"


class Expert(ABC):
    """A folder that changes some weights of a base model.

    Attributes:
        folder: Where it is.
        base: The base model that it names, as in `model:` of a configuration; None if it names none.
        is_sparse: Whether its changes are sparse deltas.
    """

    is_sparse = False

    def __init__(self, folder: Path, base: str | None) -> None:
        self.folder = folder
        self.base = base
        self.names: list[str] = []

    @abstractmethod
    def fit(self, model: nn.Module) -> None:
        """Check that it belongs to this base model, set `names`, and remember what `delta` needs.

        Args:
            model: The base model, a transformers model without adapter.

        Raises:
            ValueError: If a weight is missing or of another shape, or the model is another base.
        """

    @abstractmethod
    def delta(self, name: str) -> Delta:
        """Read what it adds to one of `names`.

        Raises:
            ValueError: If values are not finite.
        """

    def factors(self, name: str) -> LoraFactors:
        """Read the LoRA factors of one of `names`.

        Raises:
            ValueError: If it has none.
        """
        raise ValueError(f"{self.folder} has no LoRA factors of {name}. Take a method that merges changes.")


class SparseExpert(Expert):
    """A sparse adapter, as `write_sparse` writes it."""

    is_sparse = True

    def __init__(self, folder: Path) -> None:
        self._file = SparseFolder(folder)
        super().__init__(folder, self._file.config.get("base_model_name_or_path") or None)
        if not self._file.names:
            raise ValueError(f"experts: {folder} changes nothing: it names no weights.")
        self.names = list(self._file.names)
        self._own = {name: name for name in self.names}

    def inspect(self) -> tuple[dict[str, tuple[int, ...]], dict[str, str], int]:
        """Read everything once, without a base model.

        Returns:
            The shape and the fingerprint of each changed weight, as the adapter names it, and the number of values.

        Raises:
            ValueError: If indices or values make no sense.
        """
        size = sum(self._file.delta(name).values.numel() for name in self._file.names)
        shapes = {name: self._file.shape(name) for name in self._file.names}
        return shapes, self._file.config.get("fingerprint") or {}, size

    def fit(self, model: nn.Module) -> None:
        """Check shapes and fingerprints."""
        self._file.check_base(model)
        # A tied weight has several names; experts may use different ones.
        first = {id(weight): name for name, weight in model.named_parameters()}
        self._own = {first[id(model.get_parameter(name))]: name for name in self._file.names}
        if len(self._own) < len(self._file.names):
            raise ValueError(f"{self.folder} changes one tied weight under several names. Export it again.")
        self.names = list(self._own)

    def delta(self, name: str) -> Delta:
        """Read one sparse delta."""
        return self._file.delta(self._own[name])


class LoraExpert(Expert):
    """A LoRA adapter of PEFT: plain LoRA or rsLoRA of linear layers."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        check_lora_config(folder, config)
        super().__init__(folder, base_named(folder, config))
        self._config = config
        self._tensors = open_tensors(folder / _ADAPTER)
        keys = set(self._tensors.keys())
        if not keys:
            raise ValueError(f"experts: {folder / _ADAPTER} changes nothing: it holds no tensors.")
        self._keys: dict[str, str] = {}
        self._copies: dict[str, str] = {}
        self._transposed: set[str] = set()
        for key in sorted(keys):
            stem = key.removesuffix(_LORA_A)
            if stem != key and stem + _LORA_B in keys:
                self._keys[stem.removeprefix("base_model.model.") + ".weight"] = stem
            elif key.endswith(_COPY):
                self._copies[key.removeprefix("base_model.model.").removesuffix(_COPY) + ".weight"] = key
            elif not (key.endswith(_LORA_B) and key.removesuffix(_LORA_B) + _LORA_A in keys):
                raise ValueError(
                    f"{folder / _ADAPTER} holds {key}, which is no pair of LoRA factors of a linear layer. "
                    "Merge that adapter into its base model with quiver export and give the model's folder."
                )
        self.names = list(self._keys)

    def inspect(self) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        """Read everything once, without a base model.

        Returns:
            The shape (out, in) and the rank of each changed weight.

        Raises:
            ValueError: If two factors do not belong together, or a value is not finite.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        ranks: dict[str, int] = {}
        for name in self._keys:
            A, B, scaling = self._factors(name)
            where = f"{self.folder / _ADAPTER}: {name}"
            if not math.isfinite(scaling):
                raise ValueError(f"{where}: alpha / r is {scaling}. Save the adapter again.")
            for factor in (A, B):
                finite(factor, where)
            finite(B * scaling, f"{where}: B x alpha / r, with alpha {scaling * len(A):g}")
            shapes[name], ranks[name] = (len(B), A.shape[1]), len(A)
        return shapes, ranks

    def fit(self, model: nn.Module) -> None:
        """Check names and shapes. A LoRA on one of two tied layers is refused: the other would change too."""
        from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, whose weight is (in, out)

        weights = dict(model.named_parameters(remove_duplicate=False))
        for name in self._keys:
            _check_known(self.folder, name, weights)
            (_, columns), (rows, _) = self._shapes(name)
            if isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D):
                self._transposed.add(name)
            shape = (columns, rows) if name in self._transposed else (rows, columns)
            _check_shape(self.folder, name, shape, weights)
            users = [other for other, weight in weights.items() if weight is weights[name]]
            if len(users) > 1:
                raise ValueError(
                    f"{self.folder} changes {name}, which is one weight under the names {', '.join(users)}; "
                    "merged, it would change for all of them. Train the adapter without that layer."
                )
        for name, key in self._copies.items():
            _check_known(self.folder, name, weights)
            copy = self._tensors.get_tensor(key)
            if not copy.equal(weights[name].to(copy.dtype)):
                raise ValueError(
                    f"{self.folder} was trained on another {name} than the base model's, and holds it. Give its own "
                    "base, or merge it into its base model with quiver export and give the model's folder."
                )
        self.names = list(self._keys)

    def delta(self, name: str) -> Tensor:
        """Multiply the factors of one weight."""
        factors = self._factors(name)
        change = factors.B @ factors.A * factors.scaling
        if name in self._transposed:
            change = change.T
        return finite(change, f"{self.folder / _ADAPTER}: {name}")

    def factors(self, name: str) -> LoraFactors:
        """Read the factors of one weight, which is no layer of the kind of GPT-2, whose weight is transposed."""
        return super().factors(name) if name in self._transposed else self._factors(name)

    def _factors(self, name: str) -> LoraFactors:
        """Read the factors of one weight; patterns are resolved as PEFT does."""
        from peft.utils.other import get_pattern_key

        self._shapes(name)
        stem = self._keys[name]
        A, B = self._tensors.get_tensor(stem + _LORA_A), self._tensors.get_tensor(stem + _LORA_B)
        alphas = self._config.get("alpha_pattern") or {}
        module = name.removesuffix(".weight")
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), self._config["lora_alpha"])
        rank = max(len(A), 1)
        scaling = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        return LoraFactors(A.float(), B.float(), scaling)

    def _shapes(self, name: str) -> tuple[list[int], list[int]]:
        """Return the shapes of A and B, checked."""
        A, B = (self._tensors.get_slice(self._keys[name] + side).get_shape() for side in (_LORA_A, _LORA_B))
        if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
            raise ValueError(
                f"{self.folder / _ADAPTER}: {name}: factors of shapes {tuple(A)} and {tuple(B)} do not match."
            )
        return A, B


class ModelExpert(Expert):
    """A fully fine-tuned model; what it adds is its weight minus the base's."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, None)
        check_checksums(folder, (INDEX, MODEL))
        self._files = model_files(folder)
        check_checksums(folder, set(self._files.values()) - {MODEL})
        opened = {file: open_tensors(folder / file) for file in sorted(set(self._files.values()))}
        self._tensors = {name: opened[file] for name, file in self._files.items()}
        held = {file: set(tensors.keys()) for file, tensors in opened.items()}
        for name, file in self._files.items():
            if name not in held[file]:
                raise ValueError(f"{folder / file} lacks {name}, which {INDEX} promises. Copy it again.")
        self._base: Mapping[str, Tensor] = {}

    def fit(self, model: nn.Module) -> None:
        """Check names and shapes; the base weights are read at `delta`."""
        weights = dict(model.named_parameters())
        aliases = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers())
        # Older files hold the frequencies of rotary positions, which are no weights.
        held = {name for name in self._tensors if not name.endswith("rotary_emb.inv_freq")}
        if unknown := sorted(held - aliases.keys() - buffers.keys()):
            raise ValueError(
                f"{self.folder} holds {unknown[0]}, which the base model does not have. It is another architecture."
            )
        for name, weight in weights.items():
            if name not in self._tensors:
                raise ValueError(f"{self.folder} lacks {name} of the base model. It is another architecture.")
            tensor = self._tensors[name].get_slice(name)
            if tensor.get_dtype() not in ("F64", "F32", "BF16", "F16"):
                raise ValueError(
                    f"{self.folder} holds {name} as {tensor.get_dtype()}, quantised. Give the model in bfloat16, "
                    "float16 or float32."
                )
            _check_shape(self.folder, name, tuple(tensor.get_shape()), weights)
            for alias in self._tensors.keys() & (aliases.keys() - weights.keys()):
                if aliases[alias] is weight and not self._read(alias).equal(self._read(name)):
                    raise ValueError(
                        f"{self.folder} holds {alias} apart from {name}; in the base model they are one. "
                        "Give a base model that does not tie them."
                    )
        self._base = weights
        self.names = list(weights)

    def delta(self, name: str) -> Tensor:
        """Subtract the base weight."""
        change = self._read(name).float() - self._base[name].detach().float()
        return finite(change, f"{self.folder / self._files[name]}: {name}")

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._tensors[name].get_tensor(name)
        return tensor


def open_expert(folder: str) -> Expert:
    """Open a folder as an expert, without reading its weights.

    Args:
        folder: A sparse adapter, a LoRA adapter of PEFT, or a Hugging Face model with safetensors.

    Returns:
        The expert; `fit` comes next.

    Raises:
        ValueError: If it is none of these, or a file is missing or broken.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"experts: there is no folder {folder!r} (looked for {path.absolute()}).")
    if (path / "adapter_config.json").is_file():
        check_checksums(path, ("adapter_config.json", _ADAPTER))
        config = read_object(path / "adapter_config.json")
        kind = config.get("peft_type")
        if kind == PEFT_TYPE:
            return SparseExpert(path)
        if kind == "LORA":
            return LoraExpert(path, config)
        raise ValueError(
            f"experts: {path} holds an adapter of kind {kind}. Sparse and LoRA adapters can be merged; a SHIRA "
            "one after quiver export --to sparse, any other one after quiver export, as a model."
        )
    if (path / "config.json").is_file():
        return ModelExpert(path)
    present = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
    raise ValueError(
        f"experts: {path} is no expert: it holds {present}. Expected adapter_config.json with {_ADAPTER}, or "
        f"config.json with {MODEL}."
    )


def _check_known(folder: Path, name: str, weights: Mapping[str, Tensor]) -> None:
    if name not in weights:
        raise ValueError(f"{folder} changes {name}, which the base model does not have. Give its own base.")


def _check_shape(folder: Path, name: str, shape: tuple[int, ...], weights: Mapping[str, Tensor]) -> None:
    expected = tuple(weights[name].shape)
    if shape != expected:
        raise ValueError(
            f"{folder} has {name} of shape {shape}; in the base model it is {expected}. Merge experts of one "
            "base model."
        )
