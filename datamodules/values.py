"""Reads values of a row: by column or by path into a struct, and as text where they have one spelling."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any


def has_column(columns: Iterable[str], path: str) -> bool:
    """Return whether `path` names a column, or a place in a struct that is one."""
    present = set(columns)
    return path in present or path.partition(".")[0] in present


def lookup(row: Mapping[str, Any], path: str, argument: str) -> Any:
    """Return the value of a column, or what a path such as `reward_model.ground_truth` names in a struct.

    A column whose own name has dots comes first.

    Args:
        row: The row.
        path: Name or path.
        argument: The argument that names it, for messages.

    Raises:
        ValueError: If the row lacks it.
    """
    if path in row:
        return plain(row[path])
    value: Any = row
    walked: list[str] = []
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            if not walked:
                raise ValueError(
                    f"there is no column {path!r} ({argument}); the columns are: {', '.join(row)}"
                )
            held = (
                f"has {', '.join(map(str, value))}"
                if isinstance(value, Mapping)
                else f"holds {kind_of(value)}"
            )
            raise ValueError(f"there is no {path!r} ({argument}): {'.'.join(walked)!r} {held}")
        value = value[part]
        walked.append(part)
    return plain(value)


def plain(value: Any) -> Any:
    """Return arrays of numpy and torch as lists, anything else as it is; scalars keep their type."""
    if hasattr(value, "tolist") and getattr(value, "ndim", False):
        return value.tolist()
    return value


def as_text(value: Any, what: str) -> str:
    """Return text as it is, and a number as it is written.

    Nothing else has one spelling: a truth value is `true` or `True` or `yes`, a date is written in many ways, and
    what Python prints for a struct is no text that anybody wants to learn.

    Args:
        value: The value.
        what: What it is, for messages.

    Raises:
        ValueError: If it is neither text nor a finite number.
    """
    if isinstance(value, str):
        return str(value)
    item = value.item() if hasattr(value, "item") and not getattr(value, "ndim", False) else value
    if isinstance(item, int | float | Decimal) and not isinstance(item, bool):
        if item != item or item in (math.inf, -math.inf):  # isfinite takes no integer beyond float
            raise ValueError(f"{what} holds {item}, which is no text: mend or drop the row")
        return str(value if value.__class__.__module__ == "numpy" else item)
    remedy = "write it as text"
    if isinstance(value, Mapping) and value:
        names = [str(name) for name in value]
        remedy = (
            f"name one of its fields by a path that ends in {', '.join('.' + name for name in names[:8])}"
        )
    raise ValueError(f"{what} holds {kind_of(value)}, which is no text: {remedy}")


def kind_of(value: Any) -> str:
    """Name the kind of a value, and show its beginning."""
    if value is None:
        return "null"
    name = {"dict": "struct"}.get(type(value).__name__, type(value).__name__)
    return f"{name} ({_short(value)})"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:  # thousands of brackets
        return "..."
    return text if len(text) <= 60 else text[:57] + "..."


def without_nulls(value: Any) -> Any:
    """Return nested data without entries that are null.

    Arrow gives each struct of a column the fields of all others, null where a row has none: a tool call would come
    with the arguments of every other tool.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value
