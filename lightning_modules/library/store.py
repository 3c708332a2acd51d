"""AdapterLibrary: a folder of adapters with an index, safe with several writers.

`index.json` says what each expert is, `experts/NAME/` is its adapter folder, and `arrays/HASH.safetensors` holds
prototypes, embeddings and gates.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from lightning_modules.base_names import FACTS
from lightning_modules.checksums import checksum
from lightning_modules.files import complete_file, complete_folder
from lightning_modules.library.arrays import read_arrays, write_arrays
from lightning_modules.library.entry import AdapterEntry, check_name
from lightning_modules.library.index import Base, index_text, read_index
from lightning_modules.library.inspect_adapter import CONFIG, WEIGHTS, inspect_adapter

INDEX = "index.json"
FORMAT = 1


class AdapterLibrary(Mapping[str, AdapterEntry]):
    """Experts of one base model, by name.

    Readers need no lock: the index is replaced as a whole. Writers take turns.

    Args:
        root: The folder.
        create: Make it if it is not there.

    Raises:
        ValueError: If there is no library at `root`, or its index is broken.
    """

    def __init__(self, root: str | Path, *, create: bool = False) -> None:
        self.root = Path(root).expanduser()
        self._seen: tuple[int, int, int] | None = None
        self._base = Base()
        self._entries: dict[str, AdapterEntry] = {}
        if not (self.root / INDEX).is_file():
            if not create:
                raise ValueError(
                    f"{self.root} is no adapter library: it has no {INDEX}. quiver library add makes one."
                )
            self.root.mkdir(parents=True, exist_ok=True)
            with self._locked():
                if not (self.root / INDEX).is_file():
                    self._write(Base(), {})
        self._load()

    def __getitem__(self, name: str) -> AdapterEntry:
        return self._load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())

    def add(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        metrics: Mapping[str, float] | None = None,
        lineage: Sequence[str] | None = None,
        fingerprint: Mapping[str, str] | None = None,
        base: str | None = None,
    ) -> AdapterEntry:
        """Copy an adapter into the library.

        Args:
            folder: A LoRA adapter of PEFT, or a sparse adapter.
            name: Its name here; by default the folder's.
            tasks: What it was trained on.
            metrics: What it reached.
            lineage: What it came from.
            fingerprint: Hash of each base weight that it changes.
            base: Its base model, as in `model:` of a configuration; by default what it names.

        Returns:
            Its entry.

        Raises:
            ValueError: If the name is taken or malformed, the adapter broken, or its base model another one. The
                library is as before.
        """
        source = Path(folder).expanduser()
        name = check_name(name if name is not None else source.name)
        found = inspect_adapter(source)
        if fingerprint is not None:
            found = replace(found, fingerprint=fingerprint)
        if base is not None:
            found = found.on(base)
        said = found.said
        facts = found.facts(
            said.get("tasks", ()) if tasks is None else tasks,
            (said.get("metrics") or {}) if metrics is None else metrics,
            said.get("lineage", ()) if lineage is None else lineage,
        )
        target = self.root / "experts" / name
        with self._locked():
            entries = self._load()
            if name in entries:
                raise ValueError(
                    f"The library {self.root} has an expert {name!r} already. Remove it first, or give another name."
                )
            model = self._base.with_adapter(found, repr(name))
            if target.exists():  # left by a writer that was killed before it came to the index
                shutil.rmtree(target)
            with complete_folder(target) as aside:
                for file in (CONFIG, WEIGHTS):
                    shutil.copyfile(source / file, aside / file)
                (aside / FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True), encoding="utf-8")
                checksums = {file: checksum(aside / file) for file in (CONFIG, WEIGHTS, FACTS)}
            entry = AdapterEntry(
                name=name,
                folder=target,
                kind=found.kind,
                tasks=tuple(facts["tasks"]),
                metrics={key: float(value) for key, value in facts["metrics"].items()},
                base=found.base,
                rank=max(found.ranks.values(), default=0),
                parameters=found.parameters,
                checksums=checksums,
                lineage=tuple(facts["lineage"]),
                added=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            self._write(model, {**entries, name: entry})
        return entry

    def remove(self, name: str) -> None:
        """Take an expert out.

        Raises:
            ValueError: If there is none of this name.
        """
        with self._locked():
            entries = dict(self._load())
            if name not in entries:
                raise ValueError(f"The library {self.root} has no expert {name!r}.")
            del entries[name]
            self._write(self._base if entries else Base(), entries)
            shutil.rmtree(self.root / "experts" / name, ignore_errors=True)

    def find_arrays(
        self, name: str, kind: str, settings: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor] | None:
        """Return arrays that belong to an expert, or None where there are none.

        Args:
            name: The expert.
            kind: What they are.
            settings: What else they depend on.
        """
        return read_arrays(self._arrays_file(name, kind, settings or {}))

    def put_arrays(
        self, name: str, kind: str, arrays: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None
    ) -> None:
        """Keep arrays that belong to an expert as it is now; they are found no more when its files change.

        Args:
            name: The expert.
            kind: What they are.
            arrays: By name.
            settings: What else they depend on.
        """
        with complete_file(self._arrays_file(name, kind, settings or {})) as aside:
            write_arrays(aside, arrays, {"expert": name, "kind": kind})

    def arrays(
        self, name: str, kind: str, settings: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return arrays of an expert, made by `compute` if they are not there yet."""
        found = self.find_arrays(name, kind, settings)
        if found is None:
            found = compute()
            self.put_arrays(name, kind, found, settings)
        return found

    def verify(self, names: Sequence[str] | None = None) -> list[str]:
        """Read every file and say what is wrong, a line each; nothing for a sound library.

        Args:
            names: Some experts; None means all, and what lies in the folder without being in the index.
        """
        problems = []
        entries = self._load()
        for name in entries if names is None else names:
            entry = entries[name]
            for file, expected in entry.checksums.items():
                path = entry.folder / file
                if not path.is_file():
                    problems.append(f"{path} is missing. Remove {name!r} and add it again.")
                elif checksum(path) != expected:
                    problems.append(
                        f"{path} has changed since it was added. Remove {name!r} and add it again."
                    )
        if names is None and (self.root / "experts").is_dir():
            for path in sorted((self.root / "experts").iterdir()):
                if path.name not in entries:
                    problems.append(f"{path} is not in the index: an interrupted addition. Delete it.")
        return problems

    def _arrays_file(self, name: str, kind: str, settings: Mapping[str, Any]) -> Path:
        key = json.dumps([kind, settings, dict(self[name].checksums)], sort_keys=True)
        return self.root / "arrays" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if (self.root / "experts").is_symlink():  # what is removed from there would be gone elsewhere
            raise ValueError(f"{self.root / 'experts'} is a link. Put the folder itself there.")
        try:
            with FileLock(self.root / ".lock"):
                yield
        except PermissionError as error:
            raise OSError(f"The library {self.root} cannot be written: {error}.") from None

    def _load(self) -> dict[str, AdapterEntry]:
        """Read the index if it is another file than last time."""
        path = self.root / INDEX
        facts = path.stat()
        seen = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
        if seen != self._seen:
            self._base, self._entries = read_index(path, FORMAT)
            self._seen = seen
        return self._entries

    def _write(self, base: Base, entries: Mapping[str, AdapterEntry]) -> None:
        with complete_file(self.root / INDEX) as aside:
            aside.write_text(index_text(FORMAT, base, entries), encoding="utf-8")
        self._seen = None
