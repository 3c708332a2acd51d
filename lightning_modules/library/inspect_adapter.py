"""Looks an adapter folder over before it enters a library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightning_modules.base_names import FACTS, base_fingerprints
from lightning_modules.merging.experts import LoraExpert, SparseExpert, open_expert
from lightning_modules.merging.reading import read_object

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class FoundAdapter:
    """What an adapter folder holds.

    Attributes:
        kind: `lora` or `sparse`.
        base: The base model that it names.
        shapes: Each changed weight's (out, in).
        ranks: Each changed weight's rank; empty for sparse adapters.
        fingerprint: Hash of each base weight, where it is known.
        parameters: Number of trained values.
        said: What its own `quiver.json` says: tasks, metrics, lineage.
    """

    kind: Literal["lora", "sparse"]
    base: str | None
    shapes: Mapping[str, tuple[int, ...]]
    ranks: Mapping[str, int]
    fingerprint: Mapping[str, str]
    parameters: int
    said: Mapping[str, Any]

    def on(self, base: str) -> FoundAdapter:
        """Return the same with the base model that the user names.

        Raises:
            ValueError: If that model has other weights than it was trained on, as far as both are known.
        """
        for weight, expected in base_fingerprints(base, self.shapes).items():
            if self.fingerprint.get(weight, expected) != expected:
                raise ValueError(f"base={base!r} is not what the adapter was trained on: {weight} differs.")
        return replace(self, base=base)

    def facts(
        self, tasks: Sequence[str], metrics: Mapping[str, float], lineage: Sequence[str]
    ) -> dict[str, Any]:
        """Return what `quiver.json` of its copy in a library shall say."""
        return {
            "tasks": list(tasks),
            "metrics": dict(metrics),
            "lineage": list(lineage),
            "fingerprint": {key: value for key, value in self.fingerprint.items() if key in self.shapes},
            "ranks": dict(self.ranks),
            **({} if self.base is None else {"base": self.base}),
        }


def inspect_adapter(folder: Path) -> FoundAdapter:
    """Read an adapter folder through once: names, shapes, finite values, checksums.

    Args:
        folder: A LoRA adapter of PEFT, or a sparse adapter.

    Raises:
        ValueError: If it is neither, a file is missing, broken, a link or a pickle, or values make no sense.
    """
    if folder.is_dir():
        check_files(folder)
    expert = open_expert(str(folder))
    if isinstance(expert, LoraExpert):
        kind: Literal["lora", "sparse"] = "lora"
        shapes, ranks = expert.inspect()
        fingerprint: Mapping[str, str] = {}
        counted = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    elif isinstance(expert, SparseExpert):
        kind, ranks = "sparse", {}
        shapes, fingerprint, counted = expert.inspect()
    else:
        raise ValueError(f"{folder} is a whole model. A library holds LoRA and sparse adapters.")
    said = read_object(folder / FACTS) if (folder / FACTS).is_file() else {}
    return FoundAdapter(
        kind=kind,
        base=expert.base,
        shapes=shapes,
        ranks=ranks,
        fingerprint=said.get("fingerprint") or fingerprint,
        parameters=counted,
        said=said,
    )


def check_files(folder: Path) -> None:
    """Refuse links and pickled weights.

    Raises:
        ValueError: If a file to be read is a link, or weights are there as a pickle alone.
    """
    for name in (CONFIG, WEIGHTS, FACTS):
        if (folder / name).is_symlink():
            # A hub's cache keeps files as links into its own folder.
            target = (folder / name).resolve()
            if "blobs" not in target.parts:
                raise ValueError(
                    f"{folder / name} is a link to {target}. Copy the file itself into the folder."
                )
    if not (folder / WEIGHTS).is_file():
        pickles = [
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        ]
        if pickles:
            raise ValueError(
                f"{folder} holds its weights as {pickles[0]}, a pickle, which could run any code. Save the adapter as "
                "safetensors: save_pretrained(folder, safe_serialization=True)."
            )
