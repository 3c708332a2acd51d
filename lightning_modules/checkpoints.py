"""AdapterCheckpoints: checkpoints that hold what was learned and what an exact resume needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_modules.adapters import Adapter
from lightning_modules.checkpoint_io import CompleteCheckpointIO
from lightning_modules.distributed import gathered, rng_state, set_rng_state
from lightning_modules.fsdp2 import FSDP2Strategy
from lightning_modules.optimizers import override_restored, settings
from lightning_modules.restored_paths import drop_foreign_paths
from lightning_modules.sharded_files import whole_tensors


class AdapterCheckpoints(lightning.LightningModule):
    """Saves the adapter instead of the whole model, and random states of every rank.

    Attributes:
        adapter: What is learned; set by the subclass's constructor.
        left_out: Names of constructor arguments that a checkpoint cannot hold.
    """

    adapter: Adapter

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # Lightning would miss the base weights; `on_load_checkpoint` checks
        self._pending_rng: list[dict[str, Any]] | None = None
        self._saved_settings: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    def setup(self, stage: str) -> None:
        """Make checkpoints complete or invisible, and refuse to read what is not safe, under every strategy."""
        strategy = self.trainer.strategy
        current = strategy.checkpoint_io
        if type(current) is AsyncCheckpointIO:
            raise ValueError(
                "trainer.plugins: Lightning's AsyncCheckpointIO removes an earlier checkpoint before the new one is "
                "complete. Use lightning_modules.checkpoint_io.AsyncCompleteCheckpointIO."
            )
        if type(current) is TorchCheckpointIO:
            strategy.checkpoint_io = CompleteCheckpointIO()
        if isinstance(strategy, FSDP2Strategy):  # gathered weights cannot be inference tensors
            for loop in (self.trainer.validate_loop, self.trainer.test_loop, self.trainer.predict_loop):
                loop.inference_mode = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what was learned, and add what an exact resume needs."""
        checkpoint["state_dict"] = (
            self.adapter.tensors()
        )  # sharded ones are gathered or divided by the strategy
        checkpoint["optimizer_settings"] = [settings(one) for one in self.trainer.optimizers]
        checkpoint["left_out"] = self.left_out
        checkpoint["rng_states"] = gathered(rng_state())
        checkpoint["counters"] = dict(self.counters())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` kept.

        Raises:
            ValueError: If the checkpoint does not fit model and adapter.
        """
        if self._trainer is not None:
            savers = [one for one in self._trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
            folders = [str(one.dirpath) for one in savers if one.dirpath]
            drop_foreign_paths(checkpoint.get("callbacks", {}), folders)
        self.adapter.load_state_dict(checkpoint["state_dict"])
        if self._trainer is None and checkpoint.get("left_out"):  # rebuilt by load_from_checkpoint
            rank_zero_warn(
                f"The checkpoint does not hold {', '.join(checkpoint['left_out'])}: what was given there (a lambda or "
                "a key, say) cannot or must not be saved. The default is used unless you pass it again."
            )
        checkpoint["state_dict"] = {}  # done; nothing is left for Lightning to load
        if self._trainer is None or not isinstance(self._trainer.strategy, FSDP2Strategy):
            checkpoint["optimizer_states"] = whole_tensors(checkpoint.get("optimizer_states", []))
        self._saved_settings = checkpoint.get("optimizer_settings", [])
        self._pending_rng = checkpoint.get("rng_states")
        self.load_counters(checkpoint.get("counters", {}))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights by name; the empty dict that `on_load_checkpoint` leaves loads nothing."""
        if not state_dict:
            return nn.modules.module._IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict, assign)

    def counters(self) -> Mapping[str, int]:
        """Return counts that a resumed run must continue from. A subclass with counts overrides this."""
        return {}

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Restore what `counters` returned."""

    def on_train_start(self) -> None:
        """Finish a resume: the configuration's optimiser settings win, then random states come back.

        Random states last, after everything that draws at start-up.
        """
        for optimizer, saved in zip(self.trainer.optimizers, self._saved_settings, strict=False):
            for change in override_restored(optimizer, saved, self.lr_schedulers()):
                rank_zero_warn(f"{change}: going on with the configuration's.")
        self._saved_settings = []
        if self._pending_rng is not None and self.global_rank < len(self._pending_rng):
            set_rng_state(self._pending_rng[self.global_rank])
        elif self.global_rank > 0:  # all ranks are seeded alike, but must not draw the same tokens
            torch.manual_seed(torch.initial_seed() + self.global_rank)
        self._pending_rng = None
