"""Checks of the numbers in a configuration: each refuses in one line that names argument, value and remedy.

NaN passes careless comparisons, infinity most of them, and `true` counts as 1: all three are refused here, as are
text, fractions where whole numbers belong, and whole numbers beyond 64 bits. Needs Python alone, so that every part
may use it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

_LONGEST = 1e9  # seconds, about 30 years; threads and sockets take hardly more


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    none: bool = False,
    infinite: bool = False,
    whole: bool = False,
    hint: str = "",
) -> None:
    """Check that a value is a finite number within bounds.

    Args:
        name: Of the argument, as the user writes it.
        value: What was given.
        least: Smallest value.
        above: What the value must exceed.
        most: Largest value.
        below: What the value must stay under.
        none: Whether None is allowed too.
        infinite: Whether infinity is, as a bound that bounds nothing.
        whole: Whether it must be a whole number.
        hint: A sentence for the message's end: a usual value, or what a border value means.

    Raises:
        ValueError: If it is not.

    >>> check_number("top_p", 1.5, above=0, most=1, hint="1 keeps every token.")
    Traceback (most recent call last):
    ValueError: top_p=1.5: must be above 0 and at most 1. 1 keeps every token.
    """
    if none and value is None:
        return
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    is_number = is_number and (_is_finite(value) or (infinite and value == math.inf))
    if (
        not is_number
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (most is not None and value > most)
        or (below is not None and value >= below)
    ):
        kind = "a whole number" if whole else "a number" if infinite else "a finite number"
        bounds = {"at least": least, "above": above, "at most": most, "below": below}
        raise ValueError(_message(name, value, "" if is_number else kind, bounds, none=none, hint=hint))


def check_whole(
    name: str, value: Any, *, least: int = 1, most: int = 2**63 - 1, none: bool = False, hint: str = ""
) -> None:
    """Check that a value is a whole number within bounds; arguments are those of `check_number`.

    Raises:
        ValueError: If it is not.

    >>> check_whole("rank", 2.5)
    Traceback (most recent call last):
    ValueError: rank=2.5: must be a whole number of at least 1.
    """
    check_number(name, value, least=least, none=none, whole=True, hint=hint)
    if value is not None:  # apart, since most mistakes have nothing to do with the end of 64 bits
        check_number(name, value, most=most, whole=True, hint=hint)


def check_seconds(name: str, value: Any, *, none: bool = False, hint: str = "") -> None:
    """Check that a value is a time-out.

    Raises:
        ValueError: If it is not.
    """
    hint = hint or "It is in seconds."
    check_number(name, value, above=0, none=none, hint=hint)
    if value is not None:
        check_number(name, value, most=_LONGEST, hint=hint)


def check_numbers(
    name: str, values: Any, *, length: int | None = None, none: bool = False, **bounds: Any
) -> None:
    """Check each number of a list, or of a mapping by names.

    Args:
        name: Of the argument.
        values: What was given.
        length: How many there must be.
        none: Whether None is allowed in place of all of them.
        **bounds: Arguments of `check_number`.

    Raises:
        ValueError: If there are more or fewer, or one is not as it must be.
    """
    for place, value in _places(name, values, length, none=none):
        check_number(place, value, **bounds)


def check_wholes(name: str, values: Any, *, none: bool = False, **bounds: Any) -> None:
    """Check each whole number of a list; see `check_whole`.

    Raises:
        ValueError: If one is not as it must be.
    """
    for place, value in _places(name, values, None, none=none):
        check_whole(place, value, **bounds)


def _places(name: str, values: Any, length: int | None, *, none: bool) -> list[tuple[str, Any]]:
    if none and values is None:
        return []
    if isinstance(values, Mapping):
        return [(f"{name}[{key!r}]", value) for key, value in values.items()]
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name}={_shown(values)}: must be a list of numbers.")
    listed = list(values)
    if length not in (None, len(listed)):
        raise ValueError(f"{name}={_shown(listed)}: must be {length} numbers, not {len(listed)}.")
    return [(f"{name}[{number}]", value) for number, value in enumerate(listed)]


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _message(
    name: str, value: Any, kind: str, bounds: Mapping[str, float | None], *, none: bool, hint: str
) -> str:
    within = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
    joint = " of " if kind and within.startswith("at") else " " if kind and within else ""
    text = f"{name}={_shown(value)}: must be {kind}{joint}{within}{', or null' if none else ''}."
    return f"{text} {hint}" if hint else text


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not write whole numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
