"""AdapterLibraryModule: trains libraries of experts and their routers, and evaluates them.

Shapes: B rows of a batch, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.batches import TextBatch
from lightning_modules.distributed import all_sum
from lightning_modules.library.adapter import RoutedAdapter
from lightning_modules.library.descriptions import describe_experts
from lightning_modules.library.mixing import Mixing, output_mixing
from lightning_modules.library.routers.base import Router
from lightning_modules.library.steps import clip_expert_gradients
from lightning_modules.sft import SFTModule


class AdapterLibraryModule(SFTModule):
    """Supervised training and evaluation of experts in a stack, and of the router that finds them.

    Without `library` new experts are trained; with it those of a library are frozen, unless `train_experts` says
    otherwise, and what the router learns is trained.

    With a router that gives each row to one expert (`TaskRouter`, `PhatgooseGates`) a run trains many experts side
    by side: each one's loss is the mean over its own answer tokens of the step and its gradient is clipped by its
    own norm, so that it learns what it would learn alone from the same rows. A step that has no rows of an expert
    leaves it alone.

    Validation and test log each metric of `SFTModule` over all rows, and again for each task, as in
    `val/exact_match/antonyms`.

    Args:
        router: Chooses experts, from `lightning_modules.library.routers`.
        library: Folder of an `AdapterLibrary`.
        experts: As `RoutedAdapter` takes it; without library, None makes an expert for each task of the data.
        rank: Of new experts.
        alpha: LoRA's alpha of new experts.
        target_modules: Layers that new experts change.
        mixing: `lightning_modules.library.mixing.output_mixing` or `factor_mixing`.
        train_experts: Whether experts are trained; None trains new ones alone.
        router_lr: Learning rate of what the router learns; None is the optimiser's own.
        subtract: Experts whose mean is taken off the others as general knowledge.
        same_start: New experts start from the same A.
        tasks: The tasks that new experts and learned routers are for; None takes those of the training data. A
            checkpoint remembers them.
        **kwargs: Arguments of `SFTModule`, without `adapter`.

    Raises:
        ValueError: If arguments contradict each other, or `adapter` is given.
    """

    adapter: RoutedAdapter

    def __init__(
        self,
        router: Router,
        library: str | None = None,
        experts: int | list[str] | dict[str, list[str]] | str | None = None,
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: list[str] | str = "all-linear",
        mixing: Mixing = output_mixing,
        train_experts: bool | None = None,
        router_lr: float | None = None,
        subtract: list[str] | None = None,
        same_start: bool = False,
        tasks: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.pop("adapter", None) is not None:
            raise ValueError(
                "AdapterLibraryModule makes its own adapter. Use SFTModule to train another one, or set the "
                "arguments library, experts and router here."
            )
        adapter = RoutedAdapter(
            router,
            library,
            experts,
            rank,
            alpha,
            target_modules,
            mixing,
            train_experts,
            router_lr,
            subtract,
            same_start,
        )
        adapter.data_tasks = tasks
        super().__init__(adapter=adapter, **kwargs)
        # A checkpoint rebuilds it from the arguments above; it is none of its own.
        self.hparams.pop("adapter", None)
        self.left_out = [name for name in self.left_out if name != "adapter"]

    _tasks: Sequence[str] = ()

    def configure_model(self) -> None:
        """Load the model, the experts and the router; experts are described by examples where the router asks.

        Raises:
            ValueError: If the library or an expert is broken or of another base model, or router and experts do
                not go together.
        """
        if self.model is not None:
            return
        datamodule: Any = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        if self.adapter.data_tasks is None:
            self.adapter.data_tasks = _task_names(datamodule, "train") or None
            self.hparams["tasks"] = self.adapter.data_tasks
        self.adapter.defer_descriptions = True
        super().configure_model()
        if self.adapter.router.num_examples:
            describe_experts(self, self.adapter, datamodule)
            self.adapter.install(self.adapter.router)

    # ------------------------------------------------------------------ training many experts at once

    @property
    def separate(self) -> bool:
        """Whether each row trains one expert alone."""
        return self.adapter.router.one_expert_per_row

    def row_weights(self, batch: TextBatch, tokens_B: Tensor) -> Tensor:
        """Divide each row's loss by the answer tokens of its expert in this update, over all ranks.

        Args:
            batch: The rows of this rank (B).
            tokens_B: Answer tokens of each row (B).

        Returns:
            (B).
        """
        if not self.separate:
            return super().row_weights(batch, tokens_B)
        expert_B = self.adapter.router.encode(batch.tasks, batch.prompts).cpu()
        counts_E = torch.zeros(len(self.adapter.stacked.names)).index_add(0, expert_B, tokens_B)
        tokens_E: Tensor = all_sum(self.trainer.strategy, counts_E).cpu()
        return 1 / tokens_E[expert_B]

    def clip_gradients_in_place(self) -> Tensor:
        """Clip the gradient of each expert by its own norm, where each row trains one expert.

        Returns:
            The norm of all gradients before.
        """
        if not self.separate:
            return super().clip_gradients_in_place()
        limit = float("inf") if self.gradient_clip_val is None else self.gradient_clip_val
        self._norms_E = clip_expert_gradients(self.adapter.expert_parameters(), limit)
        total: Tensor = self._norms_E.norm()
        return total

    def nonfinite_source(self) -> str:
        """Name the experts whose gradient is not finite."""
        if not self.separate:
            return ""
        bad = (~self._norms_E.isfinite()).nonzero()[:, 0].tolist()
        return f", from the experts {', '.join(self.adapter.stacked.names[i] for i in bad)}"

    # ------------------------------------------------------------------ evaluation

    def evaluation_metrics(self) -> Sequence[str]:
        """Name the metrics of validation, for all rows and for each task."""
        names = super().evaluation_metrics()
        datamodule = getattr(self.trainer, "datamodule", None)
        self._tasks = _task_names(datamodule, "test" if self.trainer.testing else "val")
        return [*names, *(f"{name}/{task}" for name in names for task in self._tasks)]

    def add_metric(self, name: str, value: Tensor, task: str, mask: Tensor | None = None) -> None:
        """Add to the mean over all rows and to that of the row's task."""
        super().add_metric(name, value, task, mask)
        if task in self._tasks:
            self.evaluation_means.add(f"{name}/{task}", value, mask)


def _task_names(datamodule: Any, split: str) -> list[str]:
    """Name the tasks of a split; none for data of another making than ours, which says nothing of tasks."""
    names: list[str] = datamodule.task_names(split) if hasattr(datamodule, "task_names") else []
    return names
