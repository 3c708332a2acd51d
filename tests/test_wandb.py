"""A real offline W&B run, read back from the file that `wandb sync` would upload."""

from __future__ import annotations

import csv
import json
import math
import struct
import time

import pytest
import wandb
import yaml
from PIL import Image

from lightning_modules.cli import main

STEPS, TABLE_EVERY = 6, 3


def records(path):
    """The records of a .wandb file: a LevelDB log with a header of 7 bytes and blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    offset, parts = 7, b""
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        payload = data[offset + 7 : offset + 7 + length]
        if len(payload) < length:
            return  # W&B's own process is writing it
        offset += 7 + length
        parts = payload if kind in (1, 2) else parts + payload  # full, first; middle, last
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def items(entries):
    return {".".join(entry.nested_key) or entry.key: json.loads(entry.value_json) for entry in entries}


def of_kind(path, kind):
    return [getattr(record, kind) for record in records(path) if record.WhichOneof("record_type") == kind]


def spread(completions, **columns):
    """A reward that differs within almost every group."""
    return [sum(map(ord, text)) % 7 for text in completions]


CONFIGURATION = """
seed_everything: 3
model:
  class_path: GRPOModule
  init_args:
    model: {model}
    adapter: {{class_path: peft.LoraConfig, init_args: {{r: 4, target_modules: all-linear}}}}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
    rewards:
      - test_wandb.spread
      - class_path: lightning_modules.grpo.rewards.LengthReward
        init_args: {{target: 1, maximum: 8}}
    num_generations: 4
    sampling: {{max_new_tokens: 8}}
    num_val_generations: 2
data:
  class_path: ArithmeticDataModule
  init_args: {{batch_size: 3, train_size: 18, val_size: 4}}
trainer:
  accelerator: cpu
  max_epochs: 1
  val_check_interval: 3
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}
  logger:
    - class_path: lightning.pytorch.loggers.CSVLogger
      init_args: {{save_dir: {folder}, name: "", version: ""}}
    - class_path: lightning.pytorch.loggers.WandbLogger
      init_args: {{project: quiver, save_dir: {folder}, offline: true}}
  callbacks:
    - {{class_path: RolloutTable, init_args: {{groups_per_step: 2, table_every_n_steps: {table_every}}}}}
    - class_path: LearningCurve
    - class_path: AdapterExport
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {folder}/checkpoints, monitor: val/reward, mode: max}}
"""


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """The folder of a finished run, and the path of its .wandb file."""
    folder = tmp_path_factory.mktemp("wandb_run")
    file = folder / "run.yaml"
    file.write_text(CONFIGURATION.format(model=tiny_model, folder=folder, table_every=TABLE_EVERY))
    wandb.finish()  # WandbLogger would go on with a run that another test left open
    assert main(["fit", "-c", str(file)]) == 0
    wandb.finish()
    runs = [place for place in (folder / "wandb").iterdir() if place.is_dir() and not place.is_symlink()]
    assert len(runs) == 1
    [written] = runs[0].glob("run-*.wandb")
    for _ in range(300):  # W&B's own process may flush after `finish` returns
        if of_kind(written, "exit"):
            break
        time.sleep(0.1)
    return folder, written


def test_the_run_is_complete(run):
    _, written = run
    [one] = of_kind(written, "run")
    assert one.project == "quiver"
    [end] = of_kind(written, "exit")
    assert end.exit_code == 0


def test_scalars_equal_the_csv(run):
    """Every value of metrics.csv stands in the history at its step, and the history holds no others."""
    folder, written = run
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    in_csv = {
        (name, int(row["step"]), round(float(value), 6))
        for row in rows
        for name, value in row.items()
        if value and name.startswith(("train/", "val/")) and not math.isnan(float(value))
    }
    in_history = {
        (name, values["trainer/global_step"], round(float(value), 6))
        for values in map(items, (record.item for record in of_kind(written, "history")))
        for name, value in values.items()
        if name.startswith(("train/", "val/")) and not math.isnan(float(value))
    }
    assert in_history == in_csv
    names = {name for name, *_ in in_csv}
    assert {"train/reward", "train/entropy", "train/grad_norm", "train/tokens"} <= names
    assert {"train/dead_groups", "val/reward", "val/mean@2", "val/pass@2"} <= names
    steps = sorted(step for name, step, _ in in_csv if name == "train/completion_length")
    assert steps == list(range(STEPS))
    assert len({step for name, step, _ in in_csv if name == "val/reward"}) == 2


def test_the_table_shows_the_rollouts_of_its_step(run):
    folder, written = run
    lines = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS * 2 * 4  # steps x groups x G
    files = [items(record.item) for record in of_kind(written, "history")]
    paths = [values["rollouts.path"] for values in files if "rollouts.path" in values]
    assert len(paths) == STEPS // TABLE_EVERY
    for number, path in enumerate(paths, start=1):
        table = json.loads((written.parent / "files" / path).read_text())
        rows = [line for line in lines if line["step"] == number * TABLE_EVERY]
        assert table["columns"] == list(rows[0])
        expected = {"prompt", "completion", "reward", "advantage", "reward/spread", "reward/LengthReward"}
        assert expected <= set(table["columns"])
        assert table["data"] == [list(row.values()) for row in rows]


def test_the_learning_curve_is_a_picture(run):
    folder, written = run
    values = [items(record.item) for record in of_kind(written, "history")]
    [names] = [value["learning_curve.filenames"] for value in values if "learning_curve.filenames" in value]
    logged = written.parent / "files" / names[0]
    with Image.open(logged) as picture:
        assert picture.format == "PNG"
        assert picture.width > 800
        assert picture.height > 500
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10  # not blank
    assert logged.read_bytes() == (folder / "learning_curve.png").read_bytes()


def test_the_config_holds_hyper_parameters_and_the_yaml(run, tiny_model):
    folder, written = run
    updates = [items(record.update) for record in of_kind(written, "config")]
    config = {name: value for update in updates for name, value in update.items()}
    model = config["model"]
    assert model["model"] == tiny_model
    assert model["num_generations"] == 4
    text = config["config"]
    assert text == (folder / "config.yaml").read_text()
    full = yaml.safe_load(text)
    assert full["model"]["init_args"]["rewards"][1]["init_args"]["maximum"] == 8
    assert full["model"]["init_args"]["kl"]["coef"] == 0  # defaults too
    assert full["trainer"]["val_check_interval"] == 3
    assert full["seed_everything"] == 3


def test_the_adapters_are_artifacts(run):
    folder, written = run
    artifacts = of_kind(written, "artifact")
    adapters = {one.name.rpartition("-")[0]: one for one in artifacts if one.type == "adapter"}
    assert set(adapters) == {"adapter", "adapter-best"}
    for name, one in adapters.items():
        files = {entry.path for entry in one.manifest.contents}
        assert files == {file.name for file in (folder / name).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files
