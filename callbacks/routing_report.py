"""Watches a router: whom it chooses, how surely, and whether that is the task's own expert.

Shapes: B rows, S positions, E experts, T tasks that one expert has for itself, L layers.
"""

from __future__ import annotations

import csv
import importlib.util
import math
from dataclasses import dataclass
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
from lightning_modules.library.watch import dense_weights, own_tasks, token_sums
from lightning_modules.naming import natural
from lightning_modules.ranges import check_whole


class RoutingReport(lightning.Callback):
    """Measures routing in validation and test, and in training where the router learns.

    All tokens count that the model reads or writes while experts take part: prompts, gold answers, and what is
    generated until its end token. Padding does not. It logs, as means over tokens and layers,

    - `routing/accuracy`, the share of tokens whose heaviest expert is that of their row's task, and
      `routing/accuracy/<task>`. Experts that weigh the same share the token. Rows of a task that no expert has, or
      several have, do not count; a token that abstains counts as wrong;
    - `routing/entropy` of the experts' shares in nats, and `routing/entropy_share`, divided by log E, over tokens
      that do not abstain;
    - `routing/abstained`, the share of tokens that the base model answers alone;
    - `routing/load_max` and `routing/load_min`, the largest and smallest mean weight of an expert in a layer, and
      `routing/load_variation`, the experts' standard deviation divided by their mean.

    Training logs them as `train/routing/...`, of one batch in `every_n_steps`. Loggers that write more often repeat
    the last value.

    Each validation or test writes `routing.csv` to the run's folder, a row for each layer, in order, with the load of
    each expert, and draws it as `routing.png`, in place of those of the run's last one; both go to W&B as the table
    `routing` and the image `routing_heat`.

    Args:
        every_n_steps: Batches between two logs of training.
        image: Draw. It needs matplotlib (extra `plots`); without, there is a warning and no picture.

    Raises:
        ValueError: If `every_n_steps` is below 1.
    """

    def __init__(self, every_n_steps: int = 10, image: bool = True) -> None:
        check_whole("every_n_steps", every_n_steps)
        if image and importlib.util.find_spec("matplotlib") is None:
            rank_zero_warn(
                "RoutingReport draws with matplotlib: pip install 'lightning-quiver[plots]'. No picture."
            )
            image = False
        self.every_n_steps = every_n_steps
        self.image = image
        self._watch: _Watch | None = None
        self._written = False

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Check the module.

        Raises:
            ValueError: If it has no RoutedAdapter.
        """
        _routed(pl_module)
        self._written = False

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any
    ) -> None:
        """Begin to watch, where the router learns."""
        routers = [layer.router for layer in _routed(pl_module).layers.values()]
        learns = any(p.requires_grad for router in routers for p in router.parameters())
        if learns and (trainer.fit_loop.total_batch_idx + 1) % self.every_n_steps == 0:
            self._watch = _Watch(pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any
    ) -> None:
        """Log."""
        if self._watch is not None:
            scalars = self._stop(trainer).scalars()
            pl_module.log_dict({f"train/{name}": value for name, value in scalars.items()})

    def on_validation_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Begin to watch."""
        if not trainer.sanity_checking:
            self._watch = _Watch(pl_module)

    def on_validation_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Log, write and draw."""
        if self._watch is None:
            return
        report = self._stop(trainer)
        if scalars := report.scalars():
            pl_module.log_dict(scalars)
            self._publish(trainer, *report.table())

    def on_test_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Do what validation does."""
        self.on_validation_epoch_start(trainer, pl_module)

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Do what validation does."""
        self.on_validation_epoch_end(trainer, pl_module)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Stop watching."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _stop(self, trainer: lightning.Trainer) -> Report:
        """Sum over all ranks."""
        assert self._watch is not None
        watch, self._watch = self._watch, None
        watch.stop()
        sums = all_sum(trainer.strategy, torch.stack(list(watch.sums.values()))).cpu().double()
        return Report(tuple(watch.sums), watch.experts, tuple(watch.owner), sums)

    def _publish(self, trainer: lightning.Trainer, columns: list[str], rows: list[list[Any]]) -> None:
        root = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        table, picture = root / "routing.csv", root / "routing.png"
        if not self._written:  # those of an earlier run
            set_aside(table)
            set_aside(picture)
        self._written = True
        with complete_file(table) as file, file.open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)
        if self.image:
            with complete_file(picture) as file:
                routing_figure(columns, rows).savefig(file, dpi=120)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("routing", columns=columns, data=rows)
                if self.image:
                    logger.log_image("routing_heat", [str(picture)])


@dataclass(frozen=True)
class Report:
    """Sums over tokens, and what they mean.

    Attributes:
        layers: Names of the layers (L).
        experts: Names of the experts (E).
        tasks: Tasks that one expert has for itself (T).
        sums: What `token_sums` returns, of each layer (L, 3 + E + 2T).
    """

    layers: tuple[str, ...]
    experts: tuple[str, ...]
    tasks: tuple[str, ...]
    sums: Tensor

    def _parts(self) -> tuple[Tensor, ...]:
        E, T = len(self.experts), len(self.tasks)
        return torch.split(self.sums, [1, 1, 1, E, T, T], dim=1)

    def scalars(self) -> dict[str, float]:
        """Return what is logged, without what applied to no token."""
        tokens, abstained, entropy, load, right, known = self._parts()
        mean = load / tokens
        nats = (entropy / (tokens - abstained)).nanmean()
        values = {
            "routing/abstained": (abstained / tokens).nanmean(),
            "routing/entropy": nats,
            "routing/entropy_share": nats / math.log(max(len(self.experts), 2)),
            "routing/load_max": mean.max(),
            "routing/load_min": mean.min(),
            "routing/load_variation": (mean.std(1, correction=0) / mean.mean(1)).nanmean(),
            "routing/accuracy": right.sum() / known.sum(),
        }
        by_task = right.sum(0) / known.sum(0)
        values |= {f"routing/accuracy/{task}": by_task[number] for number, task in enumerate(self.tasks)}
        return {name: float(value) for name, value in values.items() if math.isfinite(value)}

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Return the columns, and a row for each layer; None where nothing counted."""
        tokens, abstained, entropy, load, right, known = self._parts()
        accuracy = right.sum(1, keepdim=True) / known.sum(1, keepdim=True)
        facts = torch.cat([accuracy, entropy / (tokens - abstained), abstained / tokens, load / tokens], 1)
        cells = [
            [round(value, 6) if math.isfinite(value) else None for value in row] for row in facts.tolist()
        ]
        rows = [[layer, *row] for layer, row in zip(self.layers, cells, strict=True)]
        return ["layer", "accuracy", "entropy", "abstained", *self.experts], rows


class _Watch:
    """Hooks on a model's routers, and what they have summed up so far, on the device."""

    def __init__(self, module: lightning.LightningModule) -> None:
        assert isinstance(module, CausalLMModule)
        assert module.model is not None
        self._adapter = _routed(module)
        self.experts = self._adapter.stacked.names
        self.owner = own_tasks(self.experts, self._adapter.stacked.tasks)
        self._numbers = {task: number for number, task in enumerate(self.owner)}
        self._owners = torch.tensor(list(self.owner.values()), dtype=torch.int64, device=module.device)
        self._ends = torch.tensor(end_tokens(module), device=module.device)
        self._mask: Tensor | None = None
        width = 3 + len(self.experts) + 2 * len(self.owner)
        layers = sorted(self._adapter.layers, key=natural)
        self.sums = {name: torch.zeros(width, device=module.device) for name in layers}
        self._handles: list[RemovableHandle] = [
            module.model.register_forward_pre_hook(self._see_mask, with_kwargs=True)
        ]
        for name, layer in self._adapter.layers.items():
            self._handles.append(layer.router.register_forward_hook(partial(self._see_routing, name)))

    def stop(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _see_mask(self, model: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        """Keep the mask of this forward pass; another form than (B, positions so far) lets all tokens count."""
        mask, ids = arguments.get("attention_mask"), arguments.get("input_ids")
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if self._mask is not None and ids is not None and self._mask.shape[1] > ids.shape[1]:
            # Generation goes on with end tokens in rows that have ended.
            self._mask = self._mask[:, -ids.shape[1] :] * ~torch.isin(ids, self._ends)

    def _see_routing(
        self, name: str, router: nn.Module, inputs: tuple[Tensor, Any], routing: Routing
    ) -> None:
        x = inputs[0]
        B, S = x.shape[:2]
        # A layer may see the last positions alone, as the output head does.
        mask = x.new_ones(B, S) if self._mask is None else self._mask[:, -S:]
        tasks = self._adapter.state.tasks
        numbers = [self._numbers.get(task, -1) for task in tasks] if len(tasks) == B else [-1] * B
        weight = dense_weights(routing, len(self.experts), (B, S))
        row_task = torch.tensor(numbers, device=x.device)
        self.sums[name] += token_sums(weight, mask, row_task, self._owners)


def end_tokens(module: CausalLMModule) -> list[int]:
    """Return the tokens that end a completion, those that fill it up afterwards included."""
    assert module.model is not None
    configured = module.model.generation_config.eos_token_id  # type: ignore[union-attr]
    several = configured if isinstance(configured, list) else [configured]
    ends = {module.tokenizer.eos_token_id, module.pad_token_id, *several}
    return sorted(token for token in ends if token is not None)


def _routed(module: lightning.LightningModule) -> RoutedAdapter:
    if not isinstance(module, CausalLMModule) or not isinstance(module.adapter, RoutedAdapter):
        raise ValueError(
            f"RoutingReport watches a router, and this {type(module).__name__} has none. Use AdapterLibraryModule, or "
            "set model.init_args.adapter to RoutedAdapter; otherwise leave RoutingReport out."
        )
    return module.adapter
