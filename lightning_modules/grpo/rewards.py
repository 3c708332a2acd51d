"""Rewards in TRL's convention: the built-in functions.

A reward function is called with `prompts`, `completions`, `completion_ids`, `trainer_state`, `log_extra`,
`log_metric` and every data column as keyword arguments, each column B long, and returns B numbers, None where
it does not apply to a row. It may be async. Completions are strings, or `[{"role": "assistant", "content":
...}]` where prompts are conversations. Reward functions of TRL run unchanged.

Shapes: B rows.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import math
import re
import threading
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, Literal, TypeAlias

from datamodules.batches import Prompt
from lightning_modules.grpo.math_answers import gold_answer, is_equal, joined_golds
from lightning_modules.grpo.numbers import last_number
from lightning_modules.ranges import check_number, check_whole

RewardFunction: TypeAlias = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]
"""`f(prompts=, completions=, **columns)`: one number or None per row, at once or awaited."""

Completion: TypeAlias = Prompt
"""A string, or the messages that answer a conversation."""

# Punctuation goes, but signs and separators of numbers stay: -5 is not 5, 3.14 is not 314.
_PUNCTUATION = re.compile(r"(?!(?<![^\W\d_])[-+.,:/](?=\d))[^\w\s]")

_NOT_DATA = {"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric"}


def text_of(completion: Completion) -> str:
    """Return the text of a completion, whichever form it has; several messages are joined by newlines.

    >>> text_of([{"role": "assistant", "content": "42"}])
    '42'
    """
    return completion if isinstance(completion, str) else "\n".join(turn["content"] for turn in completion)


class GoldReward(ABC):
    """Base of rewards that compare a completion with its row's gold answer: implement `score`."""

    column: str

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        """Score each completion; a row whose gold answer is None is not applicable."""
        golds = _column(self, self.column, columns)
        return [
            None if gold is None else self.score(text_of(completion), gold)
            for completion, gold in zip(completions, golds, strict=True)
        ]

    def golds(self, gold: Any) -> list[str]:
        """Return a gold answer as text: one, or those of a list.

        Raises:
            ValueError: If it holds anything but text and finite numbers.
        """
        values = gold.tolist() if callable(getattr(gold, "tolist", None)) else gold
        values = list(values) if isinstance(values, list | tuple | set | frozenset) else [values]
        for one in values:
            if not isinstance(one, str | Real | Decimal) or one != one or one in (math.inf, -math.inf):
                raise ValueError(
                    f"{type(self).__name__} compares text or numbers, but a row of the column {self.column!r} holds "
                    f"{one!r:.60} of type {type(one).__name__}. Name the column that holds the answer itself"
                )
        return [str(one) for one in values]

    @abstractmethod
    def score(self, text: str, gold: Any) -> float | None:
        """Score one completion against its gold answer; None where the reward does not apply."""


@dataclass(frozen=True)
class NumericAnswer(GoldReward):
    """1 if the last number of the completion equals the last number of the gold answer, else 0.

    Knows signs, decimals, powers of ten and digit separators (`numbers.last_number`); compares decimals exactly.
    GSM8K's `#### 72` needs nothing special. A fraction counts as two numbers: use `MathVerify` for those. A gold
    answer without any number is not applicable.

    Attributes:
        column: The data column with the gold answer, text or number.
        tolerance: Largest accepted difference.
    """

    column: str = "answer"
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_number("tolerance", self.tolerance, least=0, hint="0 takes equal numbers only.")

    def score(self, text: str, gold: Any) -> float | None:
        """Compare the last numbers."""
        golds = self.golds(gold)
        if len(golds) > 1:
            raise ValueError(
                f"NumericAnswer compares one number, but the column {self.column!r} holds {len(golds)}: {gold!r:.60}. "
                "Use MathVerify for several"
            )
        expected, found = last_number(golds[0]) if golds else None, last_number(text)
        if expected is None or found is None:
            return None if expected is None else 0.0
        # == first: it is exact, while a difference is rounded to 28 digits.
        return float(found == expected or abs(found - expected) <= Decimal(str(self.tolerance)))

    def answer_of(self, text: str) -> Decimal | None:
        """Return the last number, for majority votes; the tolerance plays no part there."""
        return last_number(text)


@dataclass(frozen=True)
class AnyOf(GoldReward):
    """1 if the completion is one of the gold answers, else 0, after normalising both.

    Case, white space and punctuation do not matter, except signs and separators inside numbers. A gold
    answer that is nothing but punctuation is compared as it stands. An empty list is not applicable.

    Attributes:
        column: The data column with the gold answers of a row: a list, or one string.
        contained: Whether it is enough that a gold answer occurs in the completion, as whole words.
        drop_articles: Whether to ignore a, an, the (as SQuAD's metric does).
    """

    column: str = "answers"
    contained: bool = False
    drop_articles: bool = False

    def score(self, text: str, gold: Any) -> float | None:
        """Look for any of the gold answers."""
        golds = self.golds(gold)
        return float(any(self._matches(text, one) for one in golds)) if golds else None

    def answer_of(self, text: str) -> str | None:
        """Return the normalised text, for majority votes."""
        return self._normalise(text) or text.strip() or None

    def _matches(self, text: str, gold: str) -> bool:
        found, expected = self._normalise(text), self._normalise(gold)
        if not expected:
            found, expected = text.strip(), gold.strip()
        return f" {expected} " in f" {found} " if self.contained else found == expected

    def _normalise(self, text: str) -> str:
        words = _PUNCTUATION.sub("", unicodedata.normalize("NFKC", text).casefold()).split()
        return " ".join(word for word in words if not (self.drop_articles and word in ("a", "an", "the")))


@dataclass(frozen=True)
class MathVerify(GoldReward):
    r"""1 if math-verify finds the completion's answer mathematically equal to the gold one, else 0.

    A gold answer is read as a whole: LaTeX with or without dollar signs (`5\sqrt{7}`, `(2,5]`, `x=3`, `3, 8`), a
    number with its unit, words in `\text{}`, or the letter of a choice (A to J). Of a text with `\boxed` the last box
    counts, also in completions; of one with GSM8K's `####` the part after the last; of one with formulas in dollars
    the last formula; of one with "answer is" what follows. Any other gold, prose for example, is not applicable. A
    list holds what belongs together, in any order. Needs the extra `math`.

    Deviates from TRL's `accuracy_reward`, to which a bare `5\sqrt{7}` is 5, and from math-verify in that letters
    after a number are variables, not units, unless a space or `\text{}` sets them apart.

    Attributes:
        column: The data column with the gold answer: a text, a number, or a list of them.
        timeout: Seconds for each parse and comparison, after which it fails: 0. Only in the main thread,
            since math-verify uses signal.alarm; elsewhere, so with `Scoring.timeout`, it does not apply.
        any_of: Whether a list holds alternatives, of which each is right by itself.
    """

    column: str = "answer"
    timeout: int = 5
    any_of: bool = False

    def __post_init__(self) -> None:
        check_whole("timeout", self.timeout, most=1_000_000, hint="It is in seconds.")

    def score(self, text: str, gold: Any) -> float | None:
        """Compare the parsed answers."""
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("MathVerify needs math-verify: pip install 'lightning-quiver[math]'")
        seconds = self.timeout if threading.current_thread() is threading.main_thread() else None
        sources = [one.rsplit("####", 1)[-1] for one in self.golds(_unquoted(gold))]
        golds = [gold_answer(one, seconds) for one in sources]
        if not self.any_of and golds:
            joined = joined_golds(golds, sources, seconds)
            golds = [] if joined is None else [joined]
        known = [one for one in golds if one.is_known]
        if not known:
            return None
        text = text.rsplit("####", 1)[-1]
        return float(any(is_equal(one, text, seconds) for one in known))


@dataclass(frozen=True)
class RegexFormat:
    r"""1 if the completion has the form of a regular expression, else 0.

    Attributes:
        pattern: Python syntax; the dot matches newlines too, e.g. `<think>.*</think>\s*\S.*`.
        full: Whether the whole completion must match, rather than any part of it.
    """

    pattern: str
    full: bool = True

    def __post_init__(self) -> None:
        _compiled(self.pattern)

    def __call__(self, completions: Sequence[Completion], **_: Any) -> list[float]:
        """Match each completion."""
        pattern = _compiled(self.pattern)
        match = pattern.fullmatch if self.full else pattern.search
        return [float(bool(match(text_of(one)))) for one in completions]


@dataclass(frozen=True)
class LengthReward:
    """0 up to `target`, then falling linearly to -1 at `maximum`, and -1 beyond.

    DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), with target = L_max - L_cache and
    maximum = L_max.

    Attributes:
        target: Longest completion without penalty.
        maximum: Shortest completion with the full penalty.
        unit: What is counted.
    """

    target: int
    maximum: int
    unit: Literal["tokens", "characters"] = "tokens"

    def __post_init__(self) -> None:
        check_whole("target", self.target, least=0)
        check_whole("maximum", self.maximum)
        if not self.target < self.maximum:
            raise ValueError(f"target={self.target} and maximum={self.maximum}: need 0 <= target < maximum")

    def __call__(
        self, completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]] = (), **_: Any
    ) -> list[float]:
        """Measure each completion."""
        if self.unit == "tokens" and len(completion_ids) != len(completions):
            raise ValueError("LengthReward(unit='tokens') needs completion_ids, one list per completion")
        tokens = self.unit == "tokens"
        lengths = map(len, completion_ids if tokens else map(text_of, completions))
        span = self.maximum - self.target
        return [-min(max(length - self.target, 0), span) / span for length in lengths]


@dataclass(frozen=True)
class ReasoningGymScore:
    """The score that reasoning_gym's own verifier gives, 0 to 1, partial credit included.

    Reads the columns `task`, `options` and `entry` that `ReasoningGymDataModule` gives; `entry` is the
    generated item as it was, since some scorers tell tuples from lists. A row without entry is no
    reasoning_gym task: not applicable. Needs the extra `tasks`.

    Attributes:
        pattern: Regular expression whose first group is the answer, e.g. `<answer>(.*?)</answer>`; the last
            match counts, the dot matches newlines, and a completion without a match scores 0. None takes
            the whole completion. White space around the answer goes.
    """

    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.pattern is not None and _compiled(self.pattern).groups < 1:
            raise ValueError(f"pattern={self.pattern!r} needs a group, as in <answer>(.*?)</answer>")

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        """Score each completion by its row's task."""
        columns = {name: _column(self, name, columns) for name in ("task", "options", "entry")}
        return [
            None if entry is None else self._score(text_of(completion), task, options or {}, entry)
            for completion, task, options, entry in zip(completions, *columns.values(), strict=True)
        ]

    def _score(self, text: str, task: str, options: dict[str, Any], entry: dict[str, Any]) -> float:
        if self.pattern is not None:
            found = list(_compiled(self.pattern).finditer(text))
            if not found:
                return 0.0
            text = found[-1].group(1) or ""
        # A family's scorer may depend on its options, so the default ones of `get_score_answer_fn` mis-score.
        score = _gym_scorer(task, json.dumps(options, sort_keys=True))
        return float(score(answer=text.strip(), entry=entry))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is not a regular expression: {error}") from error


def _column(reward: object, name: str, columns: Mapping[str, Any]) -> Sequence[Any]:
    if name not in columns:
        present = ", ".join(sorted(set(columns) - _NOT_DATA)) or "none"
        raise ValueError(
            f"{type(reward).__name__} reads the column {name!r}, which is missing; columns present: {present}"
        )
    column: Sequence[Any] = columns[name]
    return column


def _unquoted(gold: Any) -> Any:
    """The list that a text such as `["3", "8"]` is; without quotes it may be an interval, and stays text."""
    if not (isinstance(gold, str) and re.fullmatch(r"\s*\[\s*([\"']).*\1\s*\]\s*", gold, re.DOTALL)):
        return gold
    try:
        return ast.literal_eval(gold.strip())
    except (ValueError, SyntaxError):
        return gold


@functools.cache
def _gym_scorer(task: str, options: str) -> Callable[..., float]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            "ReasoningGymScore needs reasoning_gym: pip install 'lightning-quiver[tasks]'"
        ) from error
    scorer: Callable[..., float] = reasoning_gym.create_dataset(task, **json.loads(options)).score_answer
    return scorer
