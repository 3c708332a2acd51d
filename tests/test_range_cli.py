"""Numbers out of range in a YAML, through the door that users take: one line, before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
import yaml
from peft import IA3Config, LoraConfig, OFTConfig
from small_runs import QUIET, write_run
from torch.optim import SGD, Adafactor, AdamW, Muon, lr_scheduler
from torch.utils.data import DataLoader

from datamodules.batches import TextBatch
from lightning_modules import SFTModule
from lightning_modules.cli import main

NAN, INF = float("nan"), float("inf")


def sgd(**numbers):
    return {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, **numbers}}}


def own(name, **numbers):
    return {"class_path": name, "init_args": numbers}


# A case of each place where numbers stand; the classes by themselves are in test_ranges.py.
CASES = [
    ({"init_args": {"gradient_clip_val": -1}}, "gradient_clip_val=-1.0: must be above 0, or null. null does"),
    ({"init_args": {"scoring": {"weights": [NAN]}}}, "scoring.weights[0]=nan: must be a finite number."),
    (
        {"init_args": {"scoring": {"weights": [1, 2]}}},
        "scoring.weights=[1.0, 2.0]: must be 1 numbers, not 2.",
    ),
    (
        {"init_args": {"advantage": own("GroupAdvantage", eps=-1.0)}},
        "advantage.eps=-1.0: must be at least 0.",
    ),
    (
        {"init_args": {"adapter": own("lightning_modules.SparseAdapter", density=NAN)}},
        "density=nan: must be a finite number above 0 and at most 1.",
    ),
    ({"init_args": sgd(lr=-0.1)}, "optimizer: Invalid learning rate: -0.1. Correct its settings."),
    (
        {"data": {"val_size": NAN, "val_file": None}},
        "val_size=nan: must be a finite number of at least 0 and below 1.",
    ),
    ({"gradient_clip_val": NAN}, "trainer.gradient_clip_val=nan: must be a finite number above 0, or null."),
    ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches=0: must be at least 1, or null."),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_one_line_for_each_number_out_of_range(capsys):
    for options, message in CASES:
        assert main(["fit", "-c", write_run("nowhere", **options)]) == 1, options
        err = capsys.readouterr().err.removeprefix("Seed set to 1\n")
        assert err.startswith(f"quiver: error: {message}"), (options, err)
        assert err.count("\n") == 1, err
        assert {file.name for file in Path().iterdir()} == {"run.yaml", "train.jsonl"}
    assert main(["fit", "-c", write_run("nowhere"), "--seed_everything=-1"]) == 1
    assert capsys.readouterr().err == "quiver: error: seed_everything=-1: must be at least 0, or null.\n"


def test_text_becomes_a_number_where_it_is_one(capsys):
    """`1e-4` is text in YAML 1.1."""
    options = {
        "gradient_clip_val": "1e-1",
        "scoring": {"weights": ["1e0"]},
        "num_generations": "4",
        **sgd(lr="1e-4", momentum="0.9"),
    }
    Path("text.yaml").write_text(Path(write_run("nowhere", init_args=options)).read_text())
    assert "lr: 1e-4" in Path("text.yaml").read_text().replace("'", "")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "text.yaml", "--print_config"])
    assert stop.value.code == 0
    read = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert (read["gradient_clip_val"], read["scoring"]["weights"], read["num_generations"]) == (0.1, [1.0], 4)
    assert float(read["optimizer"]["init_args"]["lr"]) == 1e-4
    assert read["optimizer"]["init_args"]["momentum"] == 0.9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_args": {"num_generations": 2.0}}, ['"num_generations": Expected int', "2.0"]),
        ({"init_args": {"num_generations": "1e2"}}, ['"num_generations": Expected int', "100.0"]),
        ({"init_args": {"gradient_clip_val": True}}, ['"gradient_clip_val": Expected float', "True"]),
        ({"init_args": {"gradient_clip_val": "one"}}, ['"gradient_clip_val": Expected float', "one"]),
        ({"init_args": sgd(lr=True)}, ['"lr": Expected float']),
        ({"data": {"batch_size": True}}, ['"batch_size": Expected int', "True"]),
        ({"max_steps": "1e2"}, ['"trainer.max_steps": Expected int', "100.0"]),
    ],
)
def test_what_is_no_number_of_the_kind_is_refused(options, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", write_run("nowhere", **options), "--print_config"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_plan_checks_lengths_before_it_reads_the_model(capsys):
    assert main(["plan", write_run("nowhere"), "--prompt_tokens", "0"]) == 1
    assert capsys.readouterr().err.endswith("quiver: error: prompt_tokens=0: must be at least 1.\n")


# ---------------------------------------------------------------- without the command line


OWN = {name: value for name, value in QUIET.items() if name != "default_root_dir"}
ROWS = TextBatch(prompts=["1+1="], answers=["2"], tasks=["sums"], uids=[0], columns={}, choices=[[]])


def warmed_up(optimizer):
    return lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": lambda p: SGD(p, lr=0.0, momentum=0.9)},
        {"optimizer": lambda p: Adafactor(p, lr=1e-3)},  # beta2_decay is negative, an eps is None
        {"optimizer": lambda p: Muon(p, lr=1e-3)},
        {"optimizer": lambda p: AdamW(p, lr=torch.tensor(1e-3), foreach=False)},
        {"optimizer": lambda p: torch.optim.LBFGS(p), "lr_scheduler": warmed_up},  # a step needs the loss
        {"lr_scheduler": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10)},
        {"lr_scheduler": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=3)},
        {
            "lr_scheduler": lambda o: lr_scheduler.SequentialLR(
                o, [warmed_up(o), lr_scheduler.ConstantLR(o)], milestones=[5]
            )
        },
        {"adapter": IA3Config()},
        {"adapter": OFTConfig(oft_block_size=8)},
    ],
)
def test_usual_optimisers_schedules_and_adapters_pass(options):
    SFTModule(model="nowhere", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": lambda p: SGD(p, lr=NAN)}, "optimizer.lr=nan: must be a finite number"),
        ({"optimizer": lambda p: SGD(p, lr=0.1, weight_decay=INF)}, "optimizer.weight_decay=inf: must be"),
        ({"optimizer": lambda p: SGD(p, lr=0.1, momentum=1.5)}, "optimizer.momentum=1.5: must be"),
        ({"optimizer": lambda p: AdamW(p, eps=INF)}, "optimizer.eps=inf: must be a finite number"),
        ({"optimizer": lambda p: AdamW(p, betas=(0.9, 1.0))}, "optimizer: Invalid beta parameter at index 1"),
        ({"optimizer": lambda p: Adafactor(p, beta2_decay=NAN)}, "optimizer"),
        (
            {"lr_scheduler": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10, eta_min=NAN)},
            "lr_scheduler.eta_min=nan: must be a finite number",
        ),
        ({"lr_scheduler": lambda o: lr_scheduler.StepLR(o, step_size=0)}, "lr_scheduler: "),
        (
            {"lr_scheduler": lambda o: lr_scheduler.ExponentialLR(o, gamma=-0.9)},
            "lr_scheduler.gamma=-0.9: must be at least 0",
        ),
        (
            {"adapter": LoraConfig(lora_dropout=1.5)},
            "adapter.lora_dropout=1.5: must be at least 0 and below 1",
        ),
        ({"adapter": LoraConfig(r=-4)}, "adapter.r=-4: must be at least 1"),
        ({"adapter": LoraConfig(lora_alpha=0)}, "adapter.lora_alpha=0: must be above 0"),
        ({"adapter": LoraConfig(rank_pattern={"q": 0})}, "adapter.rank_pattern['q']=0: must be at least 1"),
        ({"adapter": LoraConfig(rank_pattern={"q": 2.0})}, "adapter.rank_pattern['q']=2.0: must be a whole"),
        ({"adapter": LoraConfig(alpha_pattern={"q": NAN})}, "adapter.alpha_pattern['q']=nan: must be"),
        ({"adapter": OFTConfig(oft_block_size=8, eps=NAN)}, "adapter.eps=nan: must"),
    ],
)
def test_numbers_of_parts_that_are_not_ours_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as found:
        SFTModule(model="nowhere", **options)
    assert "\n" not in str(found.value)


def test_a_schedule_inside_another_is_looked_at():
    def nested(optimizer):
        inner = lr_scheduler.CosineAnnealingLR(optimizer, T_max=10**6, eta_min=-1e-3)
        return lr_scheduler.SequentialLR(optimizer, [warmed_up(optimizer), inner], milestones=[5])

    with pytest.raises(ValueError, match=r"lr_scheduler\.eta_min=-0\.001: must be at least 0"):
        SFTModule(model="nowhere", lr_scheduler=nested)


def test_a_learning_rate_below_zero_of_a_function_is_found():
    with pytest.raises(ValueError, match=r"optimizer\.lr=-.*: must be at least 0"):
        SFTModule(
            model="nowhere", lr_scheduler=lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 - step / 50)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_every_n_steps": -1}, r"trainer\.log_every_n_steps=-1: must be at least 0"),
        ({"max_steps": 2.5}, r"trainer\.max_steps=2\.5: must be a whole number"),
        ({"gradient_clip_val": NAN}, r"trainer\.gradient_clip_val=nan: must be a finite number"),
    ],
)
def test_a_trainer_of_ones_own_is_checked_before_the_model_is_loaded(options, message, tmp_path):
    trainer = lightning.Trainer(default_root_dir=tmp_path, **{**OWN, **options})
    with pytest.raises(ValueError, match=message):
        trainer.fit(SFTModule(model="nowhere"), DataLoader([ROWS], batch_size=None))


def test_a_learning_rate_that_falls_below_zero_late_stops_the_run(tiny_model, tmp_path):
    late = []
    module = SFTModule(
        model=tiny_model,
        lr_scheduler=lambda o: lr_scheduler.LambdaLR(o, lambda step: -1.0 if late and step == 2 else 1.0),
    )
    late.append(True)
    trainer = lightning.Trainer(default_root_dir=tmp_path, **{**OWN, "max_steps": 4})
    with pytest.raises(ValueError, match=r"optimizer\.lr=-.*: must be at least 0"):
        trainer.fit(module, DataLoader([ROWS] * 4, batch_size=None))
    assert trainer.global_step == 2
