"""One GRPO step on two gloo ranks; started by test_update.py, which compares it with one process."""

from __future__ import annotations

import sys
from datetime import timedelta

import lightning.pytorch as lightning
import torch
from fixed_rollouts import FixedGRPO, RecordGradients, first_gradients, loader
from lightning.pytorch.strategies import DDPStrategy
from peft import LoraConfig

from lightning_modules.grpo.reference import KL

KL_COEF = 0.0  # so that dead rows are really dropped


class KeepMetrics(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rng = torch.get_rng_state()

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}


class PerRankLoader(lightning.LightningDataModule):
    def __init__(self, uids):
        super().__init__()
        self.uids = uids

    def train_dataloader(self):
        return loader(self.uids, self.trainer.global_rank, self.trainer.world_size)


def main(model: str, out: str, *uids: str) -> None:
    lightning.seed_everything(3, verbose=False)
    module = FixedGRPO(
        rewards=[max],
        model=model,
        adapter=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        optimizer=lambda p: RecordGradients(p, lr=0.1),
        kl=KL(KL_COEF),
        max_tokens_per_microbatch=70,
    )
    keep = KeepMetrics()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[keep],
    )
    gradients = first_gradients(module, trainer, PerRankLoader(list(map(int, uids))))
    saved = {"gradients": gradients, "metrics": keep.metrics, "kl_coef": KL_COEF, "rng": keep.rng}
    torch.save(saved, f"{out}.{trainer.global_rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
