r"""Brings mathematics as people type it to the LaTeX that the parser reads as it is meant, and takes units off."""

from __future__ import annotations

import re
from decimal import Decimal
from functools import cache

from lightning_modules.grpo.numbers import join_digit_groups

# As LaTeX has them, so that a formula means the same however it was typed.
_SYMBOLS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "\N{DIVISION SIGN}": r"\div ",
        "\N{MIDDLE DOT}": r"\cdot ",
        "\N{DOT OPERATOR}": r"\cdot ",
        "\N{PLUS-MINUS SIGN}": r"\pm ",
        "\N{GREEK SMALL LETTER PI}": r"\pi ",
        "\N{INFINITY}": r"\infty ",
        "\N{LESS-THAN OR EQUAL TO}": r"\le ",
        "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
        "\N{NOT EQUAL TO}": r"\ne ",
        "\N{ELEMENT OF}": r"\in ",
        "\N{UNION}": r"\cup ",
        "\N{INTERSECTION}": r"\cap ",
        "\N{EMPTY SET}": r"\emptyset ",
        "\N{DOUBLE-STRUCK CAPITAL R}": r"\mathbb{R}",
        "\N{DEGREE SIGN}": r"^{\circ}",
        "\N{SUPERSCRIPT TWO}": "^{2}",
        "\N{SUPERSCRIPT THREE}": "^{3}",
        "\N{VULGAR FRACTION ONE HALF}": r"\frac{1}{2}",
        "\N{VULGAR FRACTION ONE QUARTER}": r"\frac{1}{4}",
        "\N{VULGAR FRACTION THREE QUARTERS}": r"\frac{3}{4}",
        "\N{EURO SIGN}": "",
        "\N{POUND SIGN}": "",
        "\N{NO-BREAK SPACE}": " ",
    }
)
_ROOT_OF_BRACKET = re.compile(r"\\?(?<![a-zA-Z])sqrt\s*\(([^()]*)\)")
_ROOT = re.compile("\N{SQUARE ROOT}\\s*(\\([^()]*\\)|[0-9]+(?:\\.[0-9]+)?|[a-zA-Z])")
_SCIENTIFIC = re.compile(
    r"(?<![\w.\\}/^])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?:[eE]([-+]?[0-9]{1,3})(?![\w.{^])"
    r"|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{([-+]?[0-9]{1,3})\}|([-+]?[0-9]{1,3})(?![0-9])))"
)
_MIXED = re.compile(r"(?<![\w./}])([0-9]+)(?:\s|\\[ ,;:]|~)+([0-9]+)/([0-9]+)(?![\w/.])")
_BASED = re.compile(r"(?<![\w.}])([0-9]+)_(?:\{([0-9]{1,2})\}|([0-9]))(?![\w])")
_REPEATING = re.compile(r"(?<![\w.}])([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*\{([0-9]+)\}(?![\w{])")
TEXT = r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|sf)|mbox|operatorname)"
"""LaTeX commands that set words."""

# Names that typists leave without a backslash; letters by themselves would be a product.
_NAMES = re.compile(
    rf"{TEXT}\s*\{{[^{{}}]*\}}|(?<![\\a-zA-Z])(pi|theta|alpha|beta|gamma|lambda|sin|cos|tan|cot|sec|csc|arcsin|arccos"
    r"|arctan|log|ln)(?![a-zA-Z])"
)
_DEGREES = re.compile(rf"\^\s*(?:\{{\s*\\circ\s*\}}|\\circ)(?:\s*(?:{TEXT}\{{\s*[CFK]\s*\}}|[CF]\b))?")
_UNIT_IN_TEXT = re.compile(
    rf"(?<=[\w}})!])(?:\s|\\[,;:! ]|~)*{TEXT}\s*\{{([^{{}}0-9]*)\}}(?:\s*\^\s*(?:\{{-?[0-9]\}}|[0-9]))?$"
)
# A number by itself, then words; `\pi r^2 h` is a product.
_COUNTED = r"([-+]?(?:[0-9][0-9,]*(?:\.[0-9]+)?|[0-9]*\s*\\[dt]?frac\{[0-9]+\}\{[0-9]+\}|[0-9]+/[0-9]+"
_COUNTED += r"|[0-9]*\s*\\(?:sqrt\s*\{[0-9]+\}|pi)))"
_UNIT_IN_WORDS = (
    rf"{_COUNTED}(?:\s|\\[,;: ]|~)+(?:(?:square|cubic|sq|cu)\.?\s+)?UNIT(?:(?:\s*/\s*|\s+per\s+)UNIT)?"
)
# Words after a number that change it, and what math-verify lists as units but algebra writes as products.
_FACTORS = {
    "hundred",
    "thousand",
    "million",
    "billion",
    "trillion",
    "dozen",
    "score",
    "lakh",
    "crore",
    "half",
}
_FACTORS |= {"and", "or", "if", "e", "i", "d"}
_NO_UNITS = {"ab", "bc", "by", "per", "more", "less", "o", "c", "t", "d", "l"}
_MORE_UNITS = {"m", "s", "g", "h", "L", "mL", "mi", "oz", "ounce", "foot", "gram", "kilogram", "kilometer"}
_MORE_UNITS |= {"centimeter", "millimeter", "dollar", "euro", "week", "person", "people"}


def cleaned(text: str) -> str:
    r"""Return the same mathematics in LaTeX that the parser reads as it is meant.

    >>> cleaned("2.5e4, 2 1/3, 5\N{SQUARE ROOT}7, 101_2")
    '25000, 2\\frac{1}{3}, 5\\sqrt{7}, 5'
    """
    text = join_digit_groups(text, commas=False).translate(_SYMBOLS)
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1].strip('()')}}}", text)
    text = _ROOT_OF_BRACKET.sub(r"\\sqrt{\1}", text)
    text = _SCIENTIFIC.sub(_exact, text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _BASED.sub(_decimal, text)
    text = _REPEATING.sub(_fraction, text)
    text = _NAMES.sub(lambda match: rf"\{match[1]}" if match[1] else match[0], text)
    return _DEGREES.sub("", text)


def _exact(number: re.Match[str]) -> str:
    """A number with an exponent, exactly: decimals are compared to six places only."""
    exponent = next(filter(None, number.groups()[1:]))
    top, bottom = Decimal(f"{number[1]}e{exponent}").as_integer_ratio()
    return str(top) if bottom == 1 else rf"\frac{{{top}}}{{{bottom}}}"


def _decimal(number: re.Match[str]) -> str:
    """A number of another base; the parser would drop the base."""
    base = int(number[2] or number[3])
    try:
        return str(int(number[1], max(base, 1)))
    except ValueError:
        return number[0]


def _fraction(number: re.Match[str]) -> str:
    """A repeating decimal."""
    whole, fixed, period = number.groups()
    top = int(f"{whole}{fixed}{period}") - int(f"0{whole}{fixed}")
    return rf"\frac{{{top}}}{{{10 ** len(fixed) * (10 ** len(period) - 1)}}}"


def without_unit(text: str) -> str:
    r"""Return a formula without the unit at its end: any in `\text{}`, known ones in words after a number.

    >>> without_unit(r"5\text{ cm}"), without_unit("3 square feet"), without_unit("3h"), without_unit("2 million")
    ('5', '3', '3h', '2 million')
    """
    unit = _UNIT_IN_TEXT.search(text)
    if unit is not None:
        return text if _FACTORS & set(unit[1].casefold().split()) else text[: unit.start()]
    counted = _unit_in_words().fullmatch(text)
    return counted[1] if counted else text


@cache
def _unit_in_words() -> re.Pattern[str]:
    from latex2sympy2_extended.math_normalization import units

    names = sorted((_MORE_UNITS | set(units)) - _NO_UNITS, key=len, reverse=True)
    unit = (
        rf"(?:{'|'.join(re.escape(name.strip()) for name in names)})(?:s|es)?\.?(?:\^(?:\{{[0-9]\}}|[0-9]))?"
    )
    return re.compile(_UNIT_IN_WORDS.replace("UNIT", unit))
