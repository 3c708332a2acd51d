"""`quiver rollouts` on the file of a real run."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from itertools import groupby

import lightning.pytorch as lightning
import pytest
import torch
from conftest import REPOSITORY
from peft import LoraConfig

from callbacks import RolloutTable
from datamodules import ArithmeticDataModule
from lightning_modules import GRPOModule
from lightning_modules.cli import main
from lightning_modules.grpo.viewer import visible
from lightning_modules.sampling import Sampling

VERDICT = re.compile(
    r"^  (\+ right|- wrong|\? no reward)  reward (\S+)  advantage (\S+)  tokens (\d+)  (.*)$", re.MULTILINE
)
TITLE = re.compile(r"^step (\d+)  \S+  prompt (\d+)  \d+ of 3 right.*$", re.MULTILINE)


def correct(completions, answer, log_extra, **columns):
    """1 or 0; nothing on sums that 3 divides, and one value for the others that are even."""
    log_extra("note", ["[bold]\x1b[31m" for _ in completions])
    return [
        None if int(gold) % 3 == 0 else 1.0 if int(gold) % 2 == 0 else float(sum(map(ord, text)) % 2)
        for text, gold in zip(completions, answer, strict=True)
    ]


def short(completions, **columns):
    return [1 / (1 + len(text)) for text in completions]


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """The folder of a run of 6 steps, 4 prompts, 3 completions of random bytes."""
    folder = tmp_path_factory.mktemp("run")
    lightning.seed_everything(2, verbose=False)
    module = GRPOModule(
        rewards=[correct, short],
        model=tiny_model,
        adapter=LoraConfig(r=2, target_modules="all-linear"),
        num_generations=3,
        sampling=Sampling(max_new_tokens=8, temperature=2.0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    )
    lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[RolloutTable(groups_per_step=99)],
    ).fit(module, ArithmeticDataModule(batch_size=4, train_size=24, val_size=1, val_batch_size=1))
    return folder


@pytest.fixture(scope="module")
def rows(run):
    lines = (run / "rollouts.jsonl").read_bytes().split(b"\n")
    return [json.loads(line) for line in lines if line]


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # main appends the current folder


@pytest.fixture
def show(capsys):
    def call(*arguments, code=0):
        assert main(["rollouts", *map(str, arguments)]) == code
        return capsys.readouterr()

    return call


def group_of(row):
    return row["step"], row["uid"]


def as_shown(value, sign=""):
    return "-" if value is None else f"{value:{sign if value else ''}.3g}"


def verdicts(rows):
    words = {None: "? no reward", 0.0: "- wrong", 1.0: "+ right"}
    return [
        (
            words[row["reward/correct"]],
            as_shown(row["reward"]),
            as_shown(row["advantage"], "+"),
            str(row["tokens"]),
        )
        for row in rows
    ]


def shown_verdicts(out):
    return [match.groups()[:4] for match in VERDICT.finditer(out)]


def test_all_of_a_run(run, rows, show):
    out = show(run, "--limit", 99).out
    assert len(rows) == 6 * 4 * 3
    assert shown_verdicts(out) == verdicts(rows)
    assert {one[0] for one in verdicts(rows)} == {"+ right", "- wrong", "? no reward"}
    assert [tuple(map(int, pair)) for pair in TITLE.findall(out)] == [
        key for key, _ in groupby(rows, group_of)
    ]
    assert all(one.isprintable() or one == "\n" for one in out)
    assert "\\x" in out  # random bytes
    assert out.count("      note: [bold]\\x1b[31m\n") == len(rows)
    for row in rows:
        assert visible(row["completion"]).plain.partition("\n")[0] in out
        assert f"  {row['prompt']}\n" in out
    dead = [all(not one["advantage"] for one in group) for _, group in groupby(rows, group_of)]
    assert out.count("dead: no advantage") == sum(dead)
    assert True in dead
    assert False in dead


FILTERS = {
    "--step 2": lambda row: row["step"] == 2,
    "--step 2-3": lambda row: 2 <= row["step"] <= 3,
    "--step 4-": lambda row: row["step"] >= 4,
    "--min_reward 1.05": lambda row: row["reward"] >= 1.05,
    "--max_reward 0.2": lambda row: row["reward"] <= 0.2,
    "--task default": lambda row: row["task"] == "default",
    "--uid 3": lambda row: row["uid"] == 3,
    "--contains >": lambda row: ">" in row["completion"],
}


@pytest.mark.parametrize("options", [*FILTERS, "--step 2-5 --max_reward 1.1 --contains >"])
def test_filters(run, rows, show, options):
    parts = re.split(r" (?=--)", options)
    keep = [FILTERS.get(part) or (lambda row: row["reward"] <= 1.1) for part in parts]
    keep = [
        (lambda row: 2 <= row["step"] <= 5) if part == "--step 2-5" else one
        for part, one in zip(parts, keep, strict=True)
    ]
    wanted = [row for row in rows if all(one(row) for one in keep)]
    assert wanted
    assert shown_verdicts(show(run, "--limit", 99, *options.split()).out) == verdicts(wanted)


def test_live_groups_and_success(run, rows, show):
    live = {group_of(row) for row in rows if row["advantage"]}
    wanted = verdicts(row for row in rows if group_of(row) in live)
    assert shown_verdicts(show(run, "--limit", 99, "--live", "true").out) == wanted
    assert "+ right" not in show(run, "--success", 1.5).out


def test_some_of_a_group_says_so(run, rows, show):
    group = [row for row in rows if group_of(row) == group_of(rows[0])]
    kept = [row for row in group if row["reward"] == max(one["reward"] for one in group)]
    assert len(kept) < 3
    out = show(run, "--step", 1, "--uid", rows[0]["uid"], "--min_reward", kept[0]["reward"]).out
    assert f"  {len(kept)} shown\n" in out


@pytest.mark.parametrize("name", ["reward", "step", "tokens"])
def test_sort_and_limit(run, rows, show, name):
    groups = [list(group) for _, group in groupby(rows, group_of)]
    groups = [sorted(group, key=lambda row: -row[name]) for group in groups]
    groups.sort(key=lambda group: -group[0][name])
    out = show(run, "--sort", name, "--limit", 5).out
    assert shown_verdicts(out) == verdicts(row for group in groups[:5] for row in group)
    assert out.endswith("More prompts match: --limit 10 shows more.\n")
    assert "More prompts" not in show(run, "--sort", name, "--limit", len(groups)).out


def test_summary(run, rows, show):
    header, *lines = show(run, "--summary", "true").out.splitlines()
    assert header.split() == [*"step rollouts reward truncated tokens dead groups correct short".split()]  # noqa: SIM905
    assert len(lines) == 6

    def mean(values):
        values = [value for value in values if value is not None]
        return as_shown(sum(values) / len(values)) if values else "-"

    for step, line in enumerate(lines, start=1):
        ours = [row for row in rows if row["step"] == step]
        live = {row["uid"] for row in ours if row["advantage"]}
        share = f"{sum(row['finish'] == 'length' for row in ours) / 12:.0%}"
        means = [
            mean(row[name] for row in ours) for name in ("reward", "tokens", "reward/correct", "reward/short")
        ]
        expected = [str(step), "12", means[0], share, means[1], str(4 - len(live)), "of", "4", *means[2:]]
        assert line.split() == expected
    assert len(show(run, "--summary", "true", "--step", "2-3").out.splitlines()) == 3


def test_svg(run, show, tmp_path):
    target = tmp_path / "new" / "picture.svg"
    printed = show(run, "--limit", 3, "--svg", target).out
    text = target.read_text(encoding="utf-8")
    shown = "".join(ElementTree.fromstring(text).itertext()).replace("\xa0", " ")
    assert len(VERDICT.findall(printed)) == 9
    assert shown.count("advantage") == 9 + printed.count("dead: no advantage")
    assert not re.search(r"url\(['\"]?http|@font-face", text)  # it fetches nothing


def test_the_picture_in_the_docs():
    text = (REPOSITORY / "docs" / "images" / "rollouts.svg").read_text(encoding="utf-8")
    assert len(text) < 100_000
    shown = "".join(ElementTree.fromstring(text).itertext()).replace("\xa0", " ")
    assert "+ right" in shown
    assert "- wrong" in shown
    assert "quiver rollouts" in shown
    assert not re.search(r"/(home|work|tmp|root|Users)/", text)
