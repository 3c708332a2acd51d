"""Keeps the pass rate of each prompt, and lets prompts that teach more come more often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as lightning
import torch

from lightning_modules.distributed import gathered
from lightning_modules.grpo.curriculum import PassRates, uncertainty
from lightning_modules.grpo.module import GRPOModule


class PromptCurriculum(lightning.Callback):
    """Weighs the training rows of each epoch by the pass rates of the epochs before.

    The DataModule must offer `weigh_rows`, as ours do. Logs `train/pass_rate_known`, the share of rows seen so far.
    Pass rates are those of the draws that the run makes anyway; they are kept in checkpoints.

    Args:
        weight: From pass rate to weight; None keeps pass rates and weighs all rows alike.
        decay: What an earlier completion weighs after one more visit of its prompt; see `PassRates`.
        prior: Pass rate of a prompt that was never seen.
    """

    def __init__(
        self, weight: Callable[[float], float] | None = uncertainty, decay: float = 0.5, prior: float = 0.5
    ) -> None:
        self.weight = weight
        self.pass_rates = PassRates(decay, prior)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Check that there are prompts to weigh.

        Raises:
            ValueError: If the module makes no rollouts, or the DataModule cannot weigh rows.
        """
        if not isinstance(pl_module, GRPOModule):
            raise ValueError(
                f"PromptCurriculum learns from the rollouts of a GRPOModule; {type(pl_module).__name__} makes none. "
                "Leave it out."
            )
        data = getattr(trainer, "datamodule", None)
        if stage == "fit" and self.weight is not None and not hasattr(data, "weigh_rows"):
            raise ValueError(
                "PromptCurriculum needs a DataModule with `weigh_rows`, such as those of Quiver. Use one, or set "
                "weight: null to keep pass rates only."
            )

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take note of the draws of all ranks."""
        mine = []
        if "rollout" in outputs:
            G = outputs["rollout"].group_size
            uids = outputs["rollout"].batch.uids[::G]
            mine = list(zip(uids, outputs["scores"].success.view(-1, G).tolist(), strict=True))
        for part in gathered(mine):
            for uid, successes in part:
                self.pass_rates.observe(uid, successes)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Weigh the rows of the next epoch."""
        data: Any = getattr(trainer, "datamodule", None)
        if self.weight is None or data is None:
            return
        num_rows = data.num_rows("train")
        weights = [self.weight(self.pass_rates[uid]) for uid in range(num_rows)]
        data.weigh_rows(torch.tensor(weights, dtype=torch.float64))
        pl_module.log("train/pass_rate_known", len(self.pass_rates) / num_rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the pass rates."""
        return {"pass_rates": self.pass_rates.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the pass rates."""
        self.pass_rates.load_state_dict(state_dict["pass_rates"])
