"""Who generates: the Sampler seam and its implementations."""

from lightning_modules.sampling.base import Announce, Completions, Sampler, Sampling
from lightning_modules.sampling.generate import GenerateSampler
from lightning_modules.sampling.native import NativeSampler

__all__ = ["Announce", "Completions", "GenerateSampler", "NativeSampler", "Sampler", "Sampling"]
