"""GPUs by name, with the memory that their driver reports, and whether a run fits."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, TypeAlias

MIB = 2**20
GIB = 2**30

Verdict: TypeAlias = Literal["fits", "tight", "does not fit"]

# Above this share of the memory a run is called tight: the CUDA context, NCCL's buffers and gaps that the allocator
# leaves between blocks come on top of the tensors, and no plan knows them.
TIGHT = 0.9


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: Maker's name and size.
        memory: Bytes that `nvidia-smi` reports as total.
    """

    name: str
    memory: int

    def verdict(self, peak: int) -> Verdict:
        """Say whether tensors of this many bytes fit."""
        if peak > self.memory:
            return "does not fit"
        return "tight" if peak > TIGHT * self.memory else "fits"


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4-16GB", 15360 * MIB),
        Gpu("L4-24GB", 23034 * MIB),
        Gpu("A10G-24GB", 23028 * MIB),
        Gpu("RTX3090-24GB", 24576 * MIB),
        Gpu("RTX4090-24GB", 24564 * MIB),
        Gpu("V100-32GB", 32768 * MIB),
        Gpu("A100-40GB", 40960 * MIB),
        Gpu("L40S-48GB", 46068 * MIB),
        Gpu("A100-80GB", 81920 * MIB),
        Gpu("H100-80GB", 81559 * MIB),
        Gpu("H200-141GB", 143771 * MIB),
        Gpu("B200-192GB", 183359 * MIB),
    )
}


def find_gpu(name: str) -> Gpu:
    """Look a GPU up.

    Args:
        name: As in `GPUS`, in any case; or a size such as `48GB`, for one that is not listed.

    Raises:
        ValueError: If it is neither.
    """
    known = {one.lower(): gpu for one, gpu in GPUS.items()}
    if gpu := known.get(name.lower()):
        return gpu
    size = name.lower().removesuffix("gb")
    if size != name.lower() and size.isdigit() and int(size) > 0:
        return Gpu(name, int(size) * 1024 * MIB)
    close = get_close_matches(name.lower(), known, n=1)
    hint = f"Did you mean {known[close[0]].name}? " if close else ""
    raise ValueError(
        f"gpu={name!r} is not known. {hint}There are {', '.join(GPUS)}; give the size of another one, such as 48GB."
    )
