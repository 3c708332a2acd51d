"""The training loader inside a real Trainer: what Lightning saves, loads and counts."""

from itertools import chain

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import TextDataModule

ROWS = 14


class Numbers(TextDataModule):
    def __init__(self, num_val=0, **kwargs):
        super().__init__(**kwargs)
        self.num_val = num_val

    def rows(self, split):
        count = {"train": ROWS, "val": self.num_val, "test": 0}[split]
        return [{"prompt": f"{split} {i}", "answer": str(i)} for i in range(count)]


class Recorder(pl.LightningModule):
    """One parameter whose value depends on the order of the rows; manual optimisation as in GRPO if asked."""

    def __init__(self, manual=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.1))
        self.automatic_optimization = not manual
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.uids)
        loss = (self.weight - sum(batch.uids)).square()
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch.uids)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(folder, callbacks=(), **kwargs):
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        logger=False,
        num_sanity_val_steps=0,
        **{"max_epochs": -1, **kwargs},
    )


@pytest.mark.parametrize("num_val", [0, 5])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("stop", [1, 3, 6, 7, 8, 13, 14, 15])
def test_stopped_and_resumed_equals_straight(tmp_path, stop, manual, num_val):
    straight = Recorder(manual)
    trainer(tmp_path, max_steps=21).fit(straight, datamodule=Numbers(num_val, batch_size=2))
    assert sorted(chain.from_iterable(straight.seen[:7])) == list(range(ROWS))
    assert straight.seen[:7] != straight.seen[7:14]

    first = Recorder(manual)
    run = trainer(tmp_path, max_steps=stop)
    run.fit(first, datamodule=Numbers(num_val, batch_size=2))
    run.save_checkpoint(tmp_path / "stop.ckpt")
    second = Recorder(manual)
    resumed = trainer(tmp_path, max_steps=21)
    resumed.fit(second, datamodule=Numbers(num_val, batch_size=2), ckpt_path=tmp_path / "stop.ckpt")
    assert first.seen + second.seen == straight.seen
    assert torch.equal(second.weight, straight.weight)
    assert resumed.global_step == 21
    assert len(first.validated + second.validated) == len(straight.validated)


@pytest.mark.parametrize(
    "when",
    [
        {"every_n_train_steps": 1},
        {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        {"every_n_epochs": 1},
    ],
)
def test_checkpoints_written_by_lightning_resume_exactly(tmp_path, when):
    straight = Recorder()
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **when)
    trainer(tmp_path, [saver], max_steps=15).fit(straight, datamodule=Numbers(5, batch_size=2))
    files = sorted(tmp_path.glob("step=*.ckpt"))
    assert len(files) >= (15 if "every_n_train_steps" in when else 2)
    for file in files:
        step = int(file.stem.removeprefix("step="))
        resumed = Recorder()
        trainer(tmp_path, max_steps=15).fit(resumed, datamodule=Numbers(5, batch_size=2), ckpt_path=file)
        assert resumed.seen == straight.seen[step:], file.name


def test_short_epochs_go_on_through_all_rows(tmp_path):
    limited = Recorder()
    trainer(tmp_path, max_steps=7, limit_train_batches=3).fit(limited, datamodule=Numbers(batch_size=2))
    assert sorted(chain.from_iterable(limited.seen)) == list(range(ROWS))
    resumed = Recorder()
    run = trainer(tmp_path, max_steps=3, limit_train_batches=3)
    run.fit(Recorder(), datamodule=Numbers(batch_size=2))
    run.save_checkpoint(tmp_path / "stop.ckpt")
    trainer(tmp_path, max_steps=7, limit_train_batches=3).fit(
        resumed, datamodule=Numbers(batch_size=2), ckpt_path=tmp_path / "stop.ckpt"
    )
    assert resumed.seen == limited.seen[3:]


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_another_batch_size_continues_the_stream_through_lightning(tmp_path, before, after):
    run = trainer(tmp_path, max_steps=2)
    first = Recorder()
    run.fit(first, datamodule=Numbers(batch_size=before))
    run.save_checkpoint(tmp_path / "stop.ckpt")
    second = Recorder()
    trainer(tmp_path, max_steps=10).fit(
        second, datamodule=Numbers(batch_size=after), ckpt_path=tmp_path / "stop.ckpt"
    )
    assert len(second.seen) == 8
    assert sorted(list(chain.from_iterable(first.seen + second.seen))[:ROWS]) == list(range(ROWS))


def test_validation_is_skipped_without_rows_and_complete_with_rows(tmp_path):
    without, having = Recorder(), Recorder()
    trainer(tmp_path, max_steps=7).fit(without, datamodule=Numbers(0, batch_size=2))
    trainer(tmp_path, max_steps=14).fit(having, datamodule=Numbers(5, batch_size=2))
    assert without.validated == []
    assert list(chain.from_iterable(having.validated)) == [0, 1, 2, 3, 4] * 2


def test_overfit_batches_repeats_the_same_rows(tmp_path):
    module = Recorder()
    trainer(tmp_path, max_epochs=3, overfit_batches=2).fit(module, datamodule=Numbers(batch_size=2))
    assert module.seen == [[0, 1], [2, 3]] * 3


def test_reloading_dataloaders_does_not_repeat_the_first_epoch(tmp_path):
    plain, reloading = Recorder(), Recorder()
    trainer(tmp_path, max_steps=14).fit(plain, datamodule=Numbers(batch_size=2))
    data = Numbers(batch_size=2)
    trainer(tmp_path, max_steps=14, reload_dataloaders_every_n_epochs=1).fit(reloading, datamodule=data)
    assert reloading.seen == plain.seen
    again = Recorder()
    trainer(tmp_path, max_steps=14, reload_dataloaders_every_n_epochs=1).fit(again, datamodule=data)
    assert again.seen == plain.seen
