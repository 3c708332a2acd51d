"""Draws routing: load of each expert by layer, and accuracy and entropy of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FACTS = 4  # layer, accuracy, entropy, abstained


def routing_figure(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Figure:
    """Draw the table of `RoutingReport`.

    Args:
        columns: `layer`, `accuracy`, `entropy`, `abstained`, then the experts (4 + E).
        rows: One for each layer; None where nothing counted.

    Returns:
        The figure, to be saved.
    """
    # The object interface: pyplot would keep a global list of figures and pick a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    experts = columns[_FACTS:]
    load = np.array([row[_FACTS:] for row in rows], dtype=np.float64)
    facts = np.array([row[1:_FACTS] for row in rows], dtype=np.float64)
    height = min(3 + 0.09 * len(rows), 24)
    figure = Figure(figsize=(min(6 + 0.28 * len(experts), 40), height), layout="constrained")
    FigureCanvasAgg(figure)
    heat, lines = figure.subplots(1, 2, width_ratios=[min(max(2.0, 0.25 * len(experts)), 12), 2])
    drawn = heat.imshow(load, aspect="auto", interpolation="nearest", vmin=0)
    step = max(1, len(rows) // 45)
    heat.set_yticks(range(0, len(rows), step), [row[0] for row in rows][::step], fontsize=6)
    across = max(1, len(experts) // 120)
    heat.set_xticks(range(0, len(experts), across), experts[::across], rotation=90, fontsize=7)
    heat.set_title("mean weight", fontsize=10)
    figure.colorbar(drawn, ax=heat, shrink=0.5)
    places = np.arange(len(rows))
    lines.plot(facts[:, 0], places, label="accuracy", color="tab:green")
    lines.plot(facts[:, 1] / np.log(max(len(experts), 2)), places, label="entropy / log E", color="tab:blue")
    lines.set_ylim(len(rows) - 0.5, -0.5)
    lines.set_xlim(-0.03, 1.03)
    lines.axvline(1 / len(experts), color="0.6", linestyle=":", label="accuracy by chance")
    lines.set_yticks([])
    lines.set_title("by layer", fontsize=10)
    lines.legend(fontsize=7)
    return figure
