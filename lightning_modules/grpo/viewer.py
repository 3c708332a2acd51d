r"""`quiver rollouts`: shows what a GRPO run wrote and what it earned. Imports neither torch nor lightning.

What a model wrote is shown, never interpreted: control characters, which could clear a screen or reverse a
line, appear as escapes such as `\x1b`, and rich's markup is text like any other.
"""

from __future__ import annotations

import heapq
import io
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_modules.files import complete_file
from lightning_modules.grpo.rollout_file import (
    Group,
    RolloutFile,
    Sample,
    Selection,
    find_rollouts,
    is_dead,
    make_filters,
)
from lightning_modules.ranges import check_number, check_whole

_WIDE = 1 << 20  # nothing is wrapped in a pipe, where `grep` wants whole lines
# Joiners are part of the spelling of Persian, of Indian languages and of emoji.
_PLAIN = "\n\u200c\u200d"

_HEADERS = ("step", "rollouts", "reward", "truncated", "tokens", "dead groups")

_Found = Iterable[tuple[Group, Group]]  # what is shown of a group, and the whole of it


def show_rollouts(
    file: str,
    step: str | None = None,
    task: str | None = None,
    uid: str | None = None,
    min_reward: float | None = None,
    max_reward: float | None = None,
    contains: str = "",
    live: bool = False,
    sort: Literal["reward", "step", "tokens"] | None = None,
    limit: int = 10,
    chars: int = 1000,
    success: float = 1.0,
    summary: bool = False,
    svg: str | None = None,
) -> None:
    """Show the rollouts of a GRPO run: what it wrote, what it earned, and what was right.

    Args:
        file: The rollouts.jsonl that RolloutTable writes, or the folder of the run.
        step: One step (10) or several (10-20, 10-).
        task: Show this task only.
        uid: Show this prompt only, in all steps.
        min_reward: Smallest reward to show.
        max_reward: Largest reward to show.
        contains: Show completions with this text only.
        live: Show only groups that teach something: whose advantages are not all zero.
        sort: Largest first; without, as in the file.
        limit: Prompts to show, each with its completions. A summary shows every step.
        chars: Characters to show of a prompt or completion, the middle being left out; 0 shows all.
        success: Smallest reward of the first function that counts as right, as in the run's `scoring`.
        summary: Show a table with one line for each step instead.
        svg: Also write what was shown as a picture to this file.

    Raises:
        ValueError: If there is no such file, it holds no rollouts, no rollout passes the filters, or an
            option is wrong.
    """
    check_whole("limit", limit)
    check_whole("chars", chars, least=0)
    for name, value in {"min_reward": min_reward, "max_reward": max_reward, "success": success}.items():
        check_number(name, value, none=name != "success")
    if summary and sort:
        raise ValueError(f"sort={sort!r} orders rollouts, and a summary is by step. Leave one out.")
    reader = RolloutFile(find_rollouts(Path(file)))
    selection = Selection(make_filters(step, task, uid, min_reward, max_reward, contains, live))
    found = selection(reader.groups())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks
    screen, picture = _console(), _console(width=100, record=True, file=io.StringIO(), force_terminal=True)
    consoles = [screen if screen.is_terminal else _console(width=_WIDE), *([picture] if svg else [])]
    if summary:
        _show_summary(consoles, found)
    else:
        _show_groups(consoles, found, sort=sort, limit=limit, chars=chars, success=success)
    if reader.damaged:
        print(f"Skipped damaged lines: {reader.damage()}.", file=sys.stderr)  # noqa: T201
    if not selection.left[-1]:
        raise ValueError(selection.why_empty(reader.path))
    if svg:
        drawn = picture.export_svg(title="quiver rollouts")
        with complete_file(Path(svg)) as target:  # without fonts, which a browser would fetch from elsewhere
            target.write_text(re.sub(r"@font-face {.*?}", "", drawn, flags=re.DOTALL), encoding="utf-8")


def _console(**options: Any) -> Console:
    return Console(highlight=False, markup=False, emoji=False, **options)


def visible(text: str, style: str = "") -> Text:
    r"""Make text that prints as it is: what is not printable becomes an escape.

    >>> visible("[red]a\x1b[2J\tb").plain
    '[red]a\\x1b[2J\\tb'
    """
    shown = Text()
    for plain, run in groupby(text, key=lambda one: one.isprintable() or one in _PLAIN):
        part = "".join(run)
        if plain:
            shown.append(part, style)
        else:
            shown.append(part.encode("unicode_escape").decode(), f"{style} reverse")
    return shown


def _print(consoles: Sequence[Console], indent: int, text: Text) -> None:
    """Print a text, its lines wrapped where a console is a terminal, all with the same indentation."""
    for console in consoles:
        for line in text.wrap(console, max(20, console.width - indent)):
            console.print(Text(" " * indent) + line, soft_wrap=True)


def _clipped(text: str, chars: int) -> Text:
    """A text without its middle, if it is longer than `chars`."""
    over = len(text) - chars
    if not text:
        return Text("(empty)", style="dim")
    if chars == 0 or over <= 0:
        return visible(text)
    head = (chars + 1) // 2
    note = Text(f"\n... {over:,} characters left out; --chars 0 shows all ...\n", style="dim")
    return visible(text[:head]) + note + visible(text[head + over :])


def _show_groups(
    consoles: Sequence[Console],
    found: _Found,
    *,
    sort: Literal["reward", "step", "tokens"] | None,
    limit: int,
    chars: int,
    success: float,
) -> None:
    def key(one: Sample) -> float:
        value = {"reward": one.reward, "step": one.step, "tokens": one.tokens}[sort or "step"]
        return float("-inf") if value is None else value

    if sort:  # holds no more groups than it shows, and one to know whether there are more
        found = heapq.nlargest(limit + 1, found, key=lambda pair: max(map(key, pair[0])))
    for number, (shown, group) in enumerate(islice(found, limit + 1)):
        if number == limit:
            _print(consoles, 0, Text(f"More prompts match: --limit {2 * limit} shows more.", style="dim"))
            return
        _print(consoles, 0, _title(shown, group, success))
        _print(consoles, 2, _clipped(group[0].prompt, chars))
        for one in sorted(shown, key=key, reverse=True) if sort else shown:
            _print(consoles, 2, _verdict(one, success))
            _print(consoles, 6, _clipped(one.completion, chars))
            for name, value in one.extra.items():
                _print(consoles, 6, visible(f"{name}: ", "dim") + _clipped(value, chars))
        _print(consoles, 0, Text())


def _title(shown: Group, group: Group, success: float) -> Text:
    right = sum(one.decisive is not None and one.decisive >= success for one in group)
    first = group[0]
    parts = [f"step {first.step}", first.task, f"prompt {first.uid}", f"{right} of {len(group)} right"]
    parts += ["dead: no advantage"] if is_dead(group) else []
    parts += [f"{len(shown)} shown"] if len(shown) < len(group) else []
    return visible("  ".join(part for part in parts if part).replace("\n", " "), "bold cyan")


def _verdict(one: Sample, success: float) -> Text:
    """A line that says how a completion did: by a sign, a word and a colour."""
    if one.decisive is None:
        sign, style = "? no reward", "bold yellow"
    elif one.decisive >= success:
        sign, style = "+ right", "bold green"
    else:
        sign, style = "- wrong", "bold red"
    advantage = f"{one.advantage:+.3g}" if one.advantage else _digits(one.advantage)
    facts = f"  reward {_digits(one.reward)}  advantage {advantage}  tokens {one.tokens}  {one.finish}"
    facts += " (cut off)" if one.finish == "length" else ""
    if len(one.by_function) > 1:
        facts += "".join(f"  {name} {_digits(value)}" for name, value in one.by_function.items())
    return visible(sign, style) + visible(facts.replace("\n", " "))


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float | None) -> None:
        if value is not None:
            self.total, self.count = self.total + value, self.count + 1

    def __str__(self) -> str:
        return _digits(self.total / self.count if self.count else None)


@dataclass
class _Step:
    """What a summary says of one step."""

    reward: _Mean = field(default_factory=_Mean)
    truncated: _Mean = field(default_factory=_Mean)
    tokens: _Mean = field(default_factory=_Mean)
    dead: _Mean = field(default_factory=_Mean)
    by_function: dict[str, _Mean] = field(default_factory=dict)

    def add(self, shown: Group, group: Group) -> None:
        self.dead.add(is_dead(group))
        for one in shown:
            self.reward.add(one.reward)
            self.truncated.add(one.finish == "length")
            self.tokens.add(one.tokens)
            for name, value in one.by_function.items():
                self.by_function.setdefault(name, _Mean()).add(value)


def _show_summary(consoles: Sequence[Console], found: _Found) -> None:
    steps: dict[int, _Step] = {}
    for shown, group in found:
        steps.setdefault(group[0].step, _Step()).add(shown, group)
    if not steps:
        return
    names = list(dict.fromkeys(name for one in steps.values() for name in one.by_function))
    table = Table(box=None, pad_edge=False, header_style="bold cyan")
    for name in (*_HEADERS, *names):
        table.add_column(visible(name.replace("\n", " ")), justify="right")
    for step, one in steps.items():
        cells = [step, one.tokens.count, one.reward, _share(one.truncated), one.tokens]
        cells += [f"{one.dead.total:g} of {one.dead.count}"]
        cells += [one.by_function.get(name, "-") for name in names]
        table.add_row(*map(str, cells))
    for console in consoles:
        console.print(table)


def _share(mean: _Mean) -> str:
    return f"{mean.total / mean.count:.0%}"
