"""Random numbers of a score that belong to one weight of one expert. Torch alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def draws_of(device: torch.device, *key: object) -> Iterator[None]:
    """Let what is drawn inside depend on the key alone, and leave the generators outside as they were.

    Args:
        device: Whose generator is seeded beside that of the CPU.
        key: Such as the run's seed, the name of the weight and the step.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
