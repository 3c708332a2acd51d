"""Draws clusters of experts: a dendrogram over a heat map of their similarity."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from lightning_modules.library.clustering import Clusters


def cluster_figure(clusters: Clusters) -> Any:
    """Draw clusters.

    Args:
        clusters: What to draw.

    Returns:
        A matplotlib figure. Experts are ordered by cluster, whose borders are white squares.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture needs matplotlib: pip install 'lightning-quiver[plots]'.") from error
    count = len(clusters.names)
    side = min(4 + 0.28 * count, 24)
    figure = Figure(figsize=(side + 1.5, side * 1.3), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[1, 3.2])
    if count > 1:
        distance = np.clip(1 - clusters.similarity, 0, None)
        np.fill_diagonal(distance, 0)
        links = linkage(squareform(distance, checks=False), "average")
        dendrogram(
            links, labels=list(clusters.names), ax=top, leaf_rotation=90, leaf_font_size=8, color_threshold=0
        )
        top.set_ylabel("1 - cosine")
    top.set_title(f"{count} experts, average linkage", fontsize=10)
    order = np.argsort(clusters.labels, kind="stable")
    # Experts of one start are all alike; what matters is who is more so. The diagonal is 1 and would hide that.
    others = clusters.similarity[~np.eye(count, dtype=bool)]
    low, high = (float(others.min()), float(others.max())) if count > 1 else (0.0, 1.0)
    image = bottom.imshow(clusters.similarity[np.ix_(order, order)], cmap="viridis", vmin=low, vmax=high)
    size = 8 if count <= 40 else 5
    names = [f"{clusters.names[i]} ({clusters.labels[i]})" for i in order]
    bottom.set_xticks(range(count), names, rotation=90, fontsize=size)
    bottom.set_yticks(range(count), names, fontsize=size)
    start = 0
    for label in sorted(set(clusters.labels)):
        length = clusters.labels.count(label)
        xs = [start - 0.5, start + length - 0.5, start + length - 0.5, start - 0.5, start - 0.5]
        ys = [start - 0.5, start - 0.5, start + length - 0.5, start + length - 0.5, start - 0.5]
        bottom.plot(xs, ys, color="white", linewidth=2)
        start += length
    bottom.set_title("cosine, with cluster numbers", fontsize=10)
    figure.colorbar(image, ax=bottom, shrink=0.6)
    return figure
