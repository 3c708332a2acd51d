"""PolicyUpdates: from groups of completions to updates of the policy, the same number of them on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_modules.distributed import all_sum, gathered
from lightning_modules.grpo.audit import Audit, check_gap, cuts_off
from lightning_modules.grpo.groups import Group, Row, balanced, rows_of
from lightning_modules.grpo.losses import aggregate
from lightning_modules.grpo.metrics import add_update_means, update_metric_names
from lightning_modules.grpo.objective import Objective
from lightning_modules.grpo.passes import Passes, best_passes
from lightning_modules.grpo.policy import (
    MicroBatch,
    Tokens,
    collate,
    forward_policy,
    policy_entropy,
    reference_logprobs,
)
from lightning_modules.grpo.policy_losses import PolicyLoss
from lightning_modules.grpo.reference import KL
from lightning_modules.grpo.validation import RolloutEvaluation
from lightning_modules.metrics import Means
from lightning_modules.sampling import Sampling


class PolicyUpdates(RolloutEvaluation):
    """The updates of a policy-gradient method. A subclass draws and rewards, sets the attributes and the loss.

    Attributes:
        sampling: How rollouts are drawn.
        policy_loss: The policy term; here for its metrics.
        kl: The KL term.
        objective: Which tokens count, and how much.
        updates_per_rollout: Optimiser updates from the same groups.
        max_tokens_per_microbatch: Token budget of one forward and backward pass.
        passes: How rows go through the model; None finds the cheapest way that serves it, before the first update.
    """

    sampling: Sampling
    policy_loss: PolicyLoss
    kl: KL
    objective: Objective
    updates_per_rollout: int
    max_tokens_per_microbatch: int
    passes: Passes[Any] | None = None

    def loss(self, tokens: Tokens) -> Tensor:
        """Return the loss of each token (b, T)."""
        raise NotImplementedError

    def update_policy(self, groups: Sequence[Group], filler: Row, means: Means) -> bool:
        """Update the policy from groups; a collective.

        Args:
            groups: Of this rank.
            filler: A row that counts nothing, for what all ranks do together.
            means: Where the metrics go.

        Returns:
            Whether any row of any rank had a gradient; else nothing was done.
        """
        objective = self.objective
        # What gives dead rows a gradient too, as long as they belong to the objective.
        beyond_rewards = self.kl.in_loss or objective.entropy_coef != 0
        members = [one for one in groups if one.is_live or objective.dead_groups == "keep"]

        def counts(group: Group, i: int) -> bool:
            return not (objective.mask_truncated and group.truncated[i])

        lengths = [len(one.token_ids[i]) for one in members for i in range(len(one)) if counts(one, i)]
        rows = rows_of(
            members,
            self.global_step,
            lambda group, i: counts(group, i) and (beyond_rewards or group.advantages[i] != 0),
        )
        tokens, sequences, computed = all_sum(
            self.trainer.strategy, torch.tensor([sum(lengths), len(lengths), len(rows)])
        ).tolist()
        for name in update_metric_names(kl=self.kl.in_loss):
            means.add(name, torch.empty(0))  # a step without update logs NaN, not the value of the last one
        if computed == 0:
            return False
        denominator = {
            "tokens": tokens,
            "sequences": sequences,
            "constant": sequences * self.sampling.max_new_tokens,
        }[objective.over]
        bundles = self._found_passes(filler).bundles
        micro_batches = self.micro_batches(balanced(rows, self.global_rank, bundles), filler)
        self._prepare(micro_batches)
        # Ranks add their gradients up as a mean, hence the world size.
        share = denominator / self.trainer.world_size
        audit = Audit(len(micro_batches), self._judge) if self._audits else None
        for _ in range(self.updates_per_rollout):
            norm = self.update(
                [partial(self._share_of_loss, one, share, means, audit) for one in micro_batches]
            )
            if self.kl.coef:
                self.kl.policy.after_update(self)
            means.add("grad_norm", norm)
        return True

    def micro_batches(self, rows: Sequence[Row], filler: Row) -> list[MicroBatch]:
        """Group rows within the token budget, at least one group, and under sharding as many on every rank.

        Args:
            rows: Of this rank.
            filler: A row that counts nothing.
        """
        passes = self._found_passes(filler)
        put = partial(
            collate,
            passes=passes,
            announce=self._announce,
            pad_token_id=self.pad_token_id,
            device=self.device,
        )
        single = self.adapter.wants_single_rows(self.updates_per_rollout)
        plan = passes.plan(rows, self.max_tokens_per_microbatch)
        if single:
            plan = [[i] for chosen in plan for i in chosen]
        found = [put([rows[i] for i in chosen]) for chosen in plan] or [put([filler])]
        return self.in_step(found, lambda: put([filler]))

    def reference_logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Return the log-probabilities of micro-batches under the reference policy, nats, without gradient.

        Args:
            micro_batches: As `micro_batches` returns them.

        Returns:
            (b, T) of each.
        """
        with self.kl.policy.context(self):
            return [
                reference_logprobs(self, one, temperature=self.sampling.temperature) for one in micro_batches
            ]

    @property
    def _audits(self) -> bool:
        return self.objective.max_sampler_gap is not None and not cuts_off(self.sampling)

    def _judge(self, gap: Tensor) -> None:
        """Refuse to learn from rows of another policy; a collective.

        Args:
            gap: What `sampler_gap` returned for rows of this rank (2).
        """
        total, tokens = all_sum(self.trainer.strategy, gap).tolist()
        if tokens and (limit := self.objective.max_sampler_gap) is not None:
            check_gap(total / tokens, limit, type(self.sampler).__name__)

    def _prepare(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Compute what the updates need of the policies they start from, in place."""
        if self.kl.in_loss:
            for one, logprobs_bT in zip(micro_batches, self.reference_logprobs(micro_batches), strict=True):
                one.ref_logprobs = logprobs_bT
        if self.objective.top_entropy == 1:
            return
        entropies = [
            policy_entropy(self, one, temperature=self.sampling.temperature) for one in micro_batches
        ]
        of_rank = [
            entropy_bT[one.mask.bool()].cpu()
            for one, entropy_bT in zip(micro_batches, entropies, strict=True)
        ]
        everyone = torch.cat(gathered(torch.cat(of_rank))).sort(descending=True).values
        # At least one token, since a row that counts has one.
        threshold = everyone[round(self.objective.top_entropy * len(everyone) + 0.5) - 1]
        for one, entropy_bT in zip(micro_batches, entropies, strict=True):
            one.policy_mask = one.mask * (entropy_bT >= threshold.to(entropy_bT.device))

    def _share_of_loss(
        self, micro_batch: MicroBatch, denominator: float, means: Means, audit: Audit | None
    ) -> Tensor:
        tokens = forward_policy(
            self,
            micro_batch,
            temperature=self.sampling.temperature,
            entropy_gradient=self.objective.entropy_coef != 0,
        )
        if audit is not None:
            audit.see(tokens)
        add_update_means(means, tokens, self.policy_loss)
        return aggregate(self.loss(tokens), tokens.mask, over=self.objective.over, denominator=denominator)

    def _found_passes(self, filler: Row) -> Passes[Any]:
        if self.passes is None:
            self._announce([filler])
            self.passes, why_not_cheaper = best_passes(self)
            if why_not_cheaper:
                rank_zero_info(why_not_cheaper)
        return self.passes

    def _announce(self, rows: Sequence[Row]) -> None:
        """Tell the adapter which rows come next."""
        self.adapter.route([row.task for row in rows], [row.prompt for row in rows])


def filler_of(batch: Any, pad_token_id: int) -> Row:
    """Return a row that counts nothing, of a task that the adapter knows.

    Args:
        batch: A batch of the data.
        pad_token_id: Its only token.
    """
    return Row(batch.prompts[0], batch.tasks[0], [pad_token_id], [pad_token_id], [0.0], 0.0, counts=False)
