"""RolloutSteps: the course of a training step, from a batch of prompts to updates and metrics.

Shapes: B rows = prompts x G, the G completions of a prompt in neighbouring rows; b rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.batches import TextBatch
from lightning_modules.distributed import all_sum, gathered
from lightning_modules.grpo.estimators import Advantage
from lightning_modules.grpo.groups import Group, groups_of, rows_of
from lightning_modules.grpo.metrics import add_rollout_means, with_correlation
from lightning_modules.grpo.resampling import Pool, Resampling, shares
from lightning_modules.grpo.reward_watch import RewardWatch
from lightning_modules.grpo.rollout import Rollout, Scores
from lightning_modules.grpo.scoring import Scoring
from lightning_modules.grpo.updates import PolicyUpdates, filler_of
from lightning_modules.metrics import Clock, Means

PATIENCE = 20
"""Steps without any signal after which the user is told."""

# Of a checkpoint's tensors, those of the reference policy.
_REFERENCE = "reference:"


class RolloutSteps(PolicyUpdates):
    """Draws, rewards, resamples and learns. A subclass sets the attributes and defines the four hooks.

    Attributes:
        num_generations: G.
        advantage: How rewards become advantages.
        resampling: How dead groups are replaced; None not at all.
        scoring: How rewards are combined, and how long training goes on without any.
        watch: Looks at the rewards.
        num_tokens: Tokens drawn so far, over all ranks.
        skipped_steps: Steps that had nothing to learn from.
        draws: Rollouts so far; each draws other random numbers.
        sampling_seed: Seed of the run.
        pool: What one update leaves for the next.
    """

    num_generations: int
    advantage: Advantage
    resampling: Resampling | None
    scoring: Scoring
    watch: RewardWatch

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_tokens = 0
        self.skipped_steps = 0
        self.draws = 0
        self.sampling_seed: int = 0
        self.pool = Pool()
        self._skipped_in_a_row = 0
        self._live_rollouts = 0
        self._clock, self._means = Clock(), Means()

    def advantages(self, scores: Scores, rollout: Rollout) -> Tensor:
        """Compare the completions of each group (B)."""
        raise NotImplementedError

    def training_step(self, batch: TextBatch, batch_idx: int) -> Mapping[str, Any]:
        """One rollout and its updates; with resampling, what is due.

        Returns:
            `rollout`, `scores` and `advantages`, for callbacks; nothing where nothing was drawn.
        """
        if self.resampling is not None:
            return self._resample(batch, self.resampling)
        drawn, groups = self._draw(batch)
        self._learn(groups, batch)
        self._log_step()
        return drawn

    def _resample(self, batch: TextBatch, resampling: Resampling) -> Mapping[str, Any]:
        """Take a batch in; draw where enough wait, and update where there is enough, or no more may be drawn."""
        pool, G = self.pool, self.num_generations
        pool.waiting.append(batch)
        prompts = self._over_ranks(len(batch))
        wanted = resampling.live_groups - self._over_ranks(len(pool.groups))
        drawn: Mapping[str, Any] = {}
        if wanted > 0:
            due = resampling.draws(wanted, pool.live_share or 1.0, prompts, pool.drawn, G)
            if len(pool.waiting) < due:
                return drawn
            joined, pool.waiting = TextBatch.joined(pool.waiting), []
            drawn, groups = self._draw(joined)
            live = [group for group in groups if group.is_live]
            pool.groups += live
            asked = self._over_ranks(len(groups))
            pool.drawn += asked * G
            pool.observe(self._over_ranks(len(live)), asked)
        updated = False
        while (ready := self._over_ranks(len(pool.groups))) >= resampling.live_groups:
            self._learn(self._take(resampling.live_groups), batch)
            updated = True
        if not updated and pool.drawn + prompts * G > resampling.max_rollouts:
            self._learn(self._take(ready), batch)
            updated = True
        if updated:
            self._log_step()
        return drawn

    def _take(self, number: int) -> list[Group]:
        """Take the oldest groups of all ranks out of the pool; return those of this rank."""
        ages = gathered([group.drawn_at for group in self.pool.groups])
        own = shares(ages, number)[self.global_rank if len(ages) > 1 else 0]
        taken, self.pool.groups = self.pool.groups[:own], self.pool.groups[own:]
        self.pool.drawn = 0
        return taken

    def _over_ranks(self, number: int) -> int:
        return int(all_sum(self.trainer.strategy, torch.tensor(number)).item())

    def _draw(self, batch: TextBatch) -> tuple[Mapping[str, Any], list[Group]]:
        """Draw and score the completions of a batch, and cut them into groups."""
        with self._clock("generate"):
            rollout = self.rollout(batch, self.num_generations, self.sampling)
        self.draws += 1
        with self._clock("score"):
            scores = self.score(rollout)
            self._watch(scores, rollout.group_size)
        if self.kl.coef and self.kl.in_reward:
            with self._clock("reference"):
                scores = self._penalised(scores, rollout)
        advantages_B = self.advantages(scores, rollout)
        if advantages_B.shape != (len(rollout),) or not advantages_B.isfinite().all():
            raise ValueError(
                f"{type(self).__name__}.advantages must return one finite number for each of the "
                f"{len(rollout)} rows, got {advantages_B}."
            )
        self.num_tokens += self._over_ranks(int(rollout.lengths.sum()))
        add_rollout_means(self._means, rollout, scores, advantages_B)
        groups = groups_of(rollout, advantages_B, self.global_step)
        return {"rollout": rollout, "scores": scores, "advantages": advantages_B}, groups

    def _watch(self, scores: Scores, group_size: int) -> None:
        """Look for rewards that cannot teach, and for those that are not there; a collective."""
        applies_K = (~scores.by_function.isnan()).sum(0)
        counts = torch.cat([applies_K, applies_K.new_tensor([len(scores.total)])])
        *applied, completions = all_sum(self.trainer.strategy, counts).tolist()
        self.missing.observe(scores.names, applied, completions, self.scoring.patience)
        self.watch.observe(scores, group_size)

    def _penalised(self, scores: Scores, rollout: Rollout) -> Scores:
        """Subtract the completions' KL estimates from their rewards; a collective under sharding."""
        groups = groups_of(rollout, torch.zeros(len(rollout)), self.global_step)
        rows = [
            replace(row, number=i) for i, row in enumerate(rows_of(groups, self.global_step, lambda *_: True))
        ]
        micro_batches = self.micro_batches(rows, filler_of(rollout.batch, self.pad_token_id))
        penalty_B = torch.zeros(len(rollout))
        for one, ref_bT in zip(micro_batches, self.reference_logprobs(micro_batches), strict=True):
            k1_bT = torch.where(one.mask.bool(), one.sampler_logprobs - ref_bT, 0.0)
            self._means.add("kl", k1_bT, one.mask)
            for row, sum_b in zip(one.rows, k1_bT.sum(1).tolist(), strict=True):
                if row.counts:
                    penalty_B[row.number] = sum_b
        return replace(scores, total=scores.total - self.kl.coef * penalty_B)

    def _learn(self, groups: Sequence[Group], batch: TextBatch) -> None:
        """Make the updates that groups are for, or count a step without any, on every rank."""
        with self._clock("update"):
            live = self._over_ranks(sum(len(group) for group in groups if group.is_live))
            self._live_rollouts += live
            if self.update_policy(groups, filler_of(batch, self.pad_token_id), self._means):
                self._skipped_in_a_row = 0
            else:
                self._skip_step()

    def _skip_step(self) -> None:
        """Count a step that leaves weights and optimiser alone, on every rank."""
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        for _ in range(self.updates_per_rollout):
            self.count_step_without_update()
        if self._skipped_in_a_row == PATIENCE:
            rank_zero_warn(
                f"{PATIENCE} steps in a row had no group whose completions differ in reward, so nothing was "
                "learned. Look at the rollouts: is the task far too hard or easy, or the reward constant?"
            )

    def _log_step(self) -> None:
        """Log what came together since the last update."""
        values = with_correlation(self._means.reduce(self.trainer.strategy))
        seconds = self._clock.seconds
        values |= {f"time/{phase}": spent for phase, spent in seconds.items()}
        values["time/effective_rollouts_per_s"] = self._live_rollouts / max(sum(seconds.values()), 1e-9)
        values |= {"tokens": float(self.num_tokens), "skipped_steps": float(self.skipped_steps)}
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=1)
        # Logged a second time without the prefix only for the progress bar.
        self.log("reward", values["reward"], prog_bar=True, logger=False, batch_size=1)
        self._clock, self._means, self._live_rollouts = Clock(), Means(), 0

    def on_fit_end(self) -> None:
        """Repeat, as the last words of a run, which rewards never came."""
        super().on_fit_end()
        if summary := self.missing.summary():
            self.print(summary)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the reference policy, and rollouts that no update has used yet."""
        super().on_save_checkpoint(checkpoint)
        if self.kl.coef:
            checkpoint["state_dict"] |= {
                f"{_REFERENCE}{name}": tensor for name, tensor in self.kl.policy.tensors().items()
            }
        if self.resampling is not None:
            checkpoint["unused_rollouts"] = gathered(
                {
                    "pool": self.pool.state_dict(),
                    "means": self._means.state_dict(),
                    "live_rollouts": self._live_rollouts,
                }
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` added.

        Raises:
            ValueError: If the checkpoint holds another reference policy than this run has.
        """
        state = checkpoint["state_dict"]
        reference = {name.removeprefix(_REFERENCE): one for name, one in state.items() if _is_reference(name)}
        checkpoint["state_dict"] = {name: one for name, one in state.items() if not _is_reference(name)}
        super().on_load_checkpoint(checkpoint)
        if self.kl.coef and self._trainer is not None and self.trainer.training:
            self.kl.policy.load_state_dict(reference)
        if (parts := checkpoint.get("unused_rollouts")) and self.resampling is not None:
            rank, world_size = self.global_rank, self.trainer.world_size
            self.pool = Pool.merged([part["pool"] for part in parts], rank, world_size)
            own = [part for i, part in enumerate(parts) if i % world_size == rank]
            self._means.load_state_dict([part["means"] for part in own])
            self._live_rollouts = parts[0]["live_rollouts"]

    def counters(self) -> Mapping[str, int]:
        """Return the running counts."""
        return {
            **super().counters(),
            "num_tokens": self.num_tokens,
            "skipped_steps": self.skipped_steps,
            "draws": self.draws,
            "sampling_seed": self.sampling_seed,
        }

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Continue the running counts."""
        super().load_counters(counters)
        self.num_tokens = counters.get("num_tokens", 0)
        self.skipped_steps = counters.get("skipped_steps", 0)
        self.draws = counters.get("draws", 0)
        self.sampling_seed = counters.get("sampling_seed", self.sampling_seed)


def _is_reference(name: str) -> bool:
    return name.startswith(_REFERENCE)
