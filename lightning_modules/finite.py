"""NaN and infinite values are found before they are written."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def finite(tensor: Tensor, what: str) -> Tensor:
    """Return a tensor, checked.

    Args:
        tensor: Of any type.
        what: File and name of the tensor, for the message.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(f"{what}: {int((~tensor.isfinite()).sum())} values are NaN or infinite.")
    return tensor


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Check several tensors.

    Args:
        tensors: Names and tensors.
        where: What holds them, for the message.

    Raises:
        ValueError: If a value is NaN or infinite, naming the tensor.
    """
    for name, tensor in tensors:
        finite(tensor, f"{where}: {name}")
