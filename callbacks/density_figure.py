"""Draws density and overlap of sparse adapters by layer and kind of module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lightning_modules.sparse.stats import WeightStats, overlap, place_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Matrix = npt.NDArray[np.float64]


def heat_maps(
    stats: Sequence[WeightStats], experts: Sequence[str]
) -> tuple[dict[str, _Matrix], list[str], list[str]]:
    """Arrange the weights by layer and kind of module; several of one kind in a layer add up.

    Args:
        stats: Of each weight.
        experts: Names of the experts.

    Returns:
        The density, then each expert's overlap, by title, (R, C) with NaN where there is none; names of the
        layers (R), `other` for weights without number; names of the kinds (C).
    """
    places = [place_of(one.name) for one in stats]
    stacks = list(dict.fromkeys(layer[0] for layer, _ in places if layer is not None))
    layers = sorted(
        {layer for layer, _ in places if layer is not None},
        key=lambda layer: (stacks.index(layer[0]), layer[1]),
    )
    rows: list[tuple[str, int] | None] = [
        *layers,
        *([None] if any(layer is None for layer, _ in places) else []),
    ]
    kinds = list(dict.fromkeys(kind for layer, kind in sorted(places, key=lambda place: place[0] is None)))
    shape = (len(rows), len(kinds))
    trained, sizes = np.zeros(shape), np.zeros(shape)
    shared, possible = np.zeros((len(experts), *shape)), np.zeros((len(experts), *shape))
    for one, (layer, kind) in zip(stats, places, strict=True):
        cell = (rows.index(layer), kinds.index(kind))
        trained[cell] += one.trained
        sizes[cell] += one.size
        for number, label in enumerate(experts):
            if label in one.experts:
                shared[number, *cell] += one.experts[label][0]
                possible[number, *cell] += one.trained
    panels = {"density": _ratio(trained, sizes)}
    for number, label in enumerate(experts):
        found, by_chance = overlap(stats, label)
        title = f"overlap with {label}\n{found:.3g}, by chance {by_chance:.3g}"
        panels[title] = _ratio(shared[number], possible[number])
    one_stack = len(stacks) == 1
    names = ["other" if row is None else str(row[1]) if one_stack else f"{row[0]}.{row[1]}" for row in rows]
    ends = [kind.rpartition(".")[2] for kind in kinds]
    return (
        panels,
        names,
        [end if ends.count(end) == 1 else kind for kind, end in zip(kinds, ends, strict=True)],
    )


def density_figure(panels: Mapping[str, _Matrix], rows: Sequence[str], columns: Sequence[str]) -> Figure:
    """Draw heat maps side by side, at most four in a row.

    Args:
        panels: Matrices (R, C) by title; NaN cells stay grey. Colours start at 0; the first one has a scale of
            its own, the others share one.
        rows: Names of the layers (R).
        columns: Names of the kinds of modules (C).

    Returns:
        The figure, to be saved.
    """
    # The object interface: pyplot would keep a global list of figures and pick a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(len(panels), 4)
    down = math.ceil(len(panels) / across)
    width, height = 2.2 + 0.4 * len(columns), min(2.2 + 0.22 * len(rows), 14)
    figure = Figure(figsize=(across * width, down * height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    matrices = list(panels.values())
    tops = [float(np.nanmax(matrix, initial=0)) for matrix in matrices]
    tops[1:] = [max(tops[1:], default=0)] * (len(tops) - 1)
    step = math.ceil(len(rows) / 40)
    for axis, title, matrix, top in zip(axes, panels, matrices, tops, strict=False):
        axis.set_facecolor("0.85")
        drawn = axis.imshow(matrix, vmin=0, vmax=top or 1, aspect="auto", interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(columns)), columns, rotation=90)
        axis.set_yticks(range(0, len(rows), step), rows[::step])
        axis.set_ylabel("layer")
        figure.colorbar(drawn, ax=axis)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def _ratio(part: _Matrix, whole: _Matrix) -> _Matrix:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)
