"""GRPOModule: group relative policy optimisation as four hooks around pure functions.

Shapes: B rows = prompts x G, K reward functions, T completion tokens, b rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr
from torch import Tensor

from datamodules.batches import TextBatch
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.distributed import all_sum, gathered
from lightning_modules.grpo.advantages import group_advantages
from lightning_modules.grpo.evaluation import pass_at_k
from lightning_modules.grpo.losses import aggregate, clipped_surrogate, kl_estimate
from lightning_modules.grpo.metrics import add_rollout_means
from lightning_modules.grpo.plan import Plan, kv_bytes_per_token, parameter_facts
from lightning_modules.grpo.policy import (
    Tokens,
    add_update_means,
    forward_policy,
    switch_dropout_off,
    update_metric_names,
)
from lightning_modules.grpo.rewards import RewardFunction
from lightning_modules.grpo.rollout import (
    MicroBatch,
    Rollout,
    Scores,
    collate,
    masked,
    repeat_rows,
    row_seeds,
)
from lightning_modules.grpo.scoring import (
    Scoring,
    reward_names,
    score_completions,
    weighted_total,
)
from lightning_modules.metrics import Clock, Means
from lightning_modules.microbatches import plan_micro_batches
from lightning_modules.sampling import GenerateSampler, Sampler, Sampling
from lightning_modules.text import prediction_rows

# Steps without any signal after which the user is told.
_PATIENCE = 20


class GRPOModule(CausalLMModule):
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
    for one without any live group, which updates nothing.

    Args:
        rewards: Reward functions in TRL's convention; the first one decides success.
        scoring: Their weights, time-out, treatment of NaN, and the reward that counts as success.
        num_generations: G, completions per prompt, at least 2.
        sampling: How rollouts are drawn.
        sampler: Who draws them; default `GenerateSampler`.
        scale: Advantage scaling: `std`, `population`, `batch`, `none` (Dr.GRPO) or `rloo`.
        clip: Lower and upper clip range of the probability ratio.
        kl_coef: Weight of the k3 KL estimate to the base policy (the disabled adapter). 0 computes none.
        over: What the loss averages over: `tokens`, `sequences`, or a `constant` (rows x max_new_tokens).
            The denominator is always that of the whole optimiser step over all ranks.
        updates_per_rollout: Optimiser updates from each rollout; each uses all its live rows.
        max_tokens_per_microbatch: Token budget of one forward and backward pass. Does not change gradients.
        dead_groups: Whether groups without any advantage stay in the denominator (`keep`, as in TRL and
            verl) or leave the objective (`renormalize`). They reach no forward pass, except for the KL term
            of `keep`.
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
        scale: Literal["std", "population", "batch", "none", "rloo"] = "population",
        clip: tuple[float, float] = (0.2, 0.2),
        kl_coef: float = 0.0,
        over: Literal["tokens", "sequences", "constant"] = "tokens",
        updates_per_rollout: int = 1,
        max_tokens_per_microbatch: int = 4096,
        dead_groups: Literal["keep", "renormalize"] = "keep",
        num_val_generations: int = 1,
        val_sampling: Sampling | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        if num_generations < 2:
            raise ValueError(
                f"num_generations={num_generations}: a completion is compared with the others of its group, "
                "so a group of one teaches nothing. Set num_generations: 2 or more."
            )
        if sampling.temperature == 0:
            raise ValueError(
                "sampling.temperature=0: greedy completions of a group are all equal, so there is nothing to "
                "compare. Set a positive temperature; val_sampling may be greedy."
            )
        for name, value in {
            "updates_per_rollout": updates_per_rollout,
            "max_tokens_per_microbatch": max_tokens_per_microbatch,
            "num_val_generations": num_val_generations,
        }.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1.")
        if kl_coef and kwargs.get("adapter") is None:
            raise ValueError(
                f"kl_coef={kl_coef} with adapter=None: full fine-tuning leaves no base policy to compare "
                "with. Set kl_coef: 0, or train an adapter such as peft.LoraConfig."
            )
        self.reward_functions = rewards
        self.scoring = scoring
        self.num_generations = num_generations
        self.sampling = sampling
        self.sampler = sampler or GenerateSampler()
        self.scale: Literal["std", "population", "batch", "none", "rloo"] = scale
        self.clip = clip
        self.kl_coef = kl_coef
        self.over: Literal["tokens", "sequences", "constant"] = over
        self.updates_per_rollout = updates_per_rollout
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.dead_groups = dead_groups
        self.num_val_generations = num_val_generations
        self.val_sampling = val_sampling or sampling
        self.num_tokens = 0
        self.skipped_steps = 0
        self.sampling_seed: int = 0
        self._skipped_in_a_row = 0

    def configure_model(self) -> None:
        """Load the model, without dropout, and hand it to the sampler.

        Completions are drawn without dropout, so their log-probabilities must be taken without it: else the
        probability ratio of an unchanged policy is not 1.
        """
        super().configure_model()
        assert self.model is not None
        self.sampling_seed = torch.initial_seed()  # later it differs between ranks
        switch_dropout_off(self.model)
        self.sampler.bind(self.model, self.tokenizer)

    def on_fit_start(self) -> None:
        """Write the hyper-parameters to the loggers and print the plan."""
        super().on_fit_start()
        if self.sampling.top_p < 1 or self.sampling.top_k or self.sampling.min_p:
            rank_zero_warn(
                "sampling cuts off unlikely tokens (top_p, top_k or min_p), but training takes "
                "log-probabilities of the whole distribution: a biased gradient. Set top_p: 1, top_k: 0 "
                "and min_p: 0."
            )
        if lightning_hasattr(self, "batch_size"):
            batch_size: Any = lightning_getattr(self, "batch_size")
            self.print(self.plan(batch_size))

    def plan(self, prompts_per_rank: int) -> Plan:
        """Say what one step does.

        Args:
            prompts_per_rank: The DataModule's batch size.
        """
        assert self.model is not None
        return Plan(
            prompts_per_rank=prompts_per_rank,
            world_size=self.trainer.world_size,
            group_size=self.num_generations,
            max_new_tokens=self.sampling.max_new_tokens,
            updates_per_rollout=self.updates_per_rollout,
            max_tokens_per_microbatch=self.max_tokens_per_microbatch,
            vocab_size=self.text_config.vocab_size,
            kv_bytes_per_token=kv_bytes_per_token(self.text_config, self.weights_dtype),
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
        with self.generating():
            completions = self.sampler.generate(
                prompt_ids,
                sampling,
                lambda rows: self.route(batch, [row // num_generations for row in rows]),
                seeds=self.draw_seeds(batch.uids, num_generations),
            )
        return Rollout(
            batch=repeat_rows(batch, num_generations),
            prompt_ids=prompt_ids,
            completions=completions,
            group_size=num_generations,
        )

    def draw_seeds(self, uids: Sequence[int], num_generations: int) -> list[int]:
        """Seed each completion by the run, the step, its row and its number, so that ranks and batches do not matter.

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
        return row_seeds(self.sampling_seed, self.global_step, uids, num_generations, before)

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
        """Compare the completions of each group.

        Args:
            scores: Rewards of B rows.
            rollout: The rows.

        Returns:
            Advantage of each row (B). Groups of zeros are dead: they teach nothing.
        """
        return group_advantages(scores.total, rollout.group_size, scale=self.scale)

    def loss(self, tokens: Tokens) -> Tensor:
        """Loss of each token, before aggregation.

        Args:
            tokens: Log-probabilities, advantages and mask of b rows; `ref_logprobs` where `kl_coef` is set.

        Returns:
            (b, T); what stands at masked positions does not count.
        """
        loss_BT = clipped_surrogate(
            tokens.logprobs, tokens.old_logprobs, tokens.advantages, tokens.mask, clip=self.clip
        )
        if tokens.ref_logprobs is not None:
            loss_BT = loss_BT + self.kl_coef * kl_estimate(tokens.logprobs, tokens.ref_logprobs, "k3")
        return loss_BT

    # ------------------------------------------------------------------ training

    def training_step(self, batch: TextBatch, batch_idx: int) -> Mapping[str, Any]:
        """One rollout and its updates.

        Returns:
            `rollout`, `scores` and `advantages`, for callbacks.
        """
        clock, means = Clock(), Means()
        with clock("generate"):
            rollout = self.rollout(batch, self.num_generations, self.sampling)
        with clock("score"):
            scores = self.score(rollout)
        advantages_B = self.advantages(scores, rollout)
        if advantages_B.shape != (len(rollout),) or not advantages_B.isfinite().all():
            raise ValueError(
                f"{type(self).__name__}.advantages must return one finite number for each of the "
                f"{len(rollout)} rows, got {advantages_B}."
            )
        add_rollout_means(means, rollout, scores, advantages_B)
        with clock("update"):
            self._update(rollout, advantages_B, means)
        self._log_step(rollout, means, clock)
        return {"rollout": rollout, "scores": scores, "advantages": advantages_B}

    def _update(self, rollout: Rollout, advantages_B: Tensor, means: Means) -> None:
        """Update the policy from the rows that carry a gradient; the same number of times on every rank."""
        strategy = self.trainer.strategy
        for name in update_metric_names(kl=self.kl_coef > 0):
            means.add(name, torch.empty(0))  # a step without update logs NaN, not the value of the last one
        live_B = advantages_B != 0
        lengths_B = rollout.lengths
        live_group_B = live_B.view(-1, rollout.group_size).any(1).repeat_interleave(rollout.group_size)
        counted_B = live_group_B if self.dead_groups == "renormalize" else torch.ones_like(live_B)
        # A KL term gives dead rows a gradient, as long as they belong to the objective.
        computed_B = counted_B if self.kl_coef else live_B
        tokens, sequences, computed = all_sum(
            strategy, torch.stack([lengths_B[counted_B].sum(), counted_B.sum(), computed_B.sum()])
        ).tolist()
        if computed == 0:
            self._skip_step()
            return
        self._skipped_in_a_row = 0
        denominator = {
            "tokens": tokens,
            "sequences": sequences,
            "constant": sequences * self.sampling.max_new_tokens,
        }[self.over]

        rows = computed_B.nonzero()[:, 0].tolist()
        sizes = [len(rollout.prompt_ids[row]) + int(lengths_B[row]) for row in rows]
        groups = [
            [rows[i] for i in group] for group in plan_micro_batches(sizes, self.max_tokens_per_microbatch)
        ]
        put = partial(collate, rollout, advantages_B, pad_token_id=self.pad_token_id, device=self.device)
        # A rank without rows of its own joins the exchange of gradients with a masked row.
        micro_batches = [put(group) for group in groups] or [masked(put([0]))]
        micro_batches = self.in_step(micro_batches, lambda: masked(put([0])))
        # Ranks add their gradients up as a mean, hence the world size.
        share = denominator / self.trainer.world_size
        for _ in range(self.updates_per_rollout):
            norm = self.update(
                [partial(self._share_of_loss, rollout, rows, share, means) for rows in micro_batches]
            )
            means.add("grad_norm", norm)

    def _skip_step(self) -> None:
        """Count a step that leaves weights and optimiser alone, on every rank."""
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        for _ in range(self.updates_per_rollout):
            self.count_step_without_update()
        if self._skipped_in_a_row == _PATIENCE:
            rank_zero_warn(
                f"{_PATIENCE} steps in a row had no group whose completions differ in reward, so nothing was "
                "learned. Look at the rollouts: is the task far too hard or easy, or the reward constant?"
            )

    def _share_of_loss(self, rollout: Rollout, rows: MicroBatch, denominator: float, means: Means) -> Tensor:
        self.route(rollout.batch, rows.rows)
        reference = self.adapter.disabled() if self.kl_coef else None
        tokens = forward_policy(self, rows, temperature=self.sampling.temperature, reference=reference)
        add_update_means(means, tokens, self.clip)
        return aggregate(self.loss(tokens), tokens.mask, over=self.over, denominator=denominator)

    def _log_step(self, rollout: Rollout, means: Means, clock: Clock) -> None:
        generated = all_sum(self.trainer.strategy, rollout.lengths.sum())
        self.num_tokens += int(generated.item())
        values = means.reduce(self.trainer.strategy)
        values |= {f"time/{phase}": seconds for phase, seconds in clock.seconds.items()}
        values |= {"tokens": float(self.num_tokens), "skipped_steps": float(self.skipped_steps)}
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=1)
        # Logged a second time without the prefix only for the progress bar.
        self.log("reward", values["reward"], prog_bar=True, logger=False, batch_size=1)

    def _log_metric(self, name: str, value: float) -> None:
        """Let a reward function log a number of its own (TRL's `log_metric`)."""
        self.log(f"{'train' if self.trainer.training else 'val'}/{name}", value, batch_size=1)

    def counters(self) -> Mapping[str, int]:
        """Return the running counts."""
        return {
            **super().counters(),
            "num_tokens": self.num_tokens,
            "skipped_steps": self.skipped_steps,
            "sampling_seed": self.sampling_seed,
        }

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Continue the running counts."""
        super().load_counters(counters)
        self.num_tokens = counters.get("num_tokens", 0)
        self.skipped_steps = counters.get("skipped_steps", 0)
        self.sampling_seed = counters.get("sampling_seed", self.sampling_seed)

    # ------------------------------------------------------------------ evaluation

    def evaluation_metrics(self) -> Sequence[str]:
        """Name the metrics of validation."""
        k = self.num_val_generations
        pass_at = [f"pass@{k}"] if k > 1 else []
        return ("reward", f"mean@{k}", *pass_at, "completion_length", "truncated")

    def validation_step(self, batch: TextBatch, batch_idx: int) -> Mapping[str, Any]:
        """Measure `mean@k` and the unbiased `pass@k` of success.

        Returns:
            `rollout`, `scores`, and `success` per prompt and completion, 0 or 1, NaN where the first reward
            function does not apply (B / k, k).
        """
        k = self.num_val_generations
        rollout = self.rollout(batch, k, self.val_sampling)
        scores = self.score(rollout)
        success_Qk = scores.success.view(-1, k)
        means = self.evaluation_means
        means.add("reward", scores.total)
        means.add(f"mean@{k}", success_Qk)
        means.add("completion_length", rollout.lengths.float())
        means.add("truncated", rollout.truncated.float())
        if k > 1:
            applicable_Qk = success_Qk[~success_Qk.isnan().any(1)]
            passed = [pass_at_k(int(correct), k, k) for correct in applicable_Qk.sum(1).tolist()]
            means.add(f"pass@{k}", torch.tensor(passed))
        return {"rollout": rollout, "scores": scores, "success": success_Qk}

    def predict_step(self, batch: TextBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return `uid`, `prompt` and one `completion` per row."""
        return prediction_rows(batch, self.rollout(batch, 1, self.val_sampling).completions.texts)
