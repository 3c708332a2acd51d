"""Folders as experts: sparse adapters, LoRA adapters of PEFT, and fully fine-tuned models, read lazily."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_modules.merging.lora import lora_delta
from lightning_modules.merging.vectors import Delta
from lightning_modules.sparse.storage import PEFT_TYPE, SparseFolder

_ADAPTER = "adapter_model.safetensors"
_MODEL, _INDEX = "model.safetensors", "model.safetensors.index.json"
_COPY = ".base_layer.weight"  # PEFT adds the frozen weight of a head that has factors
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"
# Settings under which B A x scaling is not all that a LoRA adapter changes, or not always.
_BEYOND_LORA = (
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # the others change the base weights too


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


class SparseExpert(Expert):
    """A sparse adapter, as `write_sparse` writes it."""

    is_sparse = True

    def __init__(self, folder: Path) -> None:
        self._file = SparseFolder(folder)
        super().__init__(folder, self._file.config.get("base_model_name_or_path") or None)

    def fit(self, model: nn.Module) -> None:
        """Check shapes and fingerprints."""
        self._file.check_base(model)
        self.names = self._file.names

    def delta(self, name: str) -> Delta:
        """Read one sparse delta."""
        return self._file.delta(name)


class LoraExpert(Expert):
    """A LoRA adapter of PEFT: plain LoRA or rsLoRA of linear layers."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        super().__init__(folder, config.get("base_model_name_or_path") or None)
        _refuse_beyond_lora(folder, config)
        self._config = config
        self._tensors = _open(folder / _ADAPTER)
        keys = set(self._tensors.keys())
        self._keys: dict[str, str] = {}
        self._transposed: set[str] = set()
        for key in sorted(keys):
            stem = key.removesuffix(_LORA_A)
            if stem != key and stem + _LORA_B in keys:
                self._keys[stem.removeprefix("base_model.model.") + ".weight"] = stem
            elif key.endswith(_COPY):
                continue
            elif not (key.endswith(_LORA_B) and key.removesuffix(_LORA_B) + _LORA_A in keys):
                raise ValueError(
                    f"{folder / _ADAPTER} holds {key}, which is no pair of LoRA factors of a linear layer. "
                    "Merge that adapter into its base model with quiver export and give the model's folder."
                )

    def fit(self, model: nn.Module) -> None:
        """Check names and shapes. A LoRA on one of two tied layers is refused: the other would change too."""
        from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, whose weight is (in, out)

        weights = dict(model.named_parameters(remove_duplicate=False))
        for name, stem in self._keys.items():
            _check_known(self.folder, name, weights)
            rows = self._tensors.get_slice(stem + _LORA_B).get_shape()[0]
            columns = self._tensors.get_slice(stem + _LORA_A).get_shape()[1]
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
        self.names = list(self._keys)

    def delta(self, name: str) -> Tensor:
        """Multiply the factors of one weight; patterns are resolved as PEFT does."""
        from peft.utils.other import get_pattern_key

        stem = self._keys[name]
        A, B = self._tensors.get_tensor(stem + _LORA_A), self._tensors.get_tensor(stem + _LORA_B)
        alphas = self._config.get("alpha_pattern") or {}
        module = name.removesuffix(".weight")
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), self._config["lora_alpha"])
        change = lora_delta(A, B, alpha, A.shape[0], bool(self._config.get("use_rslora")))
        if name in self._transposed:
            change = change.T
        return _finite(change, f"{self.folder / _ADAPTER}: {name}")


class ModelExpert(Expert):
    """A fully fine-tuned model; what it adds is its weight minus the base's."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, None)
        self._files = _model_files(folder)
        opened = {file: _open(folder / file) for file in sorted(set(self._files.values()))}
        self._tensors = {name: opened[file] for name, file in self._files.items()}
        held = {file: set(tensors.keys()) for file, tensors in opened.items()}
        for name, file in self._files.items():
            if name not in held[file]:
                raise ValueError(f"{folder / file} lacks {name}, which {_INDEX} promises. Copy it again.")
        self._base: Mapping[str, Tensor] = {}

    def fit(self, model: nn.Module) -> None:
        """Check names and shapes; the base weights are read at `delta`."""
        weights = dict(model.named_parameters())
        aliases = dict(model.named_parameters(remove_duplicate=False))
        for name, weight in weights.items():
            if name not in self._tensors:
                raise ValueError(f"{self.folder} lacks {name} of the base model. It is another architecture.")
            _check_shape(self.folder, name, tuple(self._tensors[name].get_slice(name).get_shape()), weights)
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
        return _finite(change, f"{self.folder / self._files[name]}: {name}")

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
        config = _read_json(path / "adapter_config.json")
        kind = config.get("peft_type")
        if kind == PEFT_TYPE:
            return SparseExpert(path)
        if kind == "LORA":
            return LoraExpert(path, config)
        raise ValueError(
            f"experts: {path} holds an adapter of kind {kind}. Sparse and LoRA adapters can be merged; any "
            "other one after quiver export, as a model."
        )
    if (path / "config.json").is_file():
        return ModelExpert(path)
    present = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
    raise ValueError(
        f"experts: {path} is no expert: it holds {present}. Expected adapter_config.json with {_ADAPTER}, or "
        f"config.json with {_MODEL}."
    )


def _refuse_beyond_lora(folder: Path, config: Mapping[str, Any]) -> None:
    settings = [f"{name}={config[name]!r}" for name in _BEYOND_LORA if config.get(name)]
    if config.get("bias", "none") != "none":
        settings.append(f"bias={config['bias']!r}")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        settings.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if settings:
        raise ValueError(
            f"{folder} was trained with {', '.join(settings)}, so it changes more than LoRA factors say. "
            "Merge it into its base model with quiver export and give the model's folder as the expert."
        )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise ValueError(f"{folder / 'adapter_config.json'} names no lora_alpha. Save the adapter again.")


def _model_files(folder: Path) -> dict[str, str]:
    """Which file holds which tensor."""
    if (folder / _INDEX).is_file():
        files = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(files, dict):
            raise ValueError(f"{folder / _INDEX} has no weight_map. Save the model again.")
        return files
    if not (folder / _MODEL).is_file():
        raise ValueError(
            f"experts: {folder} has a config.json, but no weights: neither {_MODEL} nor {_INDEX}. Save the "
            "model with save_pretrained."
        )
    return dict.fromkeys(_open(folder / _MODEL).keys(), _MODEL)


def _open(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file} is missing. Save the expert as safetensors, or copy the whole folder.")
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is broken or cut off: {error}. Save or copy it again.") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object.")
    return content


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


def _finite(change: Tensor, what: str) -> Tensor:
    if not bool(change.isfinite().all()):
        raise ValueError(f"{what}: {int((~change.isfinite()).sum())} values are NaN or infinite.")
    return change
