"""GRPOModule: group relative policy optimisation as four hooks around pure functions.

Shapes: B rows = prompts x G, K reward functions, T completion tokens, b rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr
from torch import Tensor

from datamodules.batches import TextBatch
from lightning_modules.distributed import gathered
from lightning_modules.grpo.advantages import Scale
from lightning_modules.grpo.checks import check_settings, warn_of_settings
from lightning_modules.grpo.correction import off_policy_rows
from lightning_modules.grpo.estimators import Advantage, GroupAdvantage, Rewards
from lightning_modules.grpo.losses import kl_estimate
from lightning_modules.grpo.metrics import free_name
from lightning_modules.grpo.objective import Objective
from lightning_modules.grpo.passes import best_passes
from lightning_modules.grpo.plan import Plan, kv_bytes_per_token, parameter_facts
from lightning_modules.grpo.policy import Tokens, switch_dropout_off
from lightning_modules.grpo.policy_losses import ClippedSurrogate, PolicyLoss
from lightning_modules.grpo.reference import KL
from lightning_modules.grpo.resampling import Resampling
from lightning_modules.grpo.reward_watch import RewardWatch
from lightning_modules.grpo.rewards import RewardFunction
from lightning_modules.grpo.rollout import Rollout, Scores, repeat_rows, row_seeds
from lightning_modules.grpo.scoring import Scoring, as_number, reward_names, score_completions, weighted_total
from lightning_modules.grpo.steps import PATIENCE, RolloutSteps
from lightning_modules.ranges import check_numbers
from lightning_modules.sampling import NativeSampler, Sampler, Sampling


class GRPOModule(RolloutSteps):
    """Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300, eq. 3).

    Two completions per prompt, the default, are 2-GRPO ("It Takes Two: Your GRPO Is Secretly DPO", arXiv
    2510.00977). A step samples `num_generations` completions of each prompt, scores them, compares them
    within their group, and updates the policy. A subclass changes the method by overriding one hook:
    `rollout`, `score`, `advantages` or `loss`.

    Deviations from the papers: advantages use the population standard deviation by default, as the 2-GRPO
    paper's analysis does and DeepSeekMath leaves open; tokens of the whole optimiser step weigh the same
    (`over: tokens`, DAPO), not sequences; the clip defaults to 0.2 on both sides; no KL term by default;
    dropout is off. Logged clip shares, entropy and KL are means over all updates of a step, the first of
    which clips nothing.

    One `training_step` is one rollout with its `updates_per_rollout` updates, by manual optimisation, so
    every checkpoint lies on a rollout border. `max_steps` counts `updates_per_rollout` for each rollout, also
    for one without any live group, which updates nothing. With `resampling` a `training_step` may only draw,
    or only take prompts in, and only updates count.

    Args:
        rewards: Reward functions in TRL's convention; the first one decides success.
        scoring: Their weights, time-out, treatment of NaN, and the reward that counts as success.
        num_generations: G, completions per prompt, at least 2.
        sampling: How rollouts are drawn.
        sampler: Who draws them; default `NativeSampler`.
        advantage: How rewards become advantages: a scale of `group_advantages` (`std`, `population`, `batch`,
            `none` for Dr. GRPO, `rloo`, `maxrl`), or an `Advantage` such as `OPO` or `GDPO`. Over all ranks.
        policy_loss: The policy term; default `ClippedSurrogate`, clip 0.2 on both sides.
        kl: The KL term to a reference policy; none by default.
        objective: Which tokens count, and how much.
        resampling: Draw fresh prompts in place of dead groups; None uses each batch as it is.
        updates_per_rollout: Optimiser updates from each rollout; each uses all its live rows.
        max_tokens_per_microbatch: Token budget of one forward and backward pass. Does not change gradients.
        num_val_generations: k, completions per prompt in validation.
        val_sampling: How validation draws; default `sampling`.
        **kwargs: Arguments of `CausalLMModule`.
    """

    def __init__(
        self,
        rewards: list[RewardFunction],
        scoring: Scoring = Scoring(),  # noqa: B008  frozen
        num_generations: int = 2,
        sampling: Sampling = Sampling(),  # noqa: B008  frozen
        sampler: Sampler | None = None,
        advantage: Scale | Advantage = "population",
        policy_loss: PolicyLoss | None = None,
        kl: KL = KL(),  # noqa: B008  frozen
        objective: Objective = Objective(),  # noqa: B008  frozen
        resampling: Resampling | None = None,
        updates_per_rollout: int = 1,
        max_tokens_per_microbatch: int = 4096,
        num_val_generations: int = 1,
        val_sampling: Sampling | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.reward_functions = rewards
        self.scoring = scoring
        self.answer = scoring.answer
        self.num_generations = num_generations
        self.sampling = sampling
        self.sampler = sampler or NativeSampler()
        self.advantage = GroupAdvantage(advantage) if isinstance(advantage, str) else advantage
        self.policy_loss = policy_loss or ClippedSurrogate()
        self.kl = kl
        self.objective = objective
        self.resampling = resampling
        self.updates_per_rollout = updates_per_rollout
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.num_val_generations = num_val_generations
        self.val_sampling = val_sampling or sampling
        check_numbers("scoring.weights", scoring.weights, length=len(rewards), none=True)  # one for each
        check_settings(self, trains_base=kwargs.get("adapter") is None)
        self.watch = RewardWatch(
            PATIENCE,
            keeps_signs_only=isinstance(self.advantage, GroupAdvantage)
            and self.advantage.scale in ("std", "population"),
        )

    def configure_model(self) -> None:
        """Load the model, without dropout, and hand it to the sampler.

        Completions are drawn without dropout, so their log-probabilities must be taken without it: else the
        probability ratio of an unchanged policy is not 1.
        """
        super().configure_model()
        assert self.model is not None
        self.sampling_seed = torch.initial_seed()  # later it differs between ranks
        switch_dropout_off(self.model)
        self.bind_sampler(self.sampler)
        if self.kl.coef:
            self.kl.policy.start(self)

    def on_fit_start(self) -> None:
        """Write the hyper-parameters to the loggers and print the plan."""
        super().on_fit_start()
        warn_of_settings(self)
        if lightning_hasattr(self, "batch_size"):
            batch_size: Any = lightning_getattr(self, "batch_size")
            if self.resampling is not None:
                self.resampling.check(self.num_generations, batch_size * self.trainer.world_size)
            self.print(self.plan(batch_size))

    def on_validation_start(self) -> None:
        """Bring the sampler up to date here, where all ranks are: they may have different numbers of batches."""
        self.sampler.sync(self.global_step, self.adapter.save)
        super().on_validation_start()

    def plan(self, prompts_per_rank: int) -> Plan:
        """Say what one step does.

        Args:
            prompts_per_rank: The DataModule's batch size.
        """
        assert self.model is not None
        passes, _ = best_passes(self.model, tries=False)
        return Plan(
            prompts_per_rank=prompts_per_rank,
            world_size=self.trainer.world_size,
            group_size=self.num_generations,
            max_new_tokens=self.sampling.max_new_tokens,
            updates_per_rollout=self.updates_per_rollout,
            max_tokens_per_microbatch=self.max_tokens_per_microbatch,
            max_logits=passes.max_logits(self.max_tokens_per_microbatch, self.text_config.vocab_size),
            kv_bytes_per_token=kv_bytes_per_token(self.text_config, self.weights_dtype),
            resampling=self.resampling,
            **parameter_facts(self.model, self.trained_parameters()),
        )

    # ------------------------------------------------------------------ the four hooks

    def rollout(self, batch: TextBatch, num_generations: int, sampling: Sampling) -> Rollout:
        """Draw completions. Called in training and in validation.

        Args:
            batch: The prompts (B / num_generations).
            num_generations: Completions per prompt.
            sampling: How to draw.

        Returns:
            B rows, the completions of a prompt next to each other.
        """
        ids = self.encode_prompts(batch.prompts, room=sampling.max_new_tokens, uids=batch.uids)
        prompt_ids = [row for row in ids for _ in range(num_generations)]
        self.sampler.sync(self.global_step, self.adapter.save)
        with self.generating():
            completions = self.sampler.generate(
                prompt_ids,
                sampling,
                lambda rows: self.route(batch, [row // num_generations for row in rows]),
                seeds=self.draw_seeds(batch.uids, num_generations),
                groups=[row // num_generations for row in range(len(prompt_ids))],
            )
        return Rollout(
            batch=repeat_rows(batch, num_generations),
            prompt_ids=prompt_ids,
            completions=completions,
            group_size=num_generations,
        )

    def tokens_needed(self, batch: TextBatch, split: str) -> list[tuple[int, int]]:
        """Return the tokens of each row's prompt, and the most of its completions."""
        sampling = self.sampling if split == "train" else self.val_sampling
        return [(length, sampling.max_new_tokens) for length in self._lengths(batch)]

    def draw_seeds(self, uids: Sequence[int], num_generations: int) -> list[int]:
        """Seed each completion by run, draw, row and its number, so that ranks and batches do not matter.

        Validation draws the same numbers every time.

        Args:
            uids: Of the prompts (B / num_generations).
            num_generations: Completions per prompt.

        Returns:
            (B).
        """
        if not self.trainer.training:  # each row once over all ranks
            return row_seeds(self.sampling_seed, -1, uids, num_generations)
        before = [uid for part in gathered(list(uids))[: self.global_rank] for uid in part]
        return row_seeds(self.sampling_seed, self.draws, uids, num_generations, before)

    def score(self, rollout: Rollout) -> Scores:
        """Reward each completion.

        Args:
            rollout: B rows.

        Returns:
            Rewards per function (B, K), their weighted sum (B), and success (B).
        """
        by_function = score_completions(
            self.reward_functions,
            self.scoring,
            prompts=rollout.batch.prompts,
            completions=rollout.completions_for_rewards(),
            completion_ids=rollout.completions.token_ids,
            columns=rollout.batch.columns,
            trainer_state=SimpleNamespace(
                global_step=self.global_step, max_steps=self.trainer.max_steps, epoch=self.current_epoch
            ),
            log_extra=rollout.add_extra,
            log_metric=self._log_metric,
        )
        return Scores(
            by_function=by_function,
            total=weighted_total(by_function, self.scoring.weights),
            success=torch.where(
                by_function[:, 0].isnan(), torch.nan, (by_function[:, 0] >= self.scoring.success).float()
            ),
            names=reward_names(self.reward_functions),
        )

    def advantages(self, scores: Scores, rollout: Rollout) -> Tensor:
        """Compare the completions of each group; a collective, since some estimators look at all ranks' rows.

        Args:
            scores: Rewards of B rows.
            rollout: The rows.

        Returns:
            Advantage of each row (B). Groups of zeros are dead: they teach nothing.
        """
        parts = gathered((scores.total, scores.by_function, rollout.lengths))
        total, by_function, lengths = (torch.cat(kind) for kind in zip(*parts, strict=True))
        everyone = self.advantage(
            Rewards(total, by_function, self.scoring.weights, lengths, rollout.group_size)
        )
        first = sum(len(part[0]) for part in parts[: self.global_rank]) if len(parts) > 1 else 0
        return everyone[first : first + len(rollout)]

    def loss(self, tokens: Tokens) -> Tensor:
        """Loss of each token, before aggregation.

        Args:
            tokens: Log-probabilities, advantages and masks of b rows; `ref_logprobs` where the loss has a KL term.

        Returns:
            (b, T); what stands at masked positions does not count.
        """
        now, old = tokens.logprobs, tokens.old_logprobs
        loss_bT = self.policy_loss(now, old, tokens.advantages, tokens.mask)
        if self.objective.correction is not None:
            loss_bT = loss_bT * self.objective.correction(old, tokens.sampler_logprobs, tokens.mask)
        if self.objective.off_policy_threshold is not None:
            stale_b = off_policy_rows(
                now,
                tokens.sampler_logprobs,
                tokens.advantages,
                tokens.mask,
                threshold=self.objective.off_policy_threshold,
            )
            loss_bT = torch.where(stale_b[:, None], 0.0, loss_bT)
        if tokens.policy_mask is not None:
            loss_bT = torch.where(tokens.policy_mask.bool(), loss_bT, 0.0)
        if tokens.ref_logprobs is not None:
            ratio_of = old if self.kl.unbiased else None
            kl_bT = kl_estimate(now, tokens.ref_logprobs, self.kl.kind, old_logprobs_BT=ratio_of)
            loss_bT = loss_bT + self.kl.coef * kl_bT
        if self.objective.entropy_coef:
            loss_bT = loss_bT - self.objective.entropy_coef * tokens.entropy
        return loss_bT

    def _log_metric(self, name: str, value: float) -> None:
        """Let a reward function log a number of its own (TRL's `log_metric`), which replaces none of ours."""
        number = as_number(value)
        if number is None:
            raise ValueError(
                f"log_metric({name!r}) got {value!r:.60} of type {type(value).__name__}: give a number"
            )
        free = free_name(str(name))
        if free != name:
            rank_zero_warn(
                f"log_metric({name!r}) has the name of a metric of this run, so it is logged as {free!r}."
            )
        stage = "train" if self.trainer.training else "test" if self.trainer.testing else "val"
        self.log(f"{stage}/{free}", number, batch_size=1)
