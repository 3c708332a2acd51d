"""A sparse SFT run on one or two gloo ranks; started by test_sparse_ddp.py, which compares them."""

from __future__ import annotations

import sys
from datetime import timedelta

import lightning.pytorch as lightning
import torch
from lightning.pytorch.strategies import DDPStrategy

from datamodules.batches import TextBatch
from datamodules.loader import EvalLoader
from lightning_modules import SparseAdapterModule
from lightning_modules.sparse import scores
from lightning_modules.sparse.schedules import FirstEpochs, GrowAndDrop, Static

RUNS = {
    "static": {"schedule": Static(2), "score": scores.snip},
    "static_global": {"schedule": Static(1), "score": scores.snip, "budget": "global", "density": 0.003},
    "fisher": {"schedule": Static(2), "score": scores.fisher},
    "first_epochs": {"schedule": FirstEpochs(2, batches=2), "score": scores.signed_sensitivity},
    "grow_and_drop": {"schedule": GrowAndDrop(2, 9, fraction=0.5), "score": scores.gradient_magnitude},
}
ROWS, BATCH = 24, 4


def text_batch(uids) -> TextBatch:
    prompts = [f"question {uid} {'x' * (uid * 3 % 11)}" for uid in uids]
    answers = [str(uid * 37 % 101) for uid in uids]
    return TextBatch(prompts, answers, ["t"] * len(uids), list(uids), {}, [[] for _ in uids])


class Rows(lightning.LightningDataModule):
    """Rank r of n has every n-th row, so that a step of all ranks is a batch of one process."""

    def train_dataloader(self):
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return EvalLoader(
            lambda rows: text_batch([i * ranks + rank for i in rows]), ROWS // ranks, BATCH // ranks
        )


class Record(lightning.Callback):
    """Keeps the choice and the values after each step."""

    def __init__(self) -> None:
        self.steps: list = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        deltas = pl_module.adapter.deltas
        self.steps.append({n: (d.indices.clone(), d.values.clone()) for n, d in deltas.items()})


def main(model: str, out: str, devices: str, *names: str) -> None:
    for name in names:
        lightning.seed_everything(3, verbose=False)
        module = SparseAdapterModule(
            model=model,
            # SGD: Adam would turn differences of rounding into steps of full size.
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            **{"density": 0.1, **RUNS[name]},
        )
        record = Record()
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=int(devices),
            strategy=strategy if int(devices) > 1 else "auto",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[record],
        )
        trainer.fit(module, Rows())
        with torch.no_grad():
            logits = module.model.eval()(input_ids=torch.arange(2, 26)[None]).logits
        torch.save({"steps": record.steps, "logits": logits}, f"{out}.{name}.{trainer.global_rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
