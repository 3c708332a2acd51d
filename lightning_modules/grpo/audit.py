"""Do sampler and trainer mean the same policy? Compared on fresh rows, before each rollout's first update is made.

The update's own forward passes are compared, so that this costs none. Shapes: b rows of a micro-batch, T completion
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_modules.grpo.policy import Tokens
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


class Audit:
    """Adds up the gap over the micro-batches of an update, and has it judged with the last one, before any step.

    Args:
        micro_batches: How many there are.
        judge: Takes the sum, nats, and the number of tokens of this rank (2).
    """

    def __init__(self, micro_batches: int, judge: Callable[[Tensor], None]) -> None:
        self._left = micro_batches
        self._judge = judge
        self._gap: Tensor | float = 0.0

    def see(self, tokens: Tokens) -> None:
        """Add a micro-batch after its first forward pass.

        Raises:
            ValueError: By `judge`, with the last one.
        """
        if self._left:
            # A trainer without numbers is another matter, of updates that are left out.
            mask_bT = tokens.fresh_mask * ~tokens.old_logprobs.isnan()
            self._gap = self._gap + sampler_gap(tokens.old_logprobs, tokens.sampler_logprobs, mask_bT)
            self._left -= 1
            if not self._left:
                assert isinstance(self._gap, Tensor)
                self._judge(self._gap)


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
