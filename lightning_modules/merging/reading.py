"""Opens the files of experts, with errors that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from lightning_modules.files import UNREADABLE
from lightning_modules.sparse.storage import read_json

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


def model_files(folder: Path) -> dict[str, str]:
    """Tell which file of a model holds which tensor.

    Args:
        folder: A Hugging Face model.

    Returns:
        Name of the tensor to name of the file.

    Raises:
        ValueError: If weights are missing.
    """
    if (folder / INDEX).is_file():
        files = read_object(folder / INDEX).get("weight_map")
        if not isinstance(files, dict):
            raise ValueError(f"{folder / INDEX} has no weight_map. Save the model again.")
        for file in files.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(
                    f"{folder / INDEX} names {file!r}, which is no file in this folder. Copy it again."
                )
        return files
    if not (folder / MODEL).is_file():
        raise ValueError(
            f"experts: {folder} has a config.json, but no weights: neither {MODEL} nor {INDEX}. Save the "
            "model with save_pretrained."
        )
    return dict.fromkeys(open_tensors(folder / MODEL).keys(), MODEL)


def open_tensors(file: Path) -> Any:
    """Open a safetensors file.

    Raises:
        ValueError: If it is missing, broken or cut off.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing. Save the expert as safetensors, or copy the whole folder.")
    try:
        return safe_open(file, "pt")
    except UNREADABLE as error:
        raise ValueError(f"{file} is broken or cut off: {error}. Save or copy it again.") from error


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: If the file holds something else.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object.")
    return content
