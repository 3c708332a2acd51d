"""LoRA factors and the changes that they stand for. Torch alone.

A change of a weight (out, in) of rank r is B A x scaling, A of (r, in) and B of (out, r).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.ranges import check_whole


class LoraFactors(NamedTuple):
    """The factors of one weight's change.

    Attributes:
        A: Applied first (r, in).
        B: Applied second (out, r).
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0


def lora_delta(A: Tensor, B: Tensor, alpha: float, r: int, use_rslora: bool = False) -> Tensor:
    """Return the change that LoRA factors stand for: B A x alpha / r (arXiv 2106.09685, section 4.1).

    Args:
        A: Applied first (r, in).
        B: Applied second (out, r).
        alpha: LoRA's alpha.
        r: The rank.
        use_rslora: Scale by alpha / sqrt(r) instead (arXiv 2312.03732).

    Returns:
        The change, float32 (out, in).

    >>> lora_delta(torch.ones(2, 3), torch.ones(1, 2), alpha=4, r=2)
    tensor([[4., 4., 4.]])
    """
    return B.float() @ A.float() * (alpha / (math.sqrt(r) if use_rslora else r))


def average_factors(experts: Sequence[LoraFactors]) -> tuple[Tensor, Tensor]:
    """Average A and B separately, as Arrow's "mu" and early LoRA merges do (arXiv 2405.11157).

    mean(A) and mean(scaling x B). Their product is not the average of the changes: it holds cross terms
    B_i A_j of different experts, at 1 / N^2. To average changes, merge the results of `lora_delta`.

    Args:
        experts: Factors of one weight, of equal rank.

    Returns:
        A (r, in) and B (out, r), float32; their scaling is 1.

    Raises:
        ValueError: If there is no expert, or shapes differ.
    """
    if not experts:
        raise ValueError("experts is empty: averaging needs at least one pair of factors.")
    shapes = [(tuple(expert.A.shape), tuple(expert.B.shape)) for expert in experts]
    if len(set(shapes)) > 1:
        listed = ", ".join(f"A {a} B {b} in expert {number}" for number, (a, b) in enumerate(shapes, 1))
        raise ValueError(f"Factors of different shapes cannot be averaged: {listed}. Average their changes.")
    A = torch.stack([expert.A.float() for expert in experts]).mean(0)
    B = torch.stack([expert.B.float() * expert.scaling for expert in experts]).mean(0)
    return A, B


def factor_average(experts: Sequence[Mapping[str, LoraFactors]]) -> dict[str, Tensor]:
    """Merge LoRA experts by `average_factors`, weight by weight.

    Args:
        experts: Factors of each weight that an expert changes. All experts change the same weights.

    Returns:
        The changes that the averaged factors stand for, float32 (out, in).

    Raises:
        ValueError: If an expert lacks a weight, or ranks differ.
    """
    merged = {}
    for name in dict.fromkeys(name for expert in experts for name in expert):
        if missing := [number for number, expert in enumerate(experts, 1) if name not in expert]:
            raise ValueError(
                f"{name}: expert {missing[0]} has no factors of it. Average the changes instead."
            )
        A, B = average_factors([expert[name] for expert in experts])
        merged[name] = B @ A
    return merged


def as_lora(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of a change by factors of a rank (truncated SVD, Eckart and Young 1936).

    B = U sqrt(S) and A = sqrt(S) V^T, so both factors have equal norms.

    Args:
        delta: The change (out, in).
        rank: Of the factors, at least 1. Above min(out, in) they are filled up with zeros.

    Returns:
        A (rank, in) and B (out, rank), float32, contiguous; their scaling is 1.

    Raises:
        ValueError: If the change is no matrix, or rank is below 1.
    """
    if delta.dim() != 2:
        raise ValueError(f"LoRA changes matrices, not a parameter of shape {tuple(delta.shape)}.")
    check_whole("rank", rank)
    U, S, Vh = torch.linalg.svd(delta.float(), full_matrices=False)
    root = S[:rank].sqrt()
    missing = rank - len(root)
    A = torch.nn.functional.pad(root[:, None] * Vh[:rank], (0, 0, 0, missing))
    B = torch.nn.functional.pad(U[:, :rank] * root, (0, missing))
    return A.contiguous(), B.contiguous()
