r"""Numbers as people, LaTeX and spreadsheets write them. Needs the standard library alone.

A digit separator counts only where it cuts a number into correct groups of three, all by the same separator:
`48,000`, `48{,}000`, `48,\!000`, `48\,000`, `48~000`, `48'000`, or with a no-break or thin space. A plain space does
not: `12 345` may be two numbers.
"""

from __future__ import annotations

import re
from decimal import Decimal

# Spaces that do not break a line, and their like: all of Unicode's except those that a text has between words.
_SPACES = r"[\u00a0\u2000-\u200a\u202f\u205f\u2060]|\\[,;:> ]|~|\{(?:\\[,;:> ]|~)\}|\\thinspace(?:\{\}|[ ])?"
_APOSTROPHES = r"['\u2019\u02bc]|\{['\u2019]\}"
_LATEX_COMMAS = r",(?:\\!\s?)+|\{\s*,\s*\}(?:\\!\s?)*|\\(?:text|mathord)\{,\}|\{,\\!\}"
_LATEX_SEPARATORS = rf"{_LATEX_COMMAS}|{_SPACES}|{_APOSTROPHES}"


def _runs(separators: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![0-9.])[0-9]+(?:(?:{separators})[0-9]+)+")


_RUN = _runs(f",|{_LATEX_SEPARATORS}")
_RUN_WITHOUT_COMMAS = _runs(_LATEX_SEPARATORS)
# SI cuts decimals into groups too, from the point on; the last group may be shorter.
_GROUPED_DECIMALS = re.compile(
    rf"(?<=[0-9])\.[0-9]{{3}}(?P<sep>{_SPACES})(?:[0-9]{{3}}(?P=sep))*[0-9]{{1,3}}(?![0-9])"
)

# A sign counts unless it follows a word, a number or a bracket: there it is a dash or a subtraction.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)])[-+])?(?:\\?\$)?(?P<digits>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE](?P<e>[-+]?[0-9]{1,3})(?![0-9])"
    r"|\s*(?:\\times|\\cdot|[\u00d7*])\s*10\s*\^\s*(?:(?P<plain>[-+]?[0-9]{1,3})(?![0-9])"
    r"|\{\s*(?P<braced>[-+]?[0-9]{1,3})\s*\}))?"
)


def join_digit_groups(text: str, *, commas: bool = True) -> str:
    r"""Take digit separators out of the numbers of a text, and make LaTeX's decimal comma a point.

    Args:
        text: Any.
        commas: Whether a comma by itself separates digits. In mathematics `(1,100)` may be a pair.

    >>> join_digit_groups(r"7{,}250 and 48\,000.5 but 1,2345 and 3{,}14")
    '7250 and 48000.5 but 1,2345 and 3.14'
    """
    text = _GROUPED_DECIMALS.sub(lambda match: match[0].replace(match["sep"], ""), text)
    return (_RUN if commas else _RUN_WITHOUT_COMMAS).sub(_joined, text)


def _joined(run: re.Match[str]) -> str:
    """The number that a run of digits and separators is; the run itself where it is several."""
    first: str
    groups: list[str]
    first, *groups = re.findall("[0-9]+", run[0])
    separators = {one for one in re.split("[0-9]+", run[0]) if one}
    if len(separators) == 1 and first[0] != "0" and len(first) <= 3 and all(len(one) == 3 for one in groups):
        return "".join((first, *groups))
    # Braces keep LaTeX from setting a space after a comma, so such a comma stands inside one number.
    return ".".join((first, *groups)) if separators == {"{,}"} and len(groups) == 1 else str(run[0])


def last_number(text: str) -> Decimal | None:
    r"""Return the last number of a text, exactly; None where there is none.

    Knows signs, decimals, digit groups and powers of ten (`2.5e4`, `2.5 \times 10^{4}`).

    >>> last_number(r"It costs \$7{,}250.50 in all.")
    Decimal('7250.50')
    """
    numbers = list(_NUMBER.finditer(join_digit_groups(text.replace("\N{MINUS SIGN}", "-"))))
    if not numbers:
        return None
    found = numbers[-1]
    exponent = found["e"] or found["plain"] or found["braced"] or "0"
    return Decimal(f"{found['sign'] or ''}{found['digits']}e{exponent}")
