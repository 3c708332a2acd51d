"""The order in which people read names that hold numbers."""

from __future__ import annotations

import re


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key for sorting by which `layers.2` comes before `layers.10`.

    >>> sorted(["layers.10.b", "layers.2", "layers.10.a", "head"], key=natural)
    ['head', 'layers.2', 'layers.10.a', 'layers.10.b']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]
