"""Do sampler and trainer mean the same policy? Compared once, before the first update of a process.

Shapes: b rows of a micro-batch, T completion tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_modules.sampling import Sampling


def cuts_off(sampling: Sampling) -> bool:
    """Return whether the sampler's log-probabilities are those of another distribution than the trainer's."""
    return bool(sampling.top_p < 1 or sampling.top_k or sampling.min_p or sampling.repetition_penalty != 1)


def sampler_gap(logprobs_bT: Tensor, sampler_logprobs_bT: Tensor, mask_bT: Tensor) -> Tensor:
    """Return the summed distance of two accounts of the same tokens, and the number of tokens.

    Args:
        logprobs_bT: By the trainer, nats (b, T).
        sampler_logprobs_bT: By the sampler, nats (b, T).
        mask_bT: 1 on tokens that are compared (b, T).

    Returns:
        Nats and a count (2).
    """
    # Not a product: what stands elsewhere may be anything.
    gap_bT = torch.where(mask_bT.bool(), logprobs_bT - sampler_logprobs_bT, 0.0).abs()
    return torch.stack([gap_bT.sum(), mask_bT.sum()])


def check_gap(mean: float, limit: float, sampler: str) -> None:
    """Refuse to train on rollouts of another policy.

    Args:
        mean: Mean distance of the log-probabilities of drawn tokens, nats.
        limit: Largest mean that is taken for a matter of kernels and precision.
        sampler: Its name.

    Raises:
        ValueError: If the mean is larger, or not a number.
    """
    if math.isfinite(mean) and mean <= limit:
        return
    raise ValueError(
        f"{sampler} says other log-probabilities of the tokens that it drew than the model that is trained: "
        f"{mean:.3g} nats apart on average, and objective.max_sampler_gap={limit:g}. It draws from another policy. "
        "Compare base model, adapter, chat template and temperature of both; with a vLLM server see docs/vllm.md. "
        "objective.max_sampler_gap: null trains on such rollouts."
    )
