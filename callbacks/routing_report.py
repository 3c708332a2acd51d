"""Watches a router: whom it chooses, how surely, and whether that is the task's own expert."""

from __future__ import annotations

import csv
import importlib.util
import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from callbacks.routing_figure import routing_figure
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.distributed import all_sum
from lightning_modules.files import complete_file, set_aside
from lightning_modules.library.adapter import RoutedAdapter
from lightning_modules.library.mixing import Routing
from lightning_modules.library.watch import dense_weights, routing_counts

_SUMS = 5


class RoutingReport(lightning.Callback):
    """Measures routing in validation and test.

    Tokens of prompts and gold answers count; padding, and tokens that are generated one by one, do not. Logs, as means over layers and tokens,

    - `routing/accuracy`, the share of tokens that weigh the expert of their row's task most, over rows whose task
      has an expert (the oracle's choice);
    - `routing/entropy` of the experts' shares, in nats; log E is uniform;
    - `routing/abstained`, the share of tokens that the base answers alone;
    - `routing/load_max`, the largest mean weight of an expert in a layer.

    The end of validation or test writes `routing.csv` to the run's folder, a row for each layer with its load per
    expert, and draws it as `routing.png`; both go to W&B as the table `routing` and the image `routing_heat`.

    Args:
        image: Draw. It needs matplotlib (extra `plots`); without, there is a warning and no picture.
    """

    def __init__(self, image: bool = True) -> None:
        if image and importlib.util.find_spec("matplotlib") is None:
            rank_zero_warn(
                "RoutingReport draws with matplotlib: pip install 'lightning-quiver[plots]'. No picture."
            )
            image = False
        self.image = image
        self._counts: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._mask: Tensor | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Check the module.

        Raises:
            ValueError: If it has no RoutedAdapter.
        """
        _routed(pl_module)

    def on_validation_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Begin to watch."""
        adapter, names = _routed(pl_module), _routed(pl_module).stacked.names
        owner = {task: number for number, name in enumerate(names) for task in adapter.stacked.tasks[name]}
        self._counts = {
            name: torch.zeros(_SUMS + len(names), dtype=torch.float64, device=pl_module.device)
            for name in adapter.layers
        }
        assert isinstance(pl_module, CausalLMModule)
        assert pl_module.model is not None
        self._handles = [pl_module.model.register_forward_pre_hook(self._see_mask, with_kwargs=True)]
        for name, layer in adapter.layers.items():
            see = partial(self._see_routing, name, adapter, owner)
            self._handles.append(layer.router.register_forward_hook(see))

    def on_validation_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Log, write and draw."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        adapter = _routed(pl_module)
        counts = all_sum(trainer.strategy, torch.stack(list(self._counts.values()))).cpu()  # (layers, 5 + E)
        if trainer.sanity_checking or not bool(counts[:, 0].all()):
            return
        tokens, abstained, entropy, known, right = counts[:, :_SUMS].T
        load = counts[:, _SUMS:] / tokens[:, None]
        accuracy = right / known
        scalars = {
            "routing/entropy": (entropy / tokens).mean(),
            "routing/abstained": (abstained / tokens).mean(),
            "routing/load_max": load.max(),
            "routing/accuracy": accuracy.mean(),
        }
        for name, value in scalars.items():
            if math.isfinite(value):
                pl_module.log(name, float(value))
        rows = [
            [layer, *(round(float(value), 6) for value in (*facts, *loads))]
            for layer, facts, loads in zip(
                adapter.layers,
                torch.stack([accuracy, entropy / tokens, abstained / tokens], 1),
                load,
                strict=True,
            )
        ]
        self._publish(trainer, ["layer", "accuracy", "entropy", "abstained", *adapter.stacked.names], rows)

    def on_test_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Do what validation does."""
        self.on_validation_epoch_start(trainer, pl_module)

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Do what validation does."""
        self.on_validation_epoch_end(trainer, pl_module)

    def _see_mask(self, model: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        mask = arguments.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _see_routing(
        self,
        name: str,
        adapter: RoutedAdapter,
        owner: dict[str, int],
        router: nn.Module,
        inputs: tuple[Tensor, Any],
        routing: Routing,
    ) -> None:
        x = inputs[0]
        rows, positions = x.shape[:2]
        if positions == 1:  # a token that is being generated
            return
        mask = x.new_ones(rows, positions) if self._mask is None else self._mask[:, -positions:]
        tasks = adapter.state.tasks
        own = [owner.get(task, -1) for task in tasks] if len(tasks) == rows else [-1] * rows
        weight = dense_weights(routing, len(adapter.stacked.names), (rows, positions))
        self._counts[name] += routing_counts(weight, mask, torch.tensor(own, device=x.device))

    def _publish(self, trainer: lightning.Trainer, columns: list[str], rows: list[list[Any]]) -> None:
        root = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        set_aside(root / "routing.csv")
        with complete_file(root / "routing.csv") as file, file.open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)
        picture = root / "routing.png"
        if self.image:
            set_aside(picture)
            with complete_file(picture) as file:
                routing_figure(columns, rows).savefig(file, dpi=120)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("routing", columns=columns, data=rows)
                if self.image:
                    logger.log_image("routing_heat", [str(picture)])


def _routed(module: lightning.LightningModule) -> RoutedAdapter:
    if not isinstance(module, CausalLMModule) or not isinstance(module.adapter, RoutedAdapter):
        raise ValueError(
            f"RoutingReport watches a router, and this {type(module).__name__} has none. Use AdapterLibraryModule, or "
            "set model.init_args.adapter to RoutedAdapter; otherwise leave RoutingReport out."
        )
    return module.adapter
