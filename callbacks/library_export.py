"""Adds what was trained to an adapter library at the end of training."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.utilities import rank_zero_warn
from peft import LoraConfig
from torch import Tensor, nn

from callbacks.graceful_stop import GracefulStop
from datamodules.base import TextDataModule
from datamodules.rows import DEFAULT_TASK
from lightning_modules.adapters import PeftAdapter
from lightning_modules.base_names import name_base
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.files import complete_folder
from lightning_modules.library.adapter import RoutedAdapter
from lightning_modules.library.entry import AdapterEntry, check_name
from lightning_modules.library.expert_adapter import LibraryExpert
from lightning_modules.library.inspect_adapter import inspect_adapter
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.sparse.adapter import SparseAdapter
from lightning_modules.sparse.storage import fingerprint


class LibraryExport(lightning.Callback):
    """Adds the trained adapter to a library: a LoRA or sparse adapter as one expert, a `RoutedAdapter` as its experts.

    Names are checked before training. One that another run takes meanwhile gets a number, with a warning. What the
    library refuses at the end for another reason stays in the run's folder, which the error names. An expert's
    metrics are those of the last validation: means over its tasks where they are measured by task
    (`val/exact_match/antonyms`), else over all rows.

    A run that was interrupted adds nothing; it can be resumed.

    Args:
        library: Folder of the library; made if it is not there.
        name: Name of a single adapter in the library; None is the name of the run's folder. Experts of a
            `RoutedAdapter` have names.
        tasks: What a single adapter was trained on; None takes what its parent, a `LibraryExpert`, was trained on,
            else the tasks of the data. A `RoutedAdapter` knows.
        prefix: Put before the names of a `RoutedAdapter`'s trained experts.

    Raises:
        ValueError: If `name` or `prefix` is malformed.
    """

    def __init__(
        self, library: str, name: str | None = None, tasks: list[str] | None = None, prefix: str = ""
    ) -> None:
        self.library = library
        self.name = None if name is None else check_name(name)
        self.tasks = tasks
        self.prefix = prefix and check_name(prefix)
        self._trained = False

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Check the module and the name before anything is loaded.

        Raises:
            ValueError: If the module has no adapter that a library can hold, the name of a single one is taken or
                malformed, or an argument does not apply.
        """
        if stage != "fit":
            return
        self._trained = False
        self._check_module(pl_module)
        root = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        existing = _open(self.library)
        if isinstance(pl_module, CausalLMModule) and not isinstance(pl_module.adapter, RoutedAdapter):
            if self.name is None:
                self.name = _folder_name(root)
            self._check_free(existing, [self.name])

    def _check_module(self, module: lightning.LightningModule) -> None:
        if not isinstance(module, CausalLMModule):
            raise ValueError(f"LibraryExport exports a CausalLMModule, not {type(module).__name__}.")
        adapter = module.adapter
        if isinstance(adapter, RoutedAdapter):
            if self.name is not None or self.tasks is not None:
                raise ValueError(
                    "LibraryExport, name and tasks: are for a single adapter; experts of a RoutedAdapter have theirs. "
                    "Leave both out, or set prefix."
                )
            return
        plain_lora = isinstance(adapter, PeftAdapter) and isinstance(adapter.config, LoraConfig)
        if not (plain_lora or isinstance(adapter, SparseAdapter)):
            kind = adapter.config if isinstance(adapter, PeftAdapter) else adapter
            raise ValueError(
                f"LibraryExport: a library holds LoRA and sparse adapters, and this {type(module).__name__} trains "
                f"{type(kind).__name__}. Set adapter to peft.LoraConfig or lightning_modules.SparseAdapter, or use "
                "AdapterExport instead."
            )
        if self.prefix:
            raise ValueError(
                "LibraryExport, prefix: is for the experts of a RoutedAdapter. Set name instead."
            )

    def _check_free(self, existing: AdapterLibrary | None, names: Sequence[str]) -> None:
        if existing is not None and (taken := [name for name in names if name in existing]):
            raise ValueError(
                f"LibraryExport: the library {self.library} has an expert {taken[0]!r} already. Set another name or "
                f"prefix, or remove it first: quiver library remove {self.library} {taken[0]}"
            )

    def _warn_of_shared_tasks(self, tasks: Sequence[str]) -> None:
        for entry in (_open(self.library) or {}).values():
            if shared := sorted(set(tasks) & set(entry.tasks)):
                rank_zero_warn(
                    f"LibraryExport: the library {self.library} has the expert {entry.name!r} for the task "
                    f"{shared[0]!r} already. To route by task later, choose one of them with experts:, or set tasks "
                    "here."
                )
                return

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Check what is known only when the model is loaded: names of experts, and whether a library takes them.

        Raises:
            ValueError: If a name is taken, or a library could not hold such an adapter.
        """
        assert isinstance(pl_module, CausalLMModule)  # see `setup`
        adapter = pl_module.adapter
        if isinstance(adapter, RoutedAdapter):
            self._check_free(_open(self.library), _new_names(adapter, self.library, self.prefix))
            return
        if _parent(pl_module) is None:
            self._warn_of_shared_tasks(self.tasks if self.tasks is not None else _tasks(trainer, pl_module))
        if isinstance(adapter, PeftAdapter):  # small before training as after it
            state = adapter.state_dict()
            with tempfile.TemporaryDirectory() as aside:
                adapter.write(Path(aside), state)
                try:
                    inspect_adapter(Path(aside))
                except ValueError as error:
                    raise ValueError(f"LibraryExport, a rehearsal: {error}") from error

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any
    ) -> None:
        """Note that there is something new to add."""
        self._trained = True

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add.

        Raises:
            ValueError: If the library does not take it. It is kept in the run's folder.
        """
        root = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        stops = [one for one in trainer.callbacks if isinstance(one, GracefulStop)]  # type: ignore[attr-defined]
        stopped = trainer.interrupted or any(one.stopped for one in stops)
        if trainer.fast_dev_run or stopped or not self._trained:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, CausalLMModule)
        # Under sharding all ranks gather what one of them writes.
        state = pl_module.adapter.state_dict()
        fingerprints = {} if isinstance(pl_module.adapter, RoutedAdapter) else _fingerprints(pl_module)
        if not trainer.is_global_zero:
            return
        metrics = {
            name.removeprefix("val/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/") and "/time/" not in name and math.isfinite(value)
        }
        try:
            library = AdapterLibrary(self.library, create=True)
            if isinstance(pl_module.adapter, RoutedAdapter):
                names = _add_experts(library, pl_module.adapter, self.prefix, metrics, state)
            else:
                assert self.name is not None
                tasks = self.tasks if self.tasks is not None else _tasks(trainer, pl_module)
                names = [_add(library, pl_module, self.name, tasks, metrics, state, fingerprints)]
        except (ValueError, OSError) as error:
            kept = root / "not-in-library"
            with complete_folder(kept) as aside:
                pl_module.adapter.write(aside, state)
            raise ValueError(f"LibraryExport: {error} What was trained is kept as {kept}.") from error
        pl_module.print(f"Added {', '.join(names)} to the library {self.library}")


def metrics_of(metrics: Mapping[str, float], tasks: Sequence[str]) -> dict[str, float]:
    """Return an expert's own metrics: means over its tasks of those that are measured by task.

    >>> metrics_of({"loss": 3.0, "loss/a": 1.0, "loss/b": 2.0, "loss/c": 9.0}, ["a", "b"])
    {'loss': 1.5}
    """
    found: dict[str, list[float]] = {}
    for name, value in metrics.items():
        metric, _, task = name.partition("/")
        if task in tasks:
            found.setdefault(metric, []).append(value)
    return {metric: sum(values) / len(values) for metric, values in found.items()}


def _open(library: str) -> AdapterLibrary | None:
    """Open a library if it is there."""
    return AdapterLibrary(library) if (Path(library).expanduser() / "index.json").exists() else None


def _folder_name(folder: Path) -> str:
    try:
        return check_name(folder.resolve().name)
    except ValueError:
        raise ValueError(
            f"LibraryExport, name: the run's folder is called {folder.resolve().name!r}, which is no name for an "
            "expert. Set name."
        ) from None


def _new_names(adapter: RoutedAdapter, library: str, prefix: str) -> list[str]:
    """Names under which `RoutedAdapter.publish` adds experts to a library; frozen ones may come from there."""
    if _trains(adapter):
        return [prefix + name for name in adapter.stacked.names]
    source = adapter.stacked.library
    same = source is not None and source.root.resolve() == Path(library).expanduser().resolve()
    return [] if same else list(adapter.stacked.names)


def _trains(adapter: RoutedAdapter) -> bool:
    return adapter.library is None if adapter.train_experts is None else adapter.train_experts


def _add_experts(
    library: AdapterLibrary,
    adapter: RoutedAdapter,
    prefix: str,
    metrics: Mapping[str, float],
    state: Mapping[str, Tensor],
) -> list[str]:
    """Add the experts of a RoutedAdapter."""
    number, free = 0, prefix
    while _trains(adapter) and any(free + name in library for name in adapter.stacked.names):
        number += 1
        free = f"{prefix}{number}."
    if number:
        _warn_taken("experts", prefix, "begin with", free)
    own = {name: metrics_of(metrics, tasks) for name, tasks in adapter.stacked.tasks.items()}
    return adapter.publish(library, own, free, state)


def _add(
    library: AdapterLibrary,
    module: CausalLMModule,
    name: str,
    tasks: Sequence[str],
    metrics: Mapping[str, float],
    state: Mapping[str, Tensor],
    fingerprints: Mapping[str, str],
) -> str:
    """Add one adapter."""
    number, free = 0, name
    while free in library:
        number += 1
        free = f"{name}.{number}"
    if number:
        _warn_taken("the adapter", name, "is added as", free)
    parent = _parent(module)
    overall = {metric: value for metric, value in metrics.items() if "/" not in metric}
    with tempfile.TemporaryDirectory() as aside:
        module.adapter.write(Path(aside), state)
        name_base(
            Path(aside) / "adapter_config.json",
            module.adapter.source or module.source,
            choice=module.adapter.choice,
        )
        library.add(
            aside,
            free,
            tasks=tasks,
            metrics={**overall, **metrics_of(metrics, tasks)},
            lineage=[parent.name] if parent else [],
            # A sparse adapter brings its own.
            fingerprint=None if isinstance(module.adapter, SparseAdapter) else fingerprints,
        )
    return free


def _warn_taken(what: str, wanted: str, how: str, free: str) -> None:
    rank_zero_warn(
        f"LibraryExport: another run took {wanted!r} while this one trained: {what} {how} {free!r}."
    )


def _parent(module: CausalLMModule) -> AdapterEntry | None:
    return module.adapter.entry if isinstance(module.adapter, LibraryExpert) else None


def _tasks(trainer: lightning.Trainer, module: CausalLMModule) -> list[str]:
    """Tasks of the parent, else of the training data where it has a task column."""
    parent = _parent(module)
    if parent is not None:
        return list(parent.tasks)
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, TextDataModule):
        return []
    return [task for task in datamodule.task_names() if task != DEFAULT_TASK]


def _fingerprints(module: CausalLMModule) -> dict[str, str]:
    """Hash the base weights under the adapter's layers, by their names in the base model."""
    assert module.model is not None
    found = {}
    for name, layer in module.model.named_modules():
        base = getattr(layer, "base_layer", None)
        if isinstance(base, nn.Module):
            weight = base.get_parameter("weight")
            if weight.is_floating_point():  # else quantised
                found[f"{name.removeprefix('base_model.model.')}.weight"] = fingerprint(weight)
    return found
