r"""Finds and reads mathematical answers for `MathVerify`, with math-verify as parser and judge.

math-verify looks for formulas inside text, so an answer without dollar signs is to it a text, of which it takes some
number: `5` of `5\sqrt{7}`. Here an answer is one formula, read as a whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from lightning_modules.grpo.math_notation import TEXT, cleaned, without_unit

_SPACED_GROUPS = re.compile(r"[-+]?[1-9][0-9]{0,2}(?: [0-9]{3})+(?:\.[0-9]+)?")
_WRAPPED = re.compile(TEXT + r"\s*\{([^{}]*)\}")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z]*\*?\}|\\[a-zA-Z]+")
_WORD = re.compile(
    r"[a-zA-Z]{4,}|[a-zA-Z]{2,}\s+(?:[a-zA-Z]{2,}|[0-9])|(?<![a-zA-Z])(?:is|are|the|was|of|to)(?![a-zA-Z])",
    re.IGNORECASE,
)
_PARSERS_WORDS = re.compile(r"\b(?:infinity|percent(?:age)?)\b", re.IGNORECASE)
# math-verify would add or multiply numbers that stand side by side, and drop dots that go on.
_UNREADABLE = re.compile(
    r"(?<![_^])[0-9](?:\s|\\[ ,;:]|~|\\q?quad)+[0-9]|\\(?:l|c)?dots|\.\.\.|\N{HORIZONTAL ELLIPSIS}"
)

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"[^\s$]+")
_DELIMITED = re.compile(r"(?<!\\)\$.*?(?<!\\)\$|\\\(.*?\\\)|\\\[.*?\\\]", re.DOTALL)
_PAIRS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
_ANCHOR = re.compile(r"\banswer\b(?:\s*(?:is|=))?\s*:?", re.IGNORECASE)
# What only LaTeX explains, with what is added to it or equal: of it, math-verify would take a number.
_BARE_LATEX = re.compile(
    r"(?<!\S)(?:[^\s$]{1,40} [-+=] ){0,9}"
    r"[^\s$]{0,99}(?:\\[a-zA-Z]|\^|[0-9][a-zA-Z][^\s$]{0,99}[-+*=])[^\s$]*"
    r"(?: [-+=] [^\s$]+)*(?<![.,;:!?])"
)
_CHOICE = re.compile(r"\(?([A-J])\)?[.:]?|(?:\(([A-J])\)|([A-J])[).:])(?:\s|\\|~).*", re.DOTALL)
_LETTERS = tuple("ABCDEFGHIJ")
_LONG = 200  # characters; a text of more is no single answer


@dataclass(frozen=True)
class Answer:
    """An answer, read.

    Attributes:
        text: What it says, for those in words.
        choice: The letter of a multiple choice, where it is one.
        words: Whether it is words and no formula.
        formula: What math-verify reads, None where it cannot.
        bare: The same without a unit.
    """

    text: str
    choice: str | None
    words: bool
    formula: Any | None
    bare: Any | None

    @property
    def is_known(self) -> bool:
        """Whether anything can be compared with it."""
        return self.words or self.choice is not None or self.bare is not None


def read_answer(source: str, seconds: int | None) -> Answer:
    """Read a text that is one answer and nothing else, with or without delimiters.

    Args:
        source: Such as the content of a box.
        seconds: Limit for a parse; None for none.
    """
    source = cleaned(_undelimited(source))
    plain = _undelimited(_WRAPPED.sub(r"\1", source))
    choice = _CHOICE.fullmatch(plain)
    rest = _WRAPPED.sub("", source).strip(" ().~\\,")
    words = (not rest and any(map(str.isalpha, plain))) or (plain.isalpha() and len(plain) >= 4)
    if not rest and not words:
        source = plain  # digits as text
    bare = without_unit(source)
    return Answer(
        text=_plain_text(plain),
        choice=next(filter(None, choice.groups())) if choice else None,
        words=words,
        formula=_formula(source, seconds),
        bare=_formula(bare, seconds),
    )


def gold_answer(gold: str, seconds: int | None) -> Answer:
    """Read a gold answer: a formula, a choice, words, or a text with a box, an anchor or a formula in dollars.

    Args:
        gold: As the data has it.
        seconds: Limit for a parse; None for none.
    """
    inner = last_box(gold)
    if inner is None:
        inner = _undelimited(gold)
        if _DELIMITED.search(inner):
            found = _found_in(inner, seconds, numbers=False)
            return Answer("", None, False, found, found)
        if (tail := _tail(inner)) is not None:
            inner = tail
    return read_answer(inner, seconds)


def is_equal(gold: Answer, completion: str, seconds: int | None) -> bool:
    """Tell whether a completion gives the gold answer.

    Args:
        gold: One that is known.
        completion: Of its boxes the last counts. Without one, math-verify finds the answer.
        seconds: Limit for each parse and comparison; None for none.
    """
    import math_verify

    inner = last_box(completion)
    if inner is not None:
        found = [read_answer(inner, seconds)] if inner else []
    else:
        wholes = [_undelimited(one) for one in (completion, _tail(completion)) if one is not None]
        found = [
            read_answer(one, seconds) for one in wholes if len(one) < _LONG and not _DELIMITED.search(one)
        ]
    if (gold.words or gold.choice is not None) and any(gold.text == one.text for one in found):
        return True
    if gold.choice is not None:
        letters = [one.choice for one in found if one.choice is not None]
        if not letters and inner is None:
            letters = _letters_in(completion, seconds)
        return gold.choice in letters[-1:]
    if gold.words:
        return False
    formulas = [(one.formula, one.bare) for one in found if one.bare is not None]
    if not formulas and inner is None:
        one = _found_in(completion, seconds)
        formulas = [(one, one)]
    return any(
        ours is not None and theirs is not None and math_verify.verify(ours, theirs, timeout_seconds=seconds)
        for one in formulas
        for ours, theirs in zip((gold.formula, gold.bare), one, strict=True)
    )


def joined_golds(golds: list[Answer], sources: list[str], seconds: int | None) -> Answer | None:
    """Make one answer of several that belong together: all of them, in any order; None where that cannot be.

    Args:
        golds: Those of `sources`, at least one.
        sources: As the data has them.
        seconds: Limit for each parse and comparison; None for none.
    """
    import math_verify

    different: list[int] = []
    for number, one in enumerate(golds):
        if one.bare is None:
            return one if len(golds) == 1 else None
        if not any(math_verify.verify(golds[i].bare, one.bare, timeout_seconds=seconds) for i in different):
            different.append(number)
    if len(different) == 1:
        return golds[different[0]]
    joined = read_answer(", ".join(_undelimited(sources[number]) for number in different), seconds)
    return joined if joined.bare is not None else None


def last_box(text: str) -> str | None:
    r"""Return what stands in the last `\boxed` or `\fbox`, empty where it is not closed; None without any.

    >>> last_box(r"\boxed{1} or \boxed{\{2\}}")
    '\\{2\\}'
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if not text.startswith("{", start):
        unbraced = _UNBRACED.match(text, start)
        return unbraced[0] if unbraced else ""
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()]
    return ""


def _tail(text: str) -> str | None:
    """The rest of the line after the last "answer is"."""
    anchors = list(_ANCHOR.finditer(text))
    tail = text[anchors[-1].end() :].strip().split("\n", 1)[0] if anchors else ""
    return tail or None


def _undelimited(text: str) -> str:
    """Take away what stands around an answer: white space, dollars, bold type, the full stop."""
    before = None
    while text != before:
        before = text
        text = re.sub(r"(?:\\[,;:! ]|[\s.,;~])+$", "", text.strip()) or text.strip()
        for left, right in _PAIRS:
            inner = text[len(left) : -len(right)]
            long = len(text) > len(left) + len(right)
            if (
                long
                and text.startswith(left)
                and text.endswith(right)
                and left not in inner
                and right not in inner
            ):
                text = inner
                break
    return text


def _plain_text(text: str) -> str:
    return " ".join(re.sub(r"\\[,;:! ]|[~$]", " ", text).casefold().split()).strip(" .()")


def _is_prose(formula: str) -> bool:
    words = _PARSERS_WORDS.sub("", _COMMAND.sub(" ", _WRAPPED.sub(" ", formula)))
    return _WORD.search(words) is not None


def _formula(text: str, seconds: int | None) -> Any | None:
    """Parse a whole text as one formula; None where it is none."""
    from math_verify import parse

    text = re.sub(r"\\?\$", "", text).strip()
    if _SPACED_GROUPS.fullmatch(text):
        text = text.replace(" ", "")
    if not text or _is_prose(text) or _UNREADABLE.search(text) or re.search(r"(?<![\w}])[0-9]+_", text):
        return None
    parsed = parse(
        f"$${text}$$",
        [_latex()],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=seconds,
    )
    return parsed[0] if parsed else None


def _found_in(text: str, seconds: int | None, *, numbers: bool = True) -> Any | None:
    """Let math-verify find the answer in a text; None where there is none."""
    from math_verify import ExprExtractionConfig, parse

    text = cleaned(_DELIMITED.sub(_bare_formula, text))
    if numbers:
        text = "".join(_outside_formulas(text, lambda part: _BARE_LATEX.sub(lambda one: f"${one[0]}$", part)))
    parsed = parse(
        text,
        [_latex(), *([ExprExtractionConfig()] if numbers else [])],
        fallback_mode="no_fallback",
        extraction_mode="any_match" if numbers else "first_match",
        parsing_timeout=seconds,
    )
    return parsed[0] if parsed else None


def _bare_formula(formula: re.Match[str]) -> str:
    """A formula between its delimiters, without a unit."""
    for left, right in _PAIRS:
        if formula[0].startswith(left) and formula[0].endswith(right) and len(formula[0]) > len(left + right):
            return left + without_unit(formula[0][len(left) : -len(right)].rstrip()) + right
    return formula[0]


def _outside_formulas(text: str, change: Callable[[str], str]) -> list[str]:
    """The parts of a text, changed where they are no formulas."""
    parts, end = [], 0
    for formula in _DELIMITED.finditer(text):
        parts += [change(text[end : formula.start()]), formula[0]]
        end = formula.end()
    return [*parts, change(text[end:])]


def _letters_in(text: str, seconds: int | None) -> list[str]:
    """The letter that a text chooses, as math-verify finds it."""
    from math_verify import StringExtractionConfig, parse

    text = re.sub(r"\(([A-J])\)", r"\1", _WRAPPED.sub(r"\1", text.replace("$", "")))
    found = parse(text, [StringExtractionConfig(strings=_LETTERS, lowercase=False)], parsing_timeout=seconds)
    return [str(found[0])] if found else []


@cache
def _latex() -> Any:
    """How formulas are read: without its units, since it takes letters of `2ab` and `4h` for some, and its boxes."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    return LatexExtractionConfig(normalization_config=normalization)
