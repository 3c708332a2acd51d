"""Merging by singular values: Iso-C and TSV-M. Torch alone. Results are dense.

Parameters that are no matrices (norms, biases) are averaged, as the authors' code does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_modules.merging.vectors import Delta, TaskVector, parameters
from lightning_modules.ranges import check_number


def iso_c(experts: Sequence[TaskVector], *, scale: float = 1.0) -> dict[str, Delta]:
    """Iso-C (arXiv 2502.04959): give all directions of the sum the same strength.

    With the SVD sum_i delta_i = U S V^T of rank r, merged = scale x mean(S_1..S_r) x U V^T. Deviation: r is
    the numerical rank, where the authors' code takes m = min(out, in). Both agree for full fine-tuning; for
    LoRA it keeps out directions that no expert uses and that the SVD chooses arbitrarily. With it changes the
    norm: sum(S) / sqrt(r) here, sum(S) / sqrt(m) there, so that the result is sqrt(m / r) times as long. Four
    experts of rank 8 on 576 x 576 weights have r = 32: 4.2 times; sixteen have r = 128: 2.1 times.

    Args:
        experts: Task vectors.
        scale: Of the merged vector, alpha in the paper. For experts of low rank an alpha that was found with the
            authors' code becomes alpha x sqrt(r / m) here, r being the rank of the sum.

    Returns:
        The merged task vector, dense float32.

    Raises:
        ValueError: If the shape of a parameter is not known.
    """
    check_number("scale", scale)

    def merge(deltas: Sequence[Tensor], _: int) -> Tensor:
        U, S, Vh = _svd(torch.stack(list(deltas)).sum(0))
        return scale * (S.mean() if len(S) else 0.0) * (U @ Vh)

    return _merge_matrices(experts, merge)


def tsv_m(experts: Sequence[TaskVector], *, scale: float = 1.0) -> dict[str, Delta]:
    """TSV-M (arXiv 2412.00081): keep each expert's leading directions and make them orthogonal to each other.

    Of N experts each keeps its k = max(1, min(out, in) // N) leading singular triplets. U = [U_1 .. U_N], and
    V likewise, is replaced by the nearest matrix with orthonormal columns (Procrustes: with the SVD
    U = P D Q^T that is P Q^T); merged = scale x U S V^T. Deviation: triplets beyond the numerical rank of an
    expert, which have no definite direction, are left out; for full fine-tuning there are none. The norm is the
    authors', sqrt(sum S^2) over the kept triplets, because those that are left out have S = 0.

    Args:
        experts: Task vectors.
        scale: Of the merged vector, alpha in the paper.

    Returns:
        The merged task vector, dense float32.

    Raises:
        ValueError: If the shape of a parameter is not known.
    """
    check_number("scale", scale)

    def merge(deltas: Sequence[Tensor], num_experts: int) -> Tensor:
        count = max(1, min(deltas[0].shape) // num_experts)
        triplets = [_svd(delta) for delta in deltas]
        U = torch.cat([U[:, :count] for U, _, _ in triplets], 1)
        S = torch.cat([S[:count] for _, S, _ in triplets])
        Vh = torch.cat([Vh[:count] for _, _, Vh in triplets])
        return scale * (_whitened(U) * S) @ _whitened(Vh)

    return _merge_matrices(experts, merge)


def _merge_matrices(
    experts: Sequence[TaskVector], merge: Callable[[Sequence[Tensor], int], Tensor]
) -> dict[str, Delta]:
    """Apply `merge(deltas, number of experts)` to each matrix, and average everything else."""
    merged: dict[str, Delta] = {}
    for parameter in parameters(experts):
        deltas = parameter.dense()
        if deltas[0].dim() == 2:
            merged[parameter.name] = merge(deltas, parameter.num_experts)
        else:
            merged[parameter.name] = torch.stack(deltas).sum(0) / parameter.num_experts
    return merged


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, r), S (r) and V^T (r, n), r the numerical rank."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    if not len(S):
        return U, S, Vh
    noise = S[0] * max(matrix.shape) * torch.finfo(S.dtype).eps
    rank = int(S.gt(noise).sum())
    return U[:, :rank], S[:rank], Vh[:rank]


def _whitened(matrix: Tensor) -> Tensor:
    """Return the nearest matrix whose columns, or rows where these are fewer, are orthonormal."""
    P, _, Qh = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = P @ Qh
    return nearest
