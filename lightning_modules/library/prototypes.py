"""What a low-rank change does to inputs: its top right singular vector, and its whole spectrum. Torch alone.

A change of a weight (out, in) of rank r is B A, A of (r, in) and B of (out, r). Shapes with E hold E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spectra(A: Tensor, B: Tensor) -> Tensor:
    """Return Sigma V^T of each change B A = U Sigma V^T, so that ||result @ x|| = ||B A x||.

    Exact, and cheap: with A^T = Q_A R_A and B = Q_B R_B, the r x r core R_B R_A^T has the singular values of B A,
    and its right singular vectors, taken to the input space by Q_A, are those of B A. In float64, since squares of
    singular values, which a product A B^T B A would have, lose half of the digits.

    Args:
        A: (E, r, in).
        B: (E, out, r), alpha / r folded in or not.

    Returns:
        float32 (E, min(r, in), in), rows by falling singular value.

    Raises:
        ValueError: If a factor holds NaN or infinity.
    """
    right, values = _right_singular(A, B)
    return (values[..., None] * right).float()


def arrow_prototypes(A: Tensor, B: Tensor) -> Tensor:
    """Return the input direction that each change B A stretches most (Arrow, arXiv 2405.11157, Alg. 2).

    The top right singular vector of B A, exact as in `spectra`. PEFT takes 15 power steps instead, which do not
    converge where the first two singular values are close.

    Args:
        A: (E, r, in).
        B: (E, out, r).

    Returns:
        Unit vectors, float32 (E, in), whose entry of largest magnitude is positive; zeros for a change that is
        zero.

    Raises:
        ValueError: If a factor holds NaN or infinity.
    """
    right, values = _right_singular(A, B)
    top = right[:, 0]
    sign = top.gather(1, top.abs().argmax(1, keepdim=True)).sign()
    return (top * sign * (values[:, :1] > 0)).float()


def arrow_prototype(A: Tensor, B: Tensor) -> Tensor:
    """Return `arrow_prototypes` of one expert.

    Args:
        A: (r, in).
        B: (out, r).

    Returns:
        A unit vector, float32 (in).

    >>> arrow_prototype(torch.tensor([[0.0, 2.0]]), torch.ones(3, 1))
    tensor([0., 1.])
    """
    return arrow_prototypes(A[None], B[None])[0]


def _right_singular(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return right singular vectors as rows (E, n, in) and singular values (E, n), n = min(r, in), float64."""
    for name, factor in (("A", A), ("B", B)):
        if not bool(factor.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity, so the change has no spectrum.")
    basis, R_A = torch.linalg.qr(A.double().mT)  # (E, in, n), (E, n, r)
    R_B = torch.linalg.qr(B.double(), mode="r").R
    _, values, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Vh @ basis.mT, values
