"""`quiver library cluster`: groups the experts of a library, for one expert per group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import wandb
from sklearn.metrics import adjusted_rand_score

from lightning_modules.files import complete_file, set_aside
from lightning_modules.library.cluster_figure import cluster_figure
from lightning_modules.library.clustering import (
    Clusters,
    change_similarity,
    cluster,
    cosine,
    embed,
    flatten_factors,
)
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.merging.reading import read_object
from lightning_modules.naming import natural
from lightning_modules.ranges import check_number, check_whole


def cluster_library(
    library: str,
    num_clusters: int = 10,
    output: str = "clusters.json",
    by: Literal["factors", "change"] = "factors",
    trim: float = 0.5,
    components: int = 64,
    seed: int = 42,
    families: str | None = None,
    image: bool = True,
    wandb_project: str | None = None,
) -> None:
    """Cluster the LoRA experts of a library by k-means over their similarity (MBC, arXiv 2405.11157).

    Args:
        library: The library.
        num_clusters: How many clusters.
        output: The JSON file to write, which `experts:` of AdapterLibraryModule reads; the picture lies beside it.
        by: `factors` compares the numbers of A and B, as the paper does, which needs experts of one rank that
            started from the same A. `change` compares the changes B A themselves.
        trim: With `factors`, the share of smallest numbers of an expert that counts as zero.
        components: With `factors`, the dimensions that the numbers are reduced to.
        seed: Of the reduction and of k-means.
        families: A JSON file with `{"families": {name: [tasks]}}`, to print the adjusted Rand index against it.
        image: Draw the similarity (extra `plots`).
        wandb_project: Log picture and table to this project of W&B.

    Raises:
        ValueError: If the library is empty, an expert is no LoRA, or there are fewer experts than clusters.
    """
    check_whole("num_clusters", num_clusters)
    check_number("trim", trim, least=0, below=1)
    check_whole("components", components)
    check_whole("seed", seed, least=0, most=2**32 - 1)
    store = AdapterLibrary(library)
    names = sorted(store, key=natural)
    if not names:
        raise ValueError(f"The library {library} is empty. Add adapters: quiver library add.")
    if sparse := [name for name in names if store[name].kind != "lora"]:
        raise ValueError(f"{sparse[0]!r} is a sparse adapter. Clusters are made of LoRA experts.")
    opened = {name: store[name].open() for name in names}
    factors = [{weight: expert.factors(weight) for weight in expert.names} for expert in opened.values()]
    if by == "factors":
        vectors = [flatten_factors(one) for one in factors]
        similarity = cosine(embed(vectors, trim, components, seed))
    else:
        similarity = change_similarity(factors)
    found = cluster(names, similarity, num_clusters, seed)
    tasks = {name: list(store[name].tasks) or [name] for name in names}
    target = Path(output)
    set_aside(target)
    with complete_file(target) as aside:
        aside.write_text(json.dumps(_content(found, tasks, by, seed), indent=1), encoding="utf-8")
    _print_table(found, store)
    if families is not None:
        print(f"adjusted Rand index against {families}: {rand_index(found, tasks, families):.3f}")  # noqa: T201
    if image:
        picture = target.with_suffix(".png")
        set_aside(picture)
        cluster_figure(found).savefig(picture, dpi=120)
    if wandb_project is not None:
        _log(found, wandb_project, target.with_suffix(".png") if image else None)
    print(f"Wrote {target}. One expert for each: --model.experts {target}")  # noqa: T201


def rand_index(found: Clusters, tasks: dict[str, list[str]], families: str) -> float:
    """Return the adjusted Rand index of clusters against known families of tasks: 1 equal, 0 by chance.

    Raises:
        ValueError: If the file names no families, or an expert's first task is in none.
    """
    known = read_object(Path(families)).get("families")
    if not isinstance(known, dict):
        raise ValueError(
            f"families={families!r} names no families. Expected {{'families': {{name: [tasks]}}}}."
        )
    home = {task: family for family, own in known.items() for task in own}
    if missing := [name for name in found.names if tasks[name][0] not in home]:
        raise ValueError(f"families={families!r} lacks {tasks[missing[0]][0]!r}, the task of {missing[0]!r}.")
    return float(adjusted_rand_score([home[tasks[name][0]] for name in found.names], found.labels))


def _content(found: Clusters, tasks: dict[str, list[str]], by: str, seed: int) -> dict[str, object]:
    members = found.members()
    return {
        "clusters": {label: _merged([tasks[name] for name in own]) for label, own in members.items()},
        "experts": members,
        "by": by,
        "seed": seed,
    }


def _merged(lists: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(task for tasks in lists for task in tasks))


def _rows(found: Clusters) -> list[tuple[str, int, float, str]]:
    rows = []
    for label, own in found.members().items():
        places = [found.names.index(name) for name in own]
        pairs = [found.similarity[i, j] for i in places for j in places if i < j]
        rows.append((label, len(own), sum(pairs) / len(pairs) if pairs else float("nan"), ", ".join(own)))
    return rows


def _print_table(found: Clusters, store: AdapterLibrary) -> None:
    print(f"{'cluster':12} {'experts':>7} {'cosine':>7}  members")  # noqa: T201
    for label, size, mean, own in _rows(found):
        print(f"{label:12} {size:7d} {mean:7.3f}  {own}")  # noqa: T201
    print(  # noqa: T201
        f"mean cosine within clusters {found.within:.3f}, between {found.between:.3f}, silhouette "
        f"{found.silhouette:.3f}, {len(store)} experts"
    )


def _log(found: Clusters, project: str, picture: Path | None) -> None:
    with wandb.init(project=project, job_type="cluster") as run:
        table = wandb.Table(
            ["cluster", "experts", "cosine", "members"], data=[list(row) for row in _rows(found)]
        )
        run.log({"clusters": table})
        if picture is not None:
            run.log({"similarity": wandb.Image(str(picture))})
