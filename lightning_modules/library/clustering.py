"""Model-based clustering of experts (MBC, arXiv 2405.11157, Alg. 1): which tasks should share an adapter.

Shapes: E experts, D numbers of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics import silhouette_score
from torch import Tensor

from lightning_modules.merging.lora import LoraFactors
from lightning_modules.ranges import check_number


@dataclass(frozen=True)
class Clusters:
    """Experts in groups.

    Attributes:
        names: The experts (E).
        labels: The cluster of each, numbered by first appearance (E).
        similarity: Cosine of each pair (E, E).
        within: Mean cosine of pairs in one cluster; NaN without such pairs.
        between: Mean cosine of pairs in different clusters; NaN without such pairs.
        silhouette: Mean silhouette by 1 - cosine; NaN where it is not defined.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    similarity: np.ndarray
    within: float
    between: float
    silhouette: float

    def members(self) -> dict[str, list[str]]:
        """Return the experts of each cluster."""
        groups: dict[str, list[str]] = {}
        for name, label in zip(self.names, self.labels, strict=True):
            groups.setdefault(f"cluster_{label}", []).append(name)
        return groups


def flatten_factors(factors: Mapping[str, LoraFactors]) -> Tensor:
    """Put all numbers of A and B of an expert into one vector, layer by layer.

    The paper compares these. The same change has many factorisations (B Q, Q^-1 A), so this is meaningful among
    experts of one rank that started from the same A; `change_similarity` has no such need.

    Args:
        factors: By layer.

    Returns:
        float32 (D).
    """
    return torch.cat([part.flatten() for layer in sorted(factors) for part in factors[layer][:2]]).float()


def embed(vectors: Sequence[Tensor], trim: float = 0.5, components: int = 64, seed: int = 42) -> np.ndarray:
    """Reduce flattened experts, as the paper's code does.

    Args:
        vectors: Each expert's numbers (D).
        trim: In each expert the smallest numbers by magnitude, up to this quantile, count as zero. 0 keeps all.
        components: Dimensions to keep; at most E, of which there are no more.
        seed: Of the randomised SVD.

    Returns:
        Rows of unit norm (E, components).

    Raises:
        ValueError: If vectors differ in length or are zero, or `trim` is out of range.
    """
    check_number("trim", trim, least=0, below=1)
    if len({len(vector) for vector in vectors}) > 1:
        raise ValueError(
            "The experts differ in rank or in layers, so their numbers cannot be compared one by one. Cluster by "
            "--by change."
        )
    rows = np.empty((len(vectors), len(vectors[0])), dtype=np.float32)
    for row, vector in zip(rows, vectors, strict=True):
        row[:] = vector.numpy()
        row[vector.abs().topk(int(trim * len(vector)), largest=False).indices.numpy()] = 0
    count = min(components, len(vectors))
    reduced = TruncatedSVD(n_components=count, n_iter=5, random_state=seed).fit_transform(rows)
    return _unit(reduced.astype(np.float64))


def change_similarity(experts: Sequence[Mapping[str, LoraFactors]]) -> np.ndarray:
    """Return the cosine of each pair of changes B A, which does not depend on how they are factorised.

    <B1 A1, B2 A2> is the trace of (B1^T B2)(A2 A1^T), so no change is formed.

    Args:
        experts: Each expert's factors by layer; ranks and layers may differ.

    Returns:
        (E, E).

    Raises:
        ValueError: If an expert changes nothing.
    """
    count = len(experts)
    inner = np.zeros((count, count))
    for i, one in enumerate(experts):
        for j, other in enumerate(experts[: i + 1]):
            total = 0.0
            for layer in one.keys() & other.keys():
                first, second = one[layer], other[layer]
                product = (first.B.T @ second.B) * (first.A @ second.A.T)
                total += float(product.double().sum()) * first.scaling * second.scaling
            inner[i, j] = inner[j, i] = total
    norms = np.sqrt(np.diag(inner))
    _refuse_zero(norms)
    cosines: np.ndarray = inner / np.outer(norms, norms)
    return cosines


def cosine(rows: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows (E, E)."""
    unit = _unit(rows)
    cosines: np.ndarray = unit @ unit.T
    return cosines


def cluster(names: Sequence[str], similarity: np.ndarray, num_clusters: int, seed: int = 42) -> Clusters:
    """Group experts by k-means over the rows of their similarity matrix.

    Args:
        names: The experts (E).
        similarity: Cosine of each pair (E, E).
        num_clusters: K.
        seed: Of k-means++, of which the best of 10 starts counts.

    Returns:
        The clusters.

    Raises:
        ValueError: If there are fewer experts than clusters, or less than one cluster.
    """
    if not 1 <= num_clusters <= len(names):
        raise ValueError(
            f"num_clusters={num_clusters}: there are {len(names)} experts. Take a number from 1 to {len(names)}."
        )
    raw = KMeans(num_clusters, n_init=10, random_state=seed).fit_predict(similarity)
    order: dict[int, int] = {}
    labels = np.array([order.setdefault(int(label), len(order)) for label in raw])
    same = labels[:, None] == labels[None]
    pairs = ~np.eye(len(names), dtype=bool)
    found = len(order)
    defined = 1 < found < len(names)
    distance = np.clip(1 - similarity, 0, None)
    np.fill_diagonal(distance, 0)
    return Clusters(
        names=tuple(names),
        labels=tuple(labels.tolist()),
        similarity=similarity,
        within=_mean(similarity[same & pairs]),
        between=_mean(similarity[~same]),
        silhouette=float(silhouette_score(distance, labels, metric="precomputed"))
        if defined
        else float("nan"),
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1)
    _refuse_zero(norms)
    unit: np.ndarray = rows / norms[:, None]
    return unit


def _refuse_zero(norms: np.ndarray) -> None:
    if (empty := np.flatnonzero(~(norms > 0))).size:
        raise ValueError(
            f"The expert number {empty[0] + 1} changes nothing, so it is similar to none. Leave it out."
        )
