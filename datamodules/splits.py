"""Seeded choices over row indices: permutations, held-out parts and quotas. The global RNG is never used."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from lightning_modules.ranges import check_number, check_whole


def stable_hash(*key: int | str) -> int:
    """Return a 63-bit integer that depends on `key` alone, unlike `hash()`, which differs per process.

    Example:
        >>> stable_hash(0, "val") == stable_hash(0, "val"), stable_hash(0, "val") == stable_hash(1, "val")
        (True, False)
    """
    text = "/".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def permutation(num_rows: int, *key: int | str) -> torch.Tensor:
    """Return the permutation of `range(num_rows)` that belongs to `key`, (num_rows,) int64 on the CPU."""
    generator = torch.Generator(device="cpu").manual_seed(stable_hash(*key))
    return torch.randperm(num_rows, generator=generator, device="cpu")


def weighted(order: torch.Tensor, weights: torch.Tensor, *key: int | str) -> torch.Tensor:
    """Draw as many entries of `order` as it has, each in proportion to its weight, in the random order of `key`.

    Systematic sampling: an entry that should come 1.3 times comes once or twice, never less or more.

    Args:
        order: Row indices (N,).
        weights: Of its entries, not negative, not all 0 (N,).
        key: What the draw belongs to.

    Returns:
        (N,).
    """
    generator = torch.Generator(device="cpu").manual_seed(stable_hash(*key))
    shuffled = torch.randperm(len(order), generator=generator)
    cumulated = weights[shuffled].double().cumsum(0)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    marks = (torch.arange(len(order)) + start) / len(order) * cumulated[-1]
    drawn = torch.searchsorted(cumulated, marks, right=True).clamp(max=len(order) - 1)
    return order[shuffled[drawn]][torch.randperm(len(order), generator=generator)]


def check_val_size(val_size: int | float) -> None:
    """Check that a validation part is a fraction in [0, 1) or a number of rows.

    Raises:
        ValueError: If it is neither.
    """
    hint = "Write 0.1 for a tenth of the rows, 100 for a hundred rows."
    if isinstance(val_size, float):
        check_number("val_size", val_size, least=0, below=1, hint=hint)
    else:
        check_whole("val_size", val_size, least=0, hint=hint)


def check_sizes(**sizes: int) -> None:
    """Check the numbers of rows of generated splits, 0 for none."""
    for name, size in sizes.items():
        check_whole(name, size, least=0)


def held_out(num_rows: int, val_size: int | float, seed: int, name: str) -> tuple[list[int], list[int]]:
    """Split row indices into a training and a validation part.

    Args:
        num_rows: Number of rows to split.
        val_size: A fraction in [0, 1) of the rows (at least one row if above 0), or a number of rows.
        seed: Decides which rows are held out.
        name: What the rows are, for the error message.

    Returns:
        Training and validation indices: disjoint, sorted, together all rows.

    Raises:
        ValueError: `val_size` is negative, a fraction of 1 or more, or leaves no row to train on.
    """
    check_val_size(val_size)
    count = max(1, round(val_size * num_rows)) if 0 < val_size < 1 else int(val_size)
    if count and count >= num_rows:
        raise ValueError(
            f"val_size={val_size!r} holds out {count} of the {num_rows} rows of {name} and leaves none to "
            "train on; lower val_size"
        )
    chosen = permutation(num_rows, seed, "held out").tolist()
    return sorted(chosen[count:]), sorted(chosen[:count])


def quotas(weights: Sequence[float], total: int) -> list[int]:
    """Share `total` rows in proportion to `weights` by largest remainder.

    Returns:
        One count per weight; the counts sum to `total` and differ from the exact shares by less than 1.

    Example:
        >>> quotas([3, 1], 10)
        [8, 2]
    """
    scale = total / sum(weights)
    exact = [weight * scale for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts
