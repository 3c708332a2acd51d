"""ShardedPasses: how a module runs a model that may be divided over ranks, in training, generation and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeVar

from torch import nn

from lightning_modules.distributed import gathered, largest
from lightning_modules.evaluation import EvaluationMeans
from lightning_modules.fsdp2 import FSDP2Strategy
from lightning_modules.sharding import is_whole

T = TypeVar("T")


class ShardedPasses(EvaluationMeans):
    """Keeps ranks in step where each pass is a collective, and holds the model whole where passes are free.

    Attributes:
        model: The model; None before it is loaded.
    """

    model: nn.Module | None

    @property
    def sharding(self) -> FSDP2Strategy | None:
        """The strategy that shards the model; None under every other one."""
        strategy = None if self._trainer is None else self._trainer.strategy
        return strategy if isinstance(strategy, FSDP2Strategy) else None

    def generating(self) -> AbstractContextManager[None]:
        """Return the context in which the model draws completions, or runs without gradient in any number of passes.

        A collective under sharding; every rank enters it equally often.
        """
        if self.sharding is None or self.model is None:
            return nullcontext()
        return self.sharding.generating(self.model)

    def on_validation_start(self) -> None:
        """Give validation random numbers of its own, and each rank the whole model if the strategy does so."""
        super().on_validation_start()
        if self.sharding is not None and not self.sharding.whole_for_generation:
            loop: Any = self.trainer._active_loop
            if len(set(gathered(tuple(loop.max_batches)))) > 1:
                raise ValueError(
                    "whole_for_generation: false needs as many batches of validation on every rank. Set "
                    "data.val_batch_size to 2 or more, and have at least as many rows as ranks."
                )
        self._evaluation = ExitStack()
        self._evaluation.enter_context(self.generating())

    def on_validation_end(self) -> None:
        """Undo `on_validation_start`."""
        self._evaluation.close()
        super().on_validation_end()

    def on_test_start(self) -> None:
        """Do what validation does."""
        self.on_validation_start()

    def on_test_end(self) -> None:
        """Do what validation does."""
        self.on_validation_end()

    def on_predict_start(self) -> None:
        """Do what validation does."""
        self.on_validation_start()

    def on_predict_end(self) -> None:
        """Do what validation does."""
        self.on_validation_end()

    def in_step(self, items: Sequence[T], filler: Callable[[], T]) -> list[T]:
        """Make ranks run a sharded model equally often: each forward and backward pass is a collective there.

        Args:
            items: What this rank has passes for.
            filler: Makes an item that counts nothing, for ranks that have fewer.

        Returns:
            As many items on every rank of a sharded model; else the items as they are.
        """
        if self.sharding is None or self.model is None or is_whole(self.model):
            return list(items)
        missing = largest(self.sharding, len(items)) - len(items)
        return [*items, *(filler() for _ in range(missing))]
