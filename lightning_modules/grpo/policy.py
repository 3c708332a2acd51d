"""What the loss sees of a micro-batch: log-probabilities under the policy, the old one, the sampler and the reference.

Shapes: b rows, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_modules.grpo.groups import Row
from lightning_modules.grpo.passes import Inputs, Passes
from lightning_modules.microbatches import sent

Score: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class MicroBatch:
    """Rows that go through the model together, and what is kept of them from one update to the next.

    Attributes:
        rows: What they were made from (b).
        score: Runs a model on them: `Passes.logprobs` with their inputs.
        mask: 1 on completion tokens that count (b, T).
        advantages: (b).
        sampler_logprobs: Of the sampler, nats, 0 where masked (b, T).
        on_policy: Whether the policy that the first update starts from drew the row, bool (b).
        old_logprobs: Of the policy that drew the row (b, T); None before the first update's forward pass.
        ref_logprobs: Of the reference policy (b, T); None before they are computed.
        policy_mask: 1 on tokens whose policy loss counts (b, T); None for all.
    """

    rows: list[Row]
    score: Score
    mask: Tensor
    advantages: Tensor
    sampler_logprobs: Tensor
    on_policy: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    policy_mask: Tensor | None = None

    @property
    def fresh_mask(self) -> Tensor:
        """`mask`, 0 in rows of an earlier policy (b, T)."""
        return self.mask * self.on_policy[:, None]


@dataclass(frozen=True)
class Tokens:
    """A micro-batch after the forward pass.

    Attributes:
        logprobs: Of the policy being trained, nats, with gradient (b, T).
        old_logprobs: Of the policy that drew the rows (b, T).
        sampler_logprobs: The same by the sampler's own account (b, T).
        ref_logprobs: Of the reference policy (b, T); None without a KL term in the loss.
        entropy: Of the policy at each position, nats (b, T); with gradient where there is an entropy bonus.
        advantages: (b).
        mask: 1 on completion tokens that count (b, T).
        policy_mask: 1 on tokens whose policy loss counts (b, T); None for all.
        fresh_mask: `mask`, 0 in rows that wait from an earlier step, whose old policy is known by the sampler alone
            (b, T).
        rows: What they were made from (b).
    """

    logprobs: Tensor
    old_logprobs: Tensor
    sampler_logprobs: Tensor
    ref_logprobs: Tensor | None
    entropy: Tensor
    advantages: Tensor
    mask: Tensor
    policy_mask: Tensor | None
    fresh_mask: Tensor
    rows: list[Row]


def collate(
    rows: Sequence[Row],
    passes: Passes[Inputs],
    announce: Callable[[Sequence[Row]], None],
    *,
    pad_token_id: int,
    device: torch.device,
) -> MicroBatch:
    """Pad rows to their own longest prompt and completion.

    Args:
        rows: b.
        passes: How they go through the model.
        announce: Called before each pass with the rows that it is about.
        pad_token_id: Filler; masked everywhere.
        device: Where the tensors go.

    Returns:
        Tensors of the shapes that `MicroBatch` names.
    """
    rows = list(rows)
    inputs = passes.pad(rows, pad_token_id=pad_token_id, device=device)
    mask_bT = inputs.completion_mask.float()
    sampler_bT = torch.zeros(mask_bT.shape)
    for i, row in enumerate(rows):
        sampler_bT[i, : len(row.logprobs)] = torch.tensor(row.logprobs)
    counts_b = sent(torch.tensor([row.counts for row in rows]), device)
    return MicroBatch(
        rows=rows,
        score=partial(
            passes.logprobs, inputs=inputs, announce=lambda chosen: announce([rows[i] for i in chosen])
        ),
        mask=mask_bT * counts_b[:, None],
        advantages=sent(torch.tensor([row.advantage for row in rows], dtype=torch.float32), device),
        sampler_logprobs=sent(sampler_bT, device),
        on_policy=sent(torch.tensor([row.on_policy for row in rows]), device),
    )


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


def reference_logprobs(model: nn.Module, micro_batch: MicroBatch, *, temperature: float) -> Tensor:
    """Return log-probabilities without gradient, nats (b, T). Call it where the model is the reference policy.

    Args:
        model: The policy.
        micro_batch: Rows.
        temperature: Of the sampling.
    """
    with torch.no_grad():
        return micro_batch.score(model, temperature=temperature)[0]


def policy_entropy(model: nn.Module, micro_batch: MicroBatch, *, temperature: float) -> Tensor:
    """Return the entropy of the policy at each position, nats, without gradient (b, T).

    Args:
        model: The policy.
        micro_batch: Rows.
        temperature: Of the sampling.
    """
    with torch.no_grad():
        return micro_batch.score(model, temperature=temperature)[1]


def forward_policy(
    model: nn.Module, micro_batch: MicroBatch, *, temperature: float, entropy_gradient: bool = False
) -> Tokens:
    """Run the policy on a micro-batch.

    The first update starts from the policy that drew most rows, so the log-probabilities of its own forward pass are
    the old ones and cost no pass. Rows that wait from an earlier step have the sampler's. They are kept in the
    micro-batch for later updates.

    Args:
        model: The policy.
        micro_batch: Rows.
        temperature: Of the sampling.
        entropy_gradient: Whether the entropy carries a gradient.

    Returns:
        What `GRPOModule.loss` gets.
    """
    logprobs_bT, entropy_bT = micro_batch.score(
        model, temperature=temperature, entropy_gradient=entropy_gradient
    )
    if micro_batch.old_logprobs is None:
        micro_batch.old_logprobs = torch.where(
            micro_batch.on_policy[:, None], logprobs_bT.detach(), micro_batch.sampler_logprobs
        )
    return Tokens(
        logprobs=logprobs_bT,
        old_logprobs=micro_batch.old_logprobs,
        sampler_logprobs=micro_batch.sampler_logprobs,
        ref_logprobs=micro_batch.ref_logprobs,
        entropy=entropy_bT,
        advantages=micro_batch.advantages,
        mask=micro_batch.mask,
        policy_mask=micro_batch.policy_mask,
        fresh_mask=micro_batch.fresh_mask,
        rows=micro_batch.rows,
    )
