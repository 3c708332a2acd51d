"""`quiver rollouts` on files that are damaged, hostile or large, and its errors."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import own_environment, quiver

from lightning_modules.cli import main
from lightning_modules.grpo.rollout_file import RolloutFile
from lightning_modules.grpo.viewer import visible

SCRIPT = str(Path(sys.executable).parent / "quiver")


@pytest.fixture
def show(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # main appends the current folder

    def call(*arguments, code=0):
        assert main(["rollouts", *map(str, arguments)]) == code
        return capsys.readouterr()

    return call


def row(step=1, uid=1, completion="hi", **more):
    return {
        "step": step, "uid": uid, "task": "sums", "prompt": "1+1", "completion": completion, "finish": "stop",
        "tokens": 2, "reward": 1.0, "advantage": 0.0, "reward/f": 1.0, **more,
    }  # fmt: skip


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


HOSTILE = (
    "[red]x[/red] \x1b[2J\x1b]8;;http://a\x07 \x9b31m\r\b \u202e\u2028 :smile: \ud800\x00 e\u0301 \u6f22"
)
HARMLESS = (
    "[red]x[/red] \\x1b[2J\\x1b]8;;http://a\\x07 \\x9b31m\\r\\x08 \\u202e\\u2028 :smile: \\ud800\\x00 "
    "e\u0301 \u6f22"
)


def in_terminal(*arguments, **environment):
    """What the console script writes to a real terminal of 80 columns."""
    ours, theirs = pty.openpty()
    environment = {**own_environment(), "TERM": "xterm-256color", "COLUMNS": "80", **environment}
    process = subprocess.Popen([SCRIPT, "rollouts", *arguments], stdout=theirs, env=environment)
    os.close(theirs)
    parts = []
    try:
        while part := os.read(ours, 65536):
            parts.append(part)
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return b"".join(parts).decode().replace("\r\n", "\n")


def test_what_a_model_wrote_is_shown_and_not_interpreted(tmp_path, show):
    messages = [{"role": HOSTILE, "content": HOSTILE}, {"role": "user", "content": [HOSTILE]}]
    more = {"task": HOSTILE, "finish": HOSTILE, "note": HOSTILE, HOSTILE: 1, f"reward/{HOSTILE}": 2.0}
    file = write(tmp_path / "r.jsonl", row(completion=HOSTILE, prompt=messages, **more))
    out = show(file).out
    assert out.count(HARMLESS) == 8
    assert all(one.isprintable() or one == "\n" for one in out)
    summary = show(file, "--summary", "true").out
    assert HARMLESS in summary
    colours = in_terminal(str(file), COLUMNS="400")
    assert "\x1b[" in colours
    plain = re.sub(r"\x1b\[[\d;]*m", "", colours)
    assert all(one.isprintable() or one == "\n" for one in plain)
    assert plain.count(HARMLESS) == 8
    code, out, err = quiver("rollouts", str(file), PYTHONIOENCODING="ascii")
    assert (code, err) == (0, "")
    assert HARMLESS.replace("\u0301", "\\u0301").replace("\u6f22", "\\u6f22") in out


@given(st.text())
def test_every_text_is_printable(text):
    plain = visible(text).plain
    assert all(one.isprintable() or one in "\n\u200c\u200d" for one in plain)
    assert (plain == text) == all(one.isprintable() or one in "\n\u200c\u200d" for one in text)


def test_right_and_wrong_in_a_terminal(tmp_path):
    file = write(tmp_path / "r.jsonl", row(completion="word " * 40), row(completion="b", **{"reward/f": 0.0}))
    out = in_terminal(str(file))
    assert "  \x1b[1;32m+ right\x1b[0m  reward" in out
    assert "  \x1b[1;31m- wrong\x1b[0m  reward" in out
    plain = re.sub(r"\x1b\[[\d;]*m", "", out).splitlines()
    assert max(map(len, plain)) <= 80
    wrapped = [line for line in plain if "word" in line]
    assert len(wrapped) > 1
    assert all(line.startswith("      word") for line in wrapped)
    assert "\x1b" not in in_terminal(str(file), NO_COLOR="1", TERM="dumb")


def test_long_texts_lose_their_middle(tmp_path, show):
    file = write(tmp_path / "r.jsonl", row(completion="a" * 50 + "b" * 900 + "c" * 51), row(completion=""))
    out = show(file, "--chars", 101).out
    assert (
        f"      {'a' * 50}b\n      ... 900 characters left out; --chars 0 shows all ...\n      {'c' * 50}\n"
        in out
    )
    assert "      (empty)\n" in out
    assert f"{'b' * 900}{'c' * 51}\n" in show(file, "--chars", 0).out


def test_damaged_lines_are_named_and_skipped(tmp_path, show):
    broken = [
        "{]\n", "\n", "[1]\n", '{"step": 1}\n', row(reward="x"), row(step=1.5), row(advantage=10**400),
        "[" * 100_000 + "\n", row(step=2), '{"step": 3, "comp',
    ]  # fmt: skip
    captured = show(write(tmp_path / "r.jsonl", row(), *broken))
    assert re.findall(r"^step (\d)", captured.out, re.MULTILINE) == ["1", "2"]
    assert captured.err == (
        "Skipped damaged lines: 8 (line 2 is not JSON, line 4 is no JSON object, line 5 has no uid, task, prompt, "
        "completion, finish, tokens, reward, advantage, line 6 has a reward that is no finite number, "
        "line 7 has a step that is no whole number, ...).\n"
    )
    captured = show(write(tmp_path / "r.jsonl", row(reward=float("nan")), '{"step": 3, "comp'))
    assert captured.err == "Skipped damaged lines: 1 (line 2 is not finished).\n"
    assert "reward -" in captured.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["gone"], "gone does not exist. Name a rollouts.jsonl, or the folder of a run with the RolloutTable callback"),
        (["bare"], "bare holds no rollouts.jsonl. Name a rollouts.jsonl, or"),
        (["outer"], "outer holds no rollouts.jsonl. There is outer/version_0/rollouts.jsonl."),
        (["empty"], "empty holds no rollouts: it is empty, so no step has ended yet."),
        (["binary"], "binary holds no rollouts: line 1 is not JSON. RolloutTable writes rollouts.jsonl."),
        (["outer/version_0", "--step", "2-", "--task", "x"],
         "has 2 rollouts (steps 1 to 2, tasks sums, rewards 1 to 1). --step 2- leaves 1, --task x leaves 0. Widen"),
        (["outer/version_0", "--live", "true", "--summary", "true"], "--live leaves 0."),
        (["outer/version_0", "--step", "3-1"], "step='3-1' is no step. Write 10, 10-20 or 10-."),
        (["outer/version_0", "--limit", "0"], "limit=0: must be at least 1"),
        (["outer/version_0", "--summary", "true", "--sort", "step"], "sort='step' orders rollouts"),
    ],
)  # fmt: skip
def test_errors(tmp_path, monkeypatch, show, options, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("bare", "outer/version_0"):
        Path(folder).mkdir(parents=True)
    write(Path("outer/version_0/rollouts.jsonl"), row(), row(step=2))
    Path("empty").touch()
    Path("binary").write_bytes(bytes(range(256)) * 1000)
    captured = show(*options, code=1)
    assert captured.err.startswith("quiver: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [["--help"], ["r.jsonl"]])
def test_it_imports_neither_torch_nor_lightning(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    write(Path("r.jsonl"), row())
    command = [sys.executable, "-X", "importtime", SCRIPT]
    code, out, err = quiver("rollouts", *arguments, command=command)
    assert code == 0
    assert "--min_reward" in out or "+ right" in out
    imported = {line.rsplit("|", 1)[-1].strip() for line in err.splitlines() if "|" in line}
    assert "lightning_modules.grpo.rollout_file" in imported
    assert not {"torch", "lightning", "numpy", "transformers"} & imported


def test_a_reader_that_goes_away(tmp_path):
    file = write(tmp_path / "r.jsonl", *(row(uid=i, completion="x" * 500) for i in range(2000)))
    process = subprocess.Popen(
        [SCRIPT, "rollouts", str(file), "--limit", "2000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait()


@pytest.mark.parametrize("options", [[], ["--sort", "reward"], ["--summary", "true"]])
def test_a_large_file_is_not_held(tmp_path, show, options):
    line = json.dumps(row(completion="x" * 10_000))
    with (tmp_path / "rollouts.jsonl").open("w") as file:
        for step in range(1500):
            file.write(line.replace('"step": 1', f'"step": {step // 10}', 1) + "\n")
    show(tmp_path, *options)  # what is imported and cached
    tracemalloc.start()
    show(tmp_path, *options, "--max_reward", 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000 < (tmp_path / "rollouts.jsonl").stat().st_size / 3


def test_completions_of_a_prompt_come_together(tmp_path):
    file = write(tmp_path / "rollouts.jsonl", *(row(step, uid) for step in (1, 2) for uid in (7, 8, 7, 8)))
    groups = [[(one.step, one.uid) for one in group] for group in RolloutFile(file).groups()]
    assert groups == [[(step, uid)] * 2 for step in (1, 2) for uid in ("7", "8")]
