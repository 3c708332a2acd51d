"""Reads the index of a library, which may come from anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_modules.base_names import base_fingerprints, whereabouts
from lightning_modules.library.entry import AdapterEntry, check_name
from lightning_modules.library.inspect_adapter import FoundAdapter
from lightning_modules.merging.reading import read_object


@dataclass(frozen=True)
class Base:
    """The base model of a library, as far as its experts tell.

    Attributes:
        name: As the first expert names it.
        shapes: (out, in) of each weight that an expert changes.
        fingerprint: Hash of each, where one is known.
    """

    name: str | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    fingerprint: Mapping[str, str] = field(default_factory=dict)

    def with_adapter(self, found: FoundAdapter, where: str) -> Base:
        """Check that an adapter belongs to this base model, and note what it tells of it.

        Args:
            found: The adapter.
            where: What messages call it.

        Raises:
            ValueError: If a weight that both know has another shape or fingerprint, or the names differ and nothing
                shows that they are the same.
        """
        if not self.shapes:
            return Base(found.base, dict(found.shapes), dict(found.fingerprint))
        for weight in found.shapes.keys() & self.shapes.keys():
            if tuple(found.shapes[weight]) != tuple(self.shapes[weight]):
                raise ValueError(
                    f"{where} changes {weight} of shape {tuple(found.shapes[weight])}; in the library it is "
                    f"{tuple(self.shapes[weight])}. A library holds adapters of one base model."
                )
        known = found.fingerprint.keys() & self.fingerprint.keys()
        for weight in known:
            if found.fingerprint[weight] != self.fingerprint[weight]:
                raise ValueError(
                    f"{where} was trained on another base model: {weight} differs from that of the library's "
                    "experts. A library holds adapters of one base model."
                )
        if not known:
            self._check_name(found, where)
        return Base(self.name, {**self.shapes, **found.shapes}, {**self.fingerprint, **found.fingerprint})

    def _check_name(self, found: FoundAdapter, where: str) -> None:
        """Check that two names are of one model, by what they stand for here or else by its weights."""
        if found.base == self.name:
            return
        if found.base and self.name and whereabouts(found.base) == whereabouts(self.name):
            return
        theirs = {**base_fingerprints(found.base, found.shapes), **found.fingerprint}
        ours = {**base_fingerprints(self.name, found.shapes), **self.fingerprint}
        shared = theirs.keys() & ours.keys()
        if differing := sorted(weight for weight in shared if theirs[weight] != ours[weight]):
            raise ValueError(
                f"{where} was trained on another base model: {differing[0]} of {found.base} differs from that of "
                f"{self.name}, the base model of the library's experts."
            )
        if not shared:
            raise ValueError(
                f"{where} names the base model {found.base!r}, the library's experts {self.name!r}, and no "
                f"fingerprints can be compared. If they are the same, say so: --base {self.name}"
            )


def index_text(version: int, base: Base, entries: Mapping[str, AdapterEntry]) -> str:
    """Return what `index.json` holds.

    Args:
        version: Of the format.
        base: The base model.
        entries: By name.
    """
    content = {
        "format": version,
        "base": vars(base),
        "experts": {name: entry.as_json() for name, entry in entries.items()},
    }
    return json.dumps({"sha256": _checksum(content), **content}, separators=(",", ":"))


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_index(path: Path, version: int) -> tuple[Base, dict[str, AdapterEntry]]:
    """Read and check an index.

    Args:
        path: `index.json`.
        version: The format that is understood.

    Returns:
        The base model, and entries by name.

    Raises:
        ValueError: If it is no index, of another format, not what was written, or an entry is malformed or names a
            place outside of the library.
    """
    content = read_object(path)
    if content.get("format") != version:
        raise ValueError(
            f"{path} has the format {content.get('format')!r}; this version of Quiver reads {version}."
        )
    experts = content.get("experts")
    if not isinstance(experts, dict):
        raise ValueError(f"{path} names no experts. Restore it, or make the library again.")
    base = _base(path, content.get("base"))
    entries = {name: _entry(path, name, values) for name, values in experts.items()}
    expected = content.pop("sha256", None)  # older libraries have none
    if unknown := content.keys() - {"format", "base", "experts"}:
        raise ValueError(f"{path} has an unknown {min(unknown)!r}. Restore it, or make the library again.")
    if expected is not None and expected != _checksum(content):
        raise ValueError(
            f"{path} is damaged: it has changed since it was written. Restore it; if you changed it on purpose, delete "
            'its "sha256".'
        )
    return base, entries


def _base(path: Path, values: Any) -> Base:
    try:
        return Base(
            name=None if values["name"] is None else _text(values["name"]),
            shapes={_text(key): tuple(map(_count, sides)) for key, sides in values["shapes"].items()},
            fingerprint=_texts(values["fingerprint"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} describes no base model ({type(error).__name__}: {error}). Restore the file, or make the library "
            "again."
        ) from None


def _entry(path: Path, name: str, values: Any) -> AdapterEntry:
    try:
        check_name(name)
        if values["kind"] not in ("lora", "sparse"):
            raise ValueError(f"kind {values['kind']!r}")
        checksums = _texts(values["checksums"])
        if bad := [file for file in checksums if Path(file).name != file or file.startswith(".")]:
            raise ValueError(f"file name {bad[0]!r}")
        base = values["base"]
        return AdapterEntry(
            name=name,
            folder=path.parent / "experts" / name,
            kind=values["kind"],
            tasks=tuple(map(_text, values["tasks"])),
            metrics={_text(key): float(value) for key, value in values["metrics"].items()},
            base=None if base is None else _text(base),
            rank=_count(values["rank"]),
            parameters=_count(values["parameters"]),
            checksums=checksums,
            lineage=tuple(map(_text, values["lineage"])),
            added=_text(values["added"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}: the entry {name!r} is malformed ({type(error).__name__}: {error}). Restore the file, or make "
            "the library again."
        ) from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is no size")
    return value


def _texts(values: Any) -> dict[str, str]:
    return {_text(key): _text(value) for key, value in values.items()}
