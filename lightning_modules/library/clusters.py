"""Clusters of experts as a file: which tasks share an expert."""

from __future__ import annotations

from pathlib import Path

from lightning_modules.merging.reading import read_object


def read_clusters(path: str) -> dict[str, list[str]]:
    """Read which tasks each cluster holds.

    Args:
        path: A JSON file with `{"clusters": {name: [tasks]}}`, as `quiver library cluster` writes it.

    Returns:
        Cluster to tasks.

    Raises:
        ValueError: If the file is missing or malformed, a cluster is empty, or a task is in two of them.
    """
    if not Path(path).is_file():
        raise ValueError(f"experts={path!r}: there is no such file. quiver library cluster writes one.")
    clusters = read_object(Path(path)).get("clusters")
    if not isinstance(clusters, dict) or not clusters:
        raise ValueError(f"{path} names no clusters. Expected {{'clusters': {{'name': ['task', ...]}}}}.")
    homes: dict[str, str] = {}
    for name, tasks in clusters.items():
        if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
            raise ValueError(f"{path}: the cluster {name!r} is no list of task names.")
        for task in tasks:
            if task in homes:
                raise ValueError(
                    f"{path}: the task {task!r} is in {homes[task]!r} and in {name!r}. Keep one."
                )
            homes[task] = name
    return clusters
