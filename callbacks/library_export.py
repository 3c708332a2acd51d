"""Adds what was trained to an adapter library at the end of training."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as lightning
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.export import name_base
from lightning_modules.library.adapter import RoutedAdapter
from lightning_modules.library.entry import check_name
from lightning_modules.library.expert_adapter import LibraryExpert
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.sparse.adapter import SparseAdapter
from lightning_modules.sparse.storage import fingerprint


class LibraryExport(lightning.Callback):
    """Adds the trained adapter to a library: a LoRA or sparse adapter as one expert, a `RoutedAdapter` as its experts.

    An interrupted run adds nothing; it can be resumed.

    Args:
        library: Folder of the library; made if it is not there.
        name: Name of a single adapter in the library. Experts of a `RoutedAdapter` keep theirs.
        tasks: What the adapter was trained on; not for a `RoutedAdapter`, which knows.
        prefix: Put before the names of a `RoutedAdapter`'s trained experts.

    Raises:
        ValueError: If `name` is malformed.
    """

    def __init__(
        self, library: str, name: str | None = None, tasks: list[str] | None = None, prefix: str = ""
    ) -> None:
        self.library = library
        self.name = None if name is None else check_name(name)
        self.tasks = tasks
        self.prefix = prefix
        self._trained = False

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Check names before anything is trained.

        Raises:
            ValueError: If the module has no adapter, a name is missing or taken.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, CausalLMModule):
            raise ValueError(f"LibraryExport exports a CausalLMModule, not {type(pl_module).__name__}.")
        if isinstance(pl_module.adapter, RoutedAdapter):
            return
        if self.name is None:
            raise ValueError("LibraryExport, name: say what the adapter shall be called in the library.")
        if (Path(self.library) / "index.json").exists() and self.name in AdapterLibrary(self.library):
            raise ValueError(
                f"LibraryExport, name={self.name!r}: the library {self.library} has an expert of this name. Choose "
                "another one, or remove that one first."
            )

    def on_train_batch_end(self, *args: object) -> None:
        """Note that there is something new to add."""
        self._trained = True

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add."""
        if trainer.fast_dev_run or trainer.interrupted or not self._trained:  # type: ignore[attr-defined]
            return
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, CausalLMModule)
        library = AdapterLibrary(self.library, create=True)
        metrics = {
            name.removeprefix("val/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        if isinstance(pl_module.adapter, RoutedAdapter):
            own = {name: _of_tasks(metrics, tasks) for name, tasks in pl_module.adapter.stacked.tasks.items()}
            names = pl_module.adapter.publish(library, own, self.prefix)
        else:
            assert self.name is not None
            names = [_add(library, pl_module, self.name, self.tasks, metrics)]
        print(f"Added {', '.join(names)} to the library {self.library}")  # noqa: T201


def _of_tasks(metrics: Mapping[str, float], tasks: tuple[str, ...]) -> dict[str, float]:
    """Means over an expert's tasks of metrics such as `exact_match/antonyms`."""
    values: dict[str, list[float]] = {}
    for name, value in metrics.items():
        metric, _, task = name.partition("/")
        if task in tasks:
            values.setdefault(metric, []).append(value)
    return {metric: sum(own) / len(own) for metric, own in values.items()}


def _add(
    library: AdapterLibrary,
    module: CausalLMModule,
    name: str,
    tasks: list[str] | None,
    metrics: Mapping[str, float],
) -> str:
    """Add one adapter; a name that another run took meanwhile gets a number, so that nothing is lost."""
    wanted, number = name, 0
    while name in library:
        number += 1
        name = f"{wanted}.{number}"
    if name != wanted:
        rank_zero_warn(
            f"LibraryExport: {wanted!r} was taken while this run trained. It is added as {name!r}."
        )
    parent = module.adapter.entry if isinstance(module.adapter, LibraryExpert) else None
    with tempfile.TemporaryDirectory() as aside:
        module.adapter.write(Path(aside))
        name_base(Path(aside) / "adapter_config.json", module.source)
        library.add(
            aside,
            name,
            tasks=tasks if tasks is not None else (parent.tasks if parent else ()),
            metrics=metrics,
            lineage=[parent.name] if parent else [],
            # A sparse adapter brings its own.
            fingerprint=None if isinstance(module.adapter, SparseAdapter) else _fingerprints(module),
        )
    return name


def _fingerprints(module: CausalLMModule) -> dict[str, str]:
    """Hash the base weights under the adapter's layers, by their names in the base model."""
    assert module.model is not None
    found = {}
    for name, layer in module.model.named_modules():
        base = getattr(layer, "base_layer", None)
        if isinstance(base, nn.Module):
            found[f"{name.removeprefix('base_model.model.')}.weight"] = fingerprint(
                base.get_parameter("weight")
            )
    return found
