"""A base model whose weights stay in their files until a rank takes its rows of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lightning_modules.files import UNREADABLE
from lightning_modules.sources import CHOOSING


def map_model(
    place: str, *, dtype: torch.dtype, attn_implementation: str, model_kwargs: Mapping[str, Any]
) -> nn.Module | None:
    """Build a model on the meta device and give it memory-mapped weights.

    Pages are read from the disk when they are touched and shared by the processes of a machine, so a rank that
    copies its rows needs no memory for the others'.

    Args:
        place: A hub id or a Hugging Face folder.
        dtype: What the weights shall be; mapped ones still have the type of their file. See `cast`.
        attn_implementation: Attention of transformers.
        model_kwargs: Further arguments of `from_pretrained`.

    Returns:
        The model, or None where its files are no safetensors under the names of its parameters, or an argument may
        change what is loaded. `from_pretrained` knows how to read those.

    Raises:
        OSError: If files are missing.
        ValueError: If a file is broken.
    """
    if model_kwargs.keys() - CHOOSING:  # others may change what is loaded
        return None
    folder = _local_folder(place, model_kwargs)
    config = AutoConfig.from_pretrained(place, **model_kwargs)
    if getattr(config, "quantization_config", None):
        return None
    trusted = {"trust_remote_code": bool(model_kwargs.get("trust_remote_code"))}
    with init_empty_weights(include_buffers=False):  # buffers, such as rotary frequencies, are computed
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation, **trusted
        )
    mapped: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, "pt") as opened:
                mapped |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except UNREADABLE as error:
            raise ValueError(f"{file} is broken or cut off: {error}. Download or copy it again.") from None
    expected = dict(model.named_parameters())
    if any(name not in mapped or mapped[name].shape != p.shape for name, p in expected.items()):
        tied = set(getattr(model, "_tied_weights_keys", None) or ())
        missing = [n for n, p in expected.items() if n not in mapped or mapped[n].shape != p.shape]
        if not config.get_text_config().tie_word_embeddings or set(missing) - tied:
            return None
    if any(name in mapped for name, _ in model.named_buffers()):
        return None  # buffers with content of their own
    if any(tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) for tensor in mapped.values()):
        return None
    for name, tensor in mapped.items():
        if name in expected:
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, nn.Parameter(tensor))
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(place, **model_kwargs)
    return model  # type: ignore[no-any-return]


def cast(parameters: Mapping[int, Any], dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """Return a function that gives the base weights inside a module their type.

    Args:
        parameters: By `id`, which parameters are base weights.
        dtype: Their type.
    """

    def change(module: nn.Module) -> None:
        for parameter in module.parameters():
            if id(parameter) in parameters and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)

    return change


def _weight_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` would read; others may lie beside them."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [file for file in (folder / "model.safetensors",) if file.is_file()]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is broken: {error}. Download or copy it again.") from None
    return [folder / Path(str(name)).name for name in sorted(names)]


def _local_folder(place: str, model_kwargs: Mapping[str, Any]) -> Path:
    folder = Path(place)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        kept = {
            key: value for key, value in model_kwargs.items() if key in ("revision", "token", "cache_dir")
        }
        folder = Path(snapshot_download(place, allow_patterns=["*.safetensors", "*.json"], **kept))
    return folder / str(model_kwargs.get("subfolder") or "")
