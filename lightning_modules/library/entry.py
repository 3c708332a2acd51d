"""AdapterEntry: one expert of a library, as its index knows it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning_modules.base_names import FACTS
from lightning_modules.checksums import checksum
from lightning_modules.merging.experts import Expert, open_expert
from lightning_modules.merging.reading import read_object

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class AdapterEntry:
    """An expert.

    Attributes:
        name: In its library.
        folder: Where it is.
        kind: `lora` or `sparse`.
        tasks: What it was trained on.
        metrics: What it reached.
        base: The base model that it names; None if it names none.
        rank: The largest rank; 0 for sparse adapters.
        parameters: Number of trained values.
        checksums: SHA-256 of each file.
        lineage: Names of what it came from.
        added: When, ISO 8601, UTC.
    """

    name: str
    folder: Path
    kind: Literal["lora", "sparse"]
    tasks: tuple[str, ...]
    metrics: Mapping[str, float]
    base: str | None
    rank: int
    parameters: int
    checksums: Mapping[str, str]
    lineage: tuple[str, ...]
    added: str

    def open(self) -> Expert:
        """Open the adapter; its weights are read when they are asked for.

        Raises:
            ValueError: If a file is missing, broken, or not what was added.
        """
        if self.folder.is_symlink():
            raise ValueError(
                f"{self.folder} is a link. Remove {self.name!r} from the library and add it again."
            )
        for file, expected in self.checksums.items():
            path = self.folder / file
            if path.is_symlink() or not path.is_file():
                raise ValueError(
                    f"{path} is missing. Remove {self.name!r} from the library and add it again."
                )
            if checksum(path) != expected:
                raise ValueError(
                    f"{path} has changed since it was added. Remove {self.name!r} from the library and add it again."
                )
        return open_expert(str(self.folder))

    @cached_property
    def fingerprint(self) -> Mapping[str, str]:
        """Hash of each base weight that it changes; may be empty.

        Raises:
            ValueError: If the file that holds it is broken.
        """
        found = read_object(self.folder / FACTS).get("fingerprint")
        if not isinstance(found, dict):
            raise ValueError(f"{self.folder / FACTS} holds no fingerprint. Add the adapter again.")
        return found

    def as_json(self) -> dict[str, Any]:
        """Return what the index keeps."""
        names = [field.name for field in fields(self) if field.name not in ("name", "folder")]
        return {name: getattr(self, name) for name in names}


def check_name(name: str) -> str:
    """Check a name before it becomes a folder.

    Raises:
        ValueError: If it is empty, too long, or holds anything but letters, digits, dot, dash and underscore.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"name={name!r}: an expert's name has 1 to 100 letters, digits, '_', '-' and '.', and does not begin "
            "with '-' or '.'. Choose another one with --name; translation_en-de is fine."
        )
    return name
