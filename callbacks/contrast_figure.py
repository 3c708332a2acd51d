"""Draws what ContrastView measured: variance and dead groups by group size, true against permuted pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def contrast_figure(record: Mapping[str, Any]) -> Figure:
    """Draw one record.

    Args:
        record: A line of `contrast.jsonl`; None where a number does not exist.

    Returns:
        The figure, to be saved.
    """
    # The object interface: pyplot would keep a global list of figures and pick a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    variance, dead, covariance = figure.subplots(1, 3)
    groups = record["group_sizes"]
    sizes = [str(group["group_size"]) for group in groups]
    _points(variance, sizes, [group["relative_variance"] for group in groups])
    if any(group["relative_variance"][0] is not None for group in groups):
        variance.set_yscale("log")
        variance.yaxis.set_major_formatter("{x:g}")
        variance.yaxis.set_minor_formatter("{x:g}")
    variance.set_title(
        f"variance / squared norm\nof a gradient from {record['rollouts']} rollouts", fontsize=10
    )
    _points(dead, sizes, [group["dead"] for group in groups])
    dead.set_ylim(-0.03, 1.03)
    dead.set_title("share of dead groups", fontsize=10)
    for axis in (variance, dead):
        axis.set_xlabel("group size at equal rollouts")
    contrast = record["contrast"]
    true = contrast["covariance"]
    _points(covariance, ["true pairs", "permuted pairs"], [[true, true, true], contrast["permuted"]])
    covariance.axhline(0, color="0.6", linewidth=0.8)
    rho = contrast["correlation"]
    covariance.set_title(
        "covariance of the gradients of successful\nand failed completions"
        + ("" if rho is None else f" (correlation {rho:.2f})"),
        fontsize=10,
    )
    for axis in (variance, dead, covariance):
        axis.grid(alpha=0.3)
    figure.suptitle(
        f"step {record['step']}: {record['prompts']} prompts x {record['completions']} completions, "
        f"{contrast['prompts']} prompts with both outcomes; 95 % intervals",
        fontsize=10,
    )
    return figure


def _points(axis: Axes, names: list[str], estimates: list[list[float | None]]) -> None:
    """Draw values with their intervals; an arrow goes up from one that has no upper end."""
    for place, (value, low, high) in enumerate(estimates):
        if value is not None:
            axis.plot(place, value, "o", color="tab:blue")
        if low is not None and high is not None:
            axis.vlines(place, low, high, color="tab:blue")
        elif low is not None:
            top = low if value is None else value
            axis.errorbar(place, low, yerr=1.5 * top - low, lolims=True, color="tab:blue", capsize=3)
    axis.set_xticks(range(len(names)), names)
    axis.set_xlim(-0.5, len(names) - 0.5)
