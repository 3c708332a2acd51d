"""Names of base models in adapter folders: how they are written, read, and told to be of one model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from lightning_modules.merging.reading import model_files, open_tensors, read_object
from lightning_modules.sources import check_model, converted_folder
from lightning_modules.sparse.storage import PEFT_TYPE, fingerprint

FACTS = "quiver.json"  # beside an adapter: what its own files have no place for

_SNAPSHOT = re.compile(r".*/models--([^/]+)/snapshots/[^/]+")


def name_base(
    config: Path, source: str, place: str | None = None, choice: Mapping[str, str] | None = None
) -> None:
    """Name the base model as the user did; PEFT writes where it was loaded from, a cache folder perhaps.

    A converted GGUF file has a name that Quiver alone reads. PEFT's `AutoPeftModelForCausalLM` needs the cache folder,
    so that goes into the configuration then, and the name into quiver.json, which Quiver reads first.

    Args:
        config: `adapter_config.json`; nothing is done where there is none.
        source: The base model, as in `model:` of a configuration.
        place: The folder or hub id that transformers loads, for a folder that PEFT reads.
        choice: Which version of it: `revision` goes into the configuration, where PEFT looks for it, and `subfolder`
            into quiver.json. See `written_choice`.
    """
    if not config.exists():
        return
    values = json.loads(config.read_text(encoding="utf-8"))
    converted = values.get("peft_type") != PEFT_TYPE and check_model(source).endswith(".gguf")
    values["base_model_name_or_path"] = place if place and converted else source
    facts = {"base": source} if place and converted else {}
    if choice and "revision" in choice:
        values["revision"] = choice["revision"]
    if choice and "subfolder" in choice:
        facts["subfolder"] = choice["subfolder"]
    config.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
    if facts:
        config.with_name(FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def base_choice(folder: Path) -> dict[str, str]:
    """Return which version of its base model an adapter names: `revision` and `subfolder`, where it has them.

    Args:
        folder: The adapter.
    """
    found = {}
    for file, key in (("adapter_config.json", "revision"), (FACTS, "subfolder")):
        value = read_object(folder / file).get(key) if (folder / file).is_file() else None
        if isinstance(value, str) and value:
            found[key] = value
    return found


def base_named(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the base model that an adapter names, as in `model:` of a configuration; None if it names none.

    Args:
        folder: The adapter.
        config: Its `adapter_config.json`.
    """
    said = read_object(folder / FACTS).get("base") if (folder / FACTS).is_file() else None
    return said if isinstance(said, str) and said else config.get("base_model_name_or_path") or None


def whereabouts(source: str) -> str:
    """Return what a base model's name stands for on this machine. Nothing is loaded or converted.

    Args:
        source: As in `model:` of a configuration.

    Returns:
        The same text for all names of one folder, one GGUF file (and the folder it is converted into), or one hub id
        (and the folder of the hub's cache); other names as they are.
    """
    path = Path(source).expanduser()
    try:
        place = check_model(source)
    except ValueError:  # a folder that lacks something, or not of this machine
        place = source
    if place.endswith(".gguf") and Path(place).is_file():
        path = converted_folder(Path(place))
    elif not path.exists():
        return source
    path = path.resolve()
    if found := _SNAPSHOT.fullmatch(str(path)):
        return found[1].replace("--", "/")
    return str(path)


def base_fingerprints(source: str | None, names: Iterable[str]) -> dict[str, str]:
    """Hash weights of a base model that is on this machine, without loading it.

    Args:
        source: As in `model:` of a configuration.
        names: Of weights.

    Returns:
        Name to hash, of those that are found.
    """
    if source is None:
        return {}
    folder = Path(whereabouts(source))
    if not folder.is_dir():
        cached = (
            try_to_load_from_cache(source, "config.json")
            if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)
            else None
        )
        if not isinstance(cached, str):
            return {}
        folder = Path(cached).parent
    try:
        files = model_files(folder)
        opened = {
            file: open_tensors(folder / file) for file in {files[name] for name in names if name in files}
        }
    except ValueError:  # weights of another form, which cannot be read by name
        return {}
    return {name: fingerprint(opened[files[name]].get_tensor(name)) for name in names if name in files}
