"""Reads and filters the rollouts that RolloutTable wrote. Needs the standard library alone."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

_COLUMNS = ("step", "uid", "task", "prompt", "completion", "finish", "tokens", "reward", "advantage")
# Damaged lines at the start of a file after which it is taken for one of another kind.
_PATIENCE = 100


@dataclass(frozen=True)
class Sample:
    """One line of the file; `None` is a reward that is not applicable."""

    step: int
    uid: str
    task: str
    prompt: str
    completion: str
    finish: str
    tokens: int
    reward: float | None
    advantage: float | None
    by_function: dict[str, float | None]
    extra: dict[str, str]

    @property
    def decisive(self) -> float | None:
        """The reward of the first function, which decides success in GRPOModule."""
        return next(iter(self.by_function.values()), self.reward)


Group = Sequence[Sample]  # the completions of one prompt in one step
Filter = Callable[[Group], Group]  # what it keeps of a group


def parse_line(line: bytes) -> Sample:
    """Read one rollout.

    Raises:
        ValueError: Saying what is wrong with the line.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON" if line.endswith(b"\n") else "is not finished") from None
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    if missing := [name for name in _COLUMNS if name not in row]:
        raise ValueError(f"has no {', '.join(missing)}")
    rest = {name: value for name, value in row.items() if name not in _COLUMNS}
    by_function = {
        name.removeprefix("reward/"): _number(name, rest.pop(name))
        for name in list(rest)
        if name.startswith("reward/")
    }
    return Sample(
        step=_integer("step", row["step"]),
        uid=_text(row["uid"]),
        task=_text(row["task"]),
        prompt=_conversation(row["prompt"]),
        completion=_text(row["completion"]),
        finish=_text(row["finish"]),
        tokens=_integer("tokens", row["tokens"]),
        reward=_number("reward", row["reward"]),
        advantage=_number("advantage", row["advantage"]),
        by_function=by_function,
        extra={name: _text(value) for name, value in rest.items()},
    )


def _integer(name: str, value: Any) -> int:
    if isinstance(value, int):
        return value
    raise ValueError(f"has a {name} that is no whole number")


def _number(name: str, value: Any) -> float | None:
    if value is None or value != value:
        return None
    if isinstance(value, int | float) and abs(value) <= sys.float_info.max:
        return float(value)
    raise ValueError(f"has a {name} that is no finite number")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _conversation(prompt: Any) -> str:
    """A prompt as text; of messages, each begins with its role."""
    if isinstance(prompt, list) and all(isinstance(one, dict) and "content" in one for one in prompt):
        return "\n".join(f"{_text(one.get('role'))}: {_text(one['content'])}" for one in prompt)
    return _text(prompt)


@dataclass
class RolloutFile:
    """Reads rollouts line by line and notes the lines that it cannot read."""

    path: Path
    damaged: int = 0
    notes: list[str] = field(default_factory=list)  # on the first few

    def __iter__(self) -> Iterator[Sample]:
        good = False
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    sample = parse_line(line)
                except ValueError as error:
                    self.damaged += 1
                    self.notes += [f"line {number} {error}"][: 5 - len(self.notes)]
                    if not good and self.damaged == _PATIENCE:
                        break
                else:
                    good = True
                    yield sample
        if not good:
            why = f": {self.notes[0]}" if self.notes else ": it is empty, so no step has ended yet"
            raise ValueError(f"{self.path} holds no rollouts{why}. RolloutTable writes rollouts.jsonl.")

    def damage(self) -> str:
        """Count the lines that could not be read, and name the first few."""
        more = ", ..." if self.damaged > len(self.notes) else ""
        return f"{self.damaged} ({', '.join(self.notes)}{more})"

    def groups(self) -> Iterator[Group]:
        """Put the completions of a prompt together. Holds one step at a time."""
        for _, samples in groupby(self, key=lambda one: one.step):
            by_uid: dict[str, list[Sample]] = {}
            for sample in samples:
                by_uid.setdefault(sample.uid, []).append(sample)
            yield from by_uid.values()


class Selection:
    """Filters rollouts, and can say which filter left none."""

    def __init__(self, filters: dict[str, Filter]) -> None:
        self.filters = filters
        self.left = [0] * (1 + len(filters))
        self.steps: list[int] = []
        self.rewards: list[float] = []
        self.tasks: dict[str, None] = {}

    def __call__(self, groups: Iterable[Group]) -> Iterator[tuple[Group, Group]]:
        """Yield what is left of each group of which something is, and the whole group."""
        for group in groups:
            self._note(group)
            left = group
            for place, keep in enumerate(self.filters.values(), start=1):
                left = keep(left)
                self.left[place] += len(left)
            if left:
                yield left, group

    def _note(self, group: Group) -> None:
        self.left[0] += len(group)
        steps = [*self.steps, *(one.step for one in group)]
        rewards = [*self.rewards, *(one.reward for one in group if one.reward is not None)]
        self.steps = [min(steps), max(steps)]
        self.rewards = [min(rewards), max(rewards)] if rewards else []
        if len(self.tasks) < 8:
            self.tasks |= {one.task: None for one in group}

    def why_empty(self, path: Path) -> str:
        """Say how many rollouts there are, and what each filter left of them."""
        there = f"steps {self.steps[0]} to {self.steps[1]}, tasks {', '.join(self.tasks)}"
        if self.rewards:
            there += f", rewards {self.rewards[0]:g} to {self.rewards[1]:g}"
        end = self.left.index(0)
        leaves = [
            f"{name} leaves {left}" for name, left in zip(self.filters, self.left[1 : end + 1], strict=False)
        ]
        return f"{path} has {self.left[0]} rollouts ({there}). {', '.join(leaves)}. Widen that filter."


def is_dead(group: Group) -> bool:
    """Tell whether a group teaches nothing: its advantages are all zero."""
    return not any(one.advantage for one in group)


def find_rollouts(path: Path) -> Path:
    """Return the file of rollouts: `path` itself, or the one in this folder.

    Raises:
        ValueError: If there is none.
    """
    remedy = "Name a rollouts.jsonl, or the folder of a run with the RolloutTable callback."
    if not path.exists():
        raise ValueError(f"{path} does not exist. {remedy}")
    if not path.is_dir():
        return path
    if (path / "rollouts.jsonl").is_file():
        return path / "rollouts.jsonl"
    inside = [
        str(one) for depth in ("*", "*/*", "*/*/*") for one in sorted(path.glob(f"{depth}/rollouts.jsonl"))
    ]
    raise ValueError(f"{path} holds no rollouts.jsonl. {f'There is {inside[-1]}.' if inside else remedy}")


def make_filters(
    step: str | None,
    task: str | None,
    uid: str | None,
    min_reward: float | None,
    max_reward: float | None,
    contains: str,
    live: bool,
) -> dict[str, Filter]:
    """Return what to keep, by the option that asks for it; `show_rollouts` says what each means.

    Raises:
        ValueError: If `step` is none.
    """
    filters: dict[str, Filter] = {}
    if step is not None:
        low, high = _step_range(step)
        filters[f"--step {step}"] = _each(lambda one: low <= one.step <= high)
    if task is not None:
        filters[f"--task {task}"] = _each(lambda one: one.task == task)
    if uid is not None:
        filters[f"--uid {uid}"] = _each(lambda one: one.uid == uid)
    if live:  # while the group is whole
        filters["--live"] = lambda group: [] if is_dead(group) else group
    if min_reward is not None:
        filters[f"--min_reward {min_reward:g}"] = _each(
            lambda one: one.reward is not None and one.reward >= min_reward
        )
    if max_reward is not None:
        filters[f"--max_reward {max_reward:g}"] = _each(
            lambda one: one.reward is not None and one.reward <= max_reward
        )
    if contains:
        filters[f"--contains {contains}"] = _each(lambda one: contains in one.completion)
    return filters


def _each(keep: Callable[[Sample], bool]) -> Filter:
    return lambda group: [one for one in group if keep(one)]


def _step_range(text: str) -> tuple[int, float]:
    match = re.fullmatch(r"(\d+)(-(\d*))?", text)
    if match is None or (match[3] and int(match[3]) < int(match[1])):
        raise ValueError(f"step={text!r} is no step. Write 10, 10-20 or 10-.")
    low = int(match[1])
    return low, low if match[2] is None else int(match[3]) if match[3] else float("inf")
