"""Watches a sparse adapter: how many weights are trained, where they are, how they move, what experts share.

Shapes: A trained entries of the run, B those of another adapter, N entries of a weight.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks.density_figure import density_figure, heat_maps
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.files import complete_file, set_aside
from lightning_modules.ranges import check_whole
from lightning_modules.sharding import whole
from lightning_modules.sparse.adapter import SparseAdapter
from lightning_modules.sparse.stats import (
    layer_densities,
    measure,
    overlap,
    share_of,
    shared_count,
    table,
    trained_entries,
)
from lightning_modules.sparse.storage import SparseFolder


class SparseStats(lightning.Callback):
    """Logs density, churn and size of a sparse adapter, and its overlap with other ones; draws where they are.

    Every `every_n_steps` batches it logs, with all counts over the target weights:

    - `sparse/trained`, the number of trained entries, and `sparse/density`, their share of all entries: 1 in a
      dense phase, 0 before a schedule without dense phase has chosen;
    - `sparse/layer_density/min`, `/mean` and `/max` over layers, a layer being the first number in a parameter
      name; weights without number count as one layer together;
    - `sparse/churn`, the share of the trained entries that were not trained at the previous log. The first log
      has none, nor has the first one of a resumed run;
    - `sparse/delta_norm`, the L2 norm of what was learned;
    - what rounding to the type that the model computes in leaves of it: `sparse/kept`, the share of that norm that
      arrives, `sparse/rounding_error`, the relative error of the change, and `sparse/unmoved`, the share of the
      entries with a change that stand where the base has them. In float32 1, about 0 and 0;
    - for each expert `sparse/overlap/<its folder>`, |A and B| / |A| over the weights that both change, and
      `sparse/overlap_by_chance/<its folder>`, what random choices of the same size in each weight would share
      on average. Both are 0 where nothing is trained in these weights.

    Loggers that write more often repeat the last value, as Lightning does.

    The end of `fit` writes `sparse_density.csv` to the run's folder, one row for each weight, and draws it as
    `sparse_density.png`; both go to W&B too, as the table `sparse_weights` and the image `sparse_density`. An
    overlap is empty where the expert does not change the weight, or nothing is trained in it.

    Args:
        every_n_steps: Batches between two logs.
        experts: Folders of other sparse adapters of the same base model.
        image: Draw at the end. It needs matplotlib (extra `plots`); without, there is a warning and no picture.

    Raises:
        ValueError: If `every_n_steps` is below 1.
    """

    def __init__(self, every_n_steps: int = 10, experts: list[str] | None = None, image: bool = True) -> None:
        check_whole("every_n_steps", every_n_steps)
        if image and importlib.util.find_spec("matplotlib") is None:
            rank_zero_warn(
                "SparseStats draws with matplotlib: pip install 'lightning-quiver[plots]'. No picture."
            )
            image = False
        self.every_n_steps = every_n_steps
        self.experts = experts
        self.image = image
        self._folders: dict[str, SparseFolder] = {}
        self._previous: dict[str, Tensor | None] | None = None
        self._trained = False

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Check the module and open the experts, before the model is loaded.

        Raises:
            ValueError: If the module has no sparse adapter, or an expert is named twice, missing or broken.
        """
        _sparse_adapter(pl_module)
        if stage != "fit":
            return
        self._folders, self._previous, self._trained = {}, None, False
        for label, path in expert_labels(self.experts or []).items():
            try:
                folder = SparseFolder(path)
                for name in folder.names:
                    folder.delta(name)
            except ValueError as error:
                raise ValueError(f"SparseStats, experts: {error}") from error
            self._folders[label] = folder

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Check that the experts change the same weights; these are known only now.

        Raises:
            ValueError: If an expert changes none of them, or one of another shape.
        """
        weights = _sparse_adapter(pl_module).weights
        for folder in self._folders.values():
            both = [weight for weight in weights if weight.name in folder.names]
            if not both:
                raise ValueError(
                    f"SparseStats, experts: {folder.folder} changes none of the weights that this run trains: "
                    f"it has {folder.names[:3]}, the run {[weight.name for weight in weights[:3]]}. Use experts "
                    "of this base model whose target_modules meet those of the run, or leave it out."
                )
            for weight in both:
                if folder.shape(weight.name) != tuple(weight.shape):
                    raise ValueError(
                        f"SparseStats, experts: {folder.folder} changes {weight.name} of shape "
                        f"{folder.shape(weight.name)}; in this run it is {tuple(weight.shape)}. Use "
                        "experts of the same base model, or leave it out."
                    )

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any
    ) -> None:
        """Log."""
        self._trained = True
        if (trainer.fit_loop.total_batch_idx + 1) % self.every_n_steps == 0:
            pl_module.log_dict(self._scalars(_sparse_adapter(pl_module)))  # alike on all ranks

    def _scalars(self, adapter: SparseAdapter) -> dict[str, float]:
        weights = adapter.weights
        stats = measure(weights, self._folders)
        arrives = adapter.rounding.measure(weights)
        trained = sum(one.trained for one in stats)
        layers = layer_densities(stats)
        norms = [float(torch.linalg.vector_norm(whole(weight.values.detach()))) for weight in weights]
        scalars = {
            "sparse/density": share_of(trained, sum(one.size for one in stats)),
            "sparse/trained": float(trained),
            "sparse/delta_norm": math.hypot(*norms),
            "sparse/kept": arrives.share,
            "sparse/rounding_error": arrives.error,
            "sparse/unmoved": arrives.unmoved,
            "sparse/layer_density/min": min(layers),
            "sparse/layer_density/mean": sum(layers) / len(layers),
            "sparse/layer_density/max": max(layers),
        }
        present = {weight.name: trained_entries(weight) for weight in weights}
        if self._previous is not None:
            kept = sum(shared_count(present[one.name], self._previous[one.name], one.size) for one in stats)
            scalars["sparse/churn"] = share_of(trained - kept, trained)
        self._previous = present  # no copies: a new choice makes new tensors
        for label in self._folders:
            found, by_chance = overlap(stats, label)
            scalars[f"sparse/overlap/{label}"] = found
            scalars[f"sparse/overlap_by_chance/{label}"] = by_chance
        return scalars

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the table and draw the picture, of how the adapter is now."""
        root = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        folders, self._folders, self._previous = self._folders, {}, None
        if trainer.fast_dev_run or not self._trained:  # type: ignore[attr-defined]
            return
        stats = measure(_sparse_adapter(pl_module).weights, folders)  # asks all ranks under sharding
        if not trainer.is_global_zero:
            return
        columns, rows = table(stats, list(folders))
        set_aside(root / "sparse_density.csv")
        with (
            complete_file(root / "sparse_density.csv") as file,
            file.open("w", encoding="utf-8", newline="") as out,
        ):
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)
        picture = root / "sparse_density.png"
        set_aside(picture)
        if self.image:
            panels, layers, kinds = heat_maps(stats, list(folders))
            with complete_file(picture) as file:
                density_figure(panels, layers, kinds).savefig(file, dpi=120)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("sparse_weights", columns=columns, data=rows)
                if self.image:
                    logger.log_image("sparse_density", [str(picture)])


def expert_labels(folders: Sequence[str]) -> dict[str, Path]:
    """Name each folder by its last part, or by as many last parts as tell them apart.

    Raises:
        ValueError: If a folder is named twice.

    >>> list(expert_labels(["runs/sums/adapter", "runs/logic/adapter"]))
    ['sums/adapter', 'logic/adapter']
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"SparseStats, experts: {path} is named twice. Leave one out.")
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return {"/".join(path.parts[-length:]): path for path in paths}


def _sparse_adapter(module: lightning.LightningModule) -> SparseAdapter:
    remedy = (
        "Use SparseAdapterModule, or set model.init_args.adapter to lightning_modules.SparseAdapter; "
        "otherwise leave SparseStats out."
    )
    if not isinstance(module, CausalLMModule):
        raise ValueError(f"SparseStats watches a CausalLMModule, not {type(module).__name__}. {remedy}")
    if not isinstance(module.adapter, SparseAdapter):
        raise ValueError(
            f"SparseStats watches a SparseAdapter, but the adapter of this {type(module).__name__} is "
            f"{type(module.adapter).__name__}. {remedy}"
        )
    return module.adapter
