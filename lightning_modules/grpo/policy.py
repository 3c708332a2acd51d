"""What the loss sees of a micro-batch: log-probabilities under the policy, the old and the base policy.

Shapes: b rows, T completion tokens.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.grpo.losses import clip_fractions, kl_estimate
from lightning_modules.grpo.rollout import MicroBatch
from lightning_modules.logprobs import completion_logits, token_entropy, token_logprobs
from lightning_modules.metrics import Means


@dataclass(frozen=True)
class Tokens:
    """A micro-batch after the forward pass.

    Attributes:
        logprobs: Of the policy being trained, nats, with gradient (b, T).
        old_logprobs: Of the policy that the first update started from (b, T).
        ref_logprobs: Of the base policy (b, T); None when `kl_coef` is 0.
        entropy: Of the policy at each position, nats, without gradient (b, T).
        advantages: (b).
        mask: 1 on completion tokens that count (b, T).
        rows: Positions in the rollout (b).
    """

    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    entropy: Tensor
    advantages: Tensor
    mask: Tensor
    rows: list[int]


def switch_dropout_off(model: nn.Module) -> None:
    """Put a model into evaluation mode, except for what must know that it trains.

    Args:
        model: A model, with or without adapter. Layers that recompute activations keep their training flag,
            because transformers recomputes in training mode only; what is inside them does not.
    """
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def forward_policy(
    model: nn.Module,
    micro_batch: MicroBatch,
    *,
    temperature: float,
    reference: AbstractContextManager[Any] | None,
) -> Tokens:
    """Run the policy on a micro-batch.

    The first update starts from the policy that sampled, so the log-probabilities of its own forward pass are
    the old ones and cost no pass. They and the base policy's are kept in the micro-batch for later updates.

    Args:
        model: The policy.
        micro_batch: Rows of a rollout.
        temperature: Of the sampling.
        reference: Context in which the model is the base policy; None computes no reference.

    Returns:
        What `GRPOModule.loss` gets.
    """
    T = micro_batch.mask.shape[1]
    inputs = (micro_batch.input_ids, micro_batch.attention_mask, T, temperature)
    ids_BT = micro_batch.input_ids[:, -T:]
    if reference is not None and micro_batch.ref_logprobs is None:
        with torch.no_grad(), reference:
            micro_batch.ref_logprobs = token_logprobs(completion_logits(model, *inputs), ids_BT)
    logits_BTV = completion_logits(model, *inputs)
    logprobs_BT = token_logprobs(logits_BTV, ids_BT)
    if micro_batch.old_logprobs is None:
        micro_batch.old_logprobs = logprobs_BT.detach()
    return Tokens(
        logprobs=logprobs_BT,
        old_logprobs=micro_batch.old_logprobs,
        ref_logprobs=micro_batch.ref_logprobs,
        entropy=token_entropy(logits_BTV.detach()),
        advantages=micro_batch.advantages,
        mask=micro_batch.mask,
        rows=micro_batch.rows,
    )


def update_metric_names(*, kl: bool) -> list[str]:
    """Names of the metrics that only a step with an update has."""
    return ["entropy", "clip_low", "clip_high", "grad_norm", *(["kl"] if kl else [])]


def add_update_means(means: Means, tokens: Tokens, clip: tuple[float, float]) -> None:
    """Add entropy, clip shares and KL of a micro-batch, each a mean over its tokens."""
    logprobs_BT = tokens.logprobs.detach()
    low_BT, high_BT = clip_fractions(
        logprobs_BT, tokens.old_logprobs, tokens.advantages, tokens.mask, clip=clip
    )
    means.add("entropy", tokens.entropy, tokens.mask)
    means.add("clip_low", low_BT.float(), tokens.mask)
    means.add("clip_high", high_BT.float(), tokens.mask)
    if tokens.ref_logprobs is not None:
        means.add("kl", kl_estimate(logprobs_BT, tokens.ref_logprobs, "k3"), tokens.mask)
