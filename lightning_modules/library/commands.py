"""`quiver library add|remove|list|show|verify|push|pull`."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_modules.base_names import FACTS
from lightning_modules.library.entry import AdapterEntry
from lightning_modules.library.hub import pull, push, resolve_adapter
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.merging.reading import read_object


def add_adapters(
    library: str,
    adapters: list[str],
    name: str | None = None,
    tasks: list[str] | None = None,
    base: str | None = None,
    share_tasks: bool = False,
) -> None:
    """Copy adapters into a library, which is made if it is not there.

    Args:
        library: The folder of the library.
        adapters: Folders or hub ids of LoRA adapters of PEFT, or folders of sparse adapters.
        name: The name of a single adapter in the library; by default that of its folder.
        tasks: What it was trained on, if its quiver.json does not say.
        base: The base model, as in `model:` of a configuration; by default what the adapters name.
        share_tasks: Take an adapter for a task that an expert of the library has already.

    Raises:
        ValueError: If a name or a task is taken, or an adapter is broken or of another base model.
    """
    if name is not None and len(adapters) > 1:
        raise ValueError(
            f"name={name!r} is for one adapter, and there are {len(adapters)}. Add them one by one."
        )
    store = AdapterLibrary(library, create=True)
    folders = [resolve_adapter(adapter) for adapter in adapters]
    if not share_tasks:
        for folder in folders:
            _check_tasks(store, folder, tasks)
    for adapter, folder in zip(adapters, folders, strict=True):
        entry = store.add(folder, name or Path(adapter).name, tasks=tasks, base=base)
        print(f"Added {entry.name}: {_kind(entry)}, tasks {', '.join(entry.tasks) or '-'}")  # noqa: T201
        others = sorted(
            {one.name for one in store.values() if set(one.tasks) & set(entry.tasks)} - {entry.name}
        )
        if others:
            print(f"Its tasks are shared with {_some(tuple(others))}: to route by task, choose with experts:")  # noqa: T201


def _check_tasks(store: AdapterLibrary, folder: Path, tasks: list[str] | None) -> None:
    """Check that no expert has a task of an adapter that is to be added."""
    if tasks is None:
        said = read_object(folder / FACTS).get("tasks") if (folder / FACTS).is_file() else None
        tasks = said if isinstance(said, list) else []
    for entry in store.values():
        if taken := [task for task in tasks if task in entry.tasks]:
            raise ValueError(
                f"{folder} is for the task {taken[0]!r}, for which the library {store.root} has the expert "
                f"{entry.name!r} already, and routing by task takes one. Keep both with --share_tasks, name other "
                f"tasks with --tasks, or remove the old one: quiver library remove {store.root} {entry.name}"
            )


def remove_adapters(library: str, names: list[str]) -> None:
    """Take experts out of a library.

    Args:
        library: The folder of the library.
        names: The experts.

    Raises:
        ValueError: If there is no expert of a name; none is removed then.
    """
    store = AdapterLibrary(library)
    for name in names:
        if name not in store:
            raise ValueError(f"The library {library} has no expert {name!r}. quiver library list shows all.")
    for name in names:
        store.remove(name)
        print(f"Removed {name}")  # noqa: T201


def list_adapters(library: str, as_json: bool = False) -> None:
    """List the experts of a library.

    Args:
        library: The folder of the library.
        as_json: Print one JSON object per expert.
    """
    store = AdapterLibrary(library)
    if as_json:
        for entry in store.values():
            print(json.dumps({"name": entry.name, **entry.as_json()}))  # noqa: T201
        return
    if not len(store):
        print(f"The library {library} is empty. quiver library add {library} FOLDER puts an adapter in.")  # noqa: T201
        return
    rows = [("name", "kind", "parameters", "tasks", "metrics")]
    for entry in store.values():
        metrics = " ".join(f"{key}={value:.3g}" for key, value in sorted(entry.metrics.items())[:3])
        rows.append((entry.name, _kind(entry), f"{entry.parameters:,}", _some(entry.tasks), metrics or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    print("\n".join(lines))  # noqa: T201
    print(f"{len(store)} experts of {next(iter(store.values())).base}")  # noqa: T201


def show_adapter(library: str, name: str) -> None:
    """Show all that a library knows of an expert.

    Args:
        library: The folder of the library.
        name: The expert.

    Raises:
        ValueError: If there is none of this name.
    """
    store = AdapterLibrary(library)
    if name not in store:
        raise ValueError(f"The library {library} has no expert {name!r}. quiver library list shows all.")
    entry = store[name]
    print(json.dumps({"name": name, "folder": str(entry.folder), **entry.as_json()}, indent=1))  # noqa: T201


def verify_library(library: str) -> None:
    """Read every file of a library and compare checksums.

    Args:
        library: The folder of the library.

    Raises:
        ValueError: If something is missing, changed or left over, with a line for each.
    """
    store = AdapterLibrary(library)
    if problems := store.verify():
        raise ValueError("\n".join([f"{library} has {len(problems)} problems:", *problems]))
    print(f"{library}: {len(store)} experts, every file as it was added")  # noqa: T201


def push_library(library: str, repo: str, public: bool = False) -> None:
    """Upload a library to the Hugging Face hub.

    Args:
        library: The folder of the library.
        repo: `owner/name`; made if it is not there.
        public: Let everybody see a new one.
    """
    print(f"Uploaded to {push(AdapterLibrary(library), repo, private=not public)}")  # noqa: T201


def pull_library(repo: str, library: str, revision: str | None = None) -> None:
    """Download a library from the Hugging Face hub and check it.

    Args:
        repo: `owner/name`.
        library: The folder to make.
        revision: Branch, tag or commit.
    """
    store = pull(repo, Path(library), revision)
    print(f"{library}: {len(store)} experts")  # noqa: T201


def _kind(entry: AdapterEntry) -> str:
    return f"LoRA r={entry.rank}" if entry.kind == "lora" else "sparse"


def _some(tasks: tuple[str, ...]) -> str:
    shown = ", ".join(tasks[:3]) or "-"
    return shown if len(tasks) <= 3 else f"{shown} and {len(tasks) - 3} more"
