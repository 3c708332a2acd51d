"""RolloutEvaluation: how often the policy's completions succeed, over all rows and for each task.

Shapes: B rows = prompts x k, the k completions of a prompt in neighbouring rows; Q prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from datamodules.batches import TextBatch
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.distributed import gathered
from lightning_modules.grpo.evaluation import PromptRecord, success_at_k, summarise
from lightning_modules.grpo.metrics import no_reward
from lightning_modules.grpo.missing_rewards import MissingRewards
from lightning_modules.grpo.rewards import RewardFunction
from lightning_modules.grpo.rollout import Rollout, Scores
from lightning_modules.grpo.scoring import reward_names
from lightning_modules.sampling import Sampling
from lightning_modules.text import prediction_rows


@runtime_checkable
class AnswerOf(Protocol):
    """A reward that says what a completion answers, so that equal answers can be counted."""

    def answer_of(self, text: str) -> Hashable | None:
        """Return the answer in a form in which equal answers are equal; None where there is none."""


class RolloutEvaluation(CausalLMModule):
    """Validates and tests by completions: a subclass draws and scores them.

    Logs under `val/` or `test/`, with k = `num_val_generations`: `reward`, `no_reward` (share of completions without
    one; where there are several reward functions also for each), `completion_length` (tokens),
    `truncated` (share that the length limit ended), `mean@k` (share of successes), and for k > 1 the unbiased
    `pass@j` for the powers of two 1 < j < k, `pass@k`, and `maj@k`, the success of the most frequent answer.
    `mean@k`, `pass@k` and `maj@k` have a 95% interval, `<metric>/low` to `<metric>/high`.

    Each is a mean over prompts. Where a reward applies to some completions of a prompt only, `reward` and
    `mean@k` take these, and `pass@j` and `maj@k` leave the prompt out. Prompts of several tasks are measured
    for each task too: `val/<task>/<metric>`. A row that comes twice, as samplers do to fill up a batch, counts
    once, so the numbers are the same on any number of ranks. What applies to no row is not logged.

    Attributes:
        num_val_generations: k, completions per prompt.
        val_sampling: How they are drawn.
        reward_functions: The first one decides success.
        answer: Finds the answer of a completion, by which `maj@k` counts; None where there is none. By default
            the first reward function's `answer_of`, and without such a method the text without white space
            around it.
        missing: Counts the completions that no reward function judged.
    """

    num_val_generations: int
    val_sampling: Sampling
    reward_functions: Sequence[RewardFunction]
    answer: Callable[[str], Hashable | None] | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.missing = MissingRewards()

    def rollout(self, batch: TextBatch, num_generations: int, sampling: Sampling) -> Rollout:
        """Draw completions, those of a prompt next to each other. A subclass defines this."""
        raise NotImplementedError(
            f"{type(self).__name__} must define rollout(batch, num_generations, sampling)"
        )

    def score(self, rollout: Rollout) -> Scores:
        """Reward each completion. A subclass defines this."""
        raise NotImplementedError(f"{type(self).__name__} must define score(rollout)")

    def on_validation_epoch_start(self) -> None:
        """Start the epoch's records."""
        super().on_validation_epoch_start()
        self._records: dict[int, PromptRecord] = {}

    def validation_step(self, batch: TextBatch, batch_idx: int) -> Mapping[str, Any]:
        """Measure the completions of a batch.

        Returns:
            `rollout`, `scores`, and `success` per prompt and completion, 0 or 1, NaN where the first reward
            function does not apply (Q, k).
        """
        k = self.num_val_generations
        rollout = self.rollout(batch, k, self.val_sampling)
        scores = self.score(rollout)
        self._record(rollout, scores)
        return {"rollout": rollout, "scores": scores, "success": scores.success.view(-1, k)}

    def _record(self, rollout: Rollout, scores: Scores) -> None:
        """Keep a few numbers of each prompt, and none of its texts."""
        k = rollout.group_size
        answer_of = self._answer_of()
        columns_Q = {
            **{name: missing_B.view(-1, k).mean(1).tolist() for name, missing_B in no_reward(scores).items()},
            "reward": scores.total.float().view(-1, k).nanmean(1).tolist(),
            "completion_length": rollout.lengths.float().view(-1, k).mean(1).tolist(),
            "truncated": rollout.truncated.float().view(-1, k).mean(1).tolist(),
        }
        success_Qk = scores.success.view(-1, k).tolist()
        for q, success_k in enumerate(success_Qk):
            rows = slice(q * k, (q + 1) * k)
            # One completion has nobody to vote with.
            answers_k = [answer_of(text) if k > 1 else None for text in rollout.completions.texts[rows]]
            values = {name: column[q] for name, column in columns_Q.items() if not math.isnan(column[q])}
            record = PromptRecord(rollout.batch.tasks[q * k], values | success_at_k(success_k, answers_k))
            self._records.setdefault(rollout.batch.uids[q * k], record)

    def _answer_of(self) -> Callable[[str], Hashable | None]:
        if self.answer is not None:
            return self.answer
        first = next(iter(self.reward_functions), None)
        return first.answer_of if isinstance(first, AnswerOf) else lambda text: text.strip() or None

    def on_validation_epoch_end(self) -> None:
        """Log the means over all prompts of all ranks, and those that a subclass adds to `evaluation_means`."""
        if self.evaluation_metrics():
            super().on_validation_epoch_end()
        records: dict[int, PromptRecord] = {}
        # Of a row that several ranks have, that of the first one counts.
        for part in reversed(gathered(self._records)):
            records |= part
        self._records = {}
        stage = "test" if self.trainer.testing else "val"
        k = self.num_val_generations
        summary = summarise(records.values(), with_interval=(f"mean@{k}", f"pass@{k}", f"maj@{k}"))
        for name, value in summary.items():
            self.log(f"{stage}/{name}", value)
        shares = {
            name.removeprefix("no_reward/"): share
            for name, share in summary.items()
            if name.startswith("no_reward/")
        } or {name: summary.get("no_reward", 1.0) for name in reward_names(self.reward_functions)}
        self.missing.evaluated(stage, shares, len(records))

    def predict_step(self, batch: TextBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return `uid`, `prompt` and one `completion` per row."""
        return prediction_rows(batch, self.rollout(batch, 1, self.val_sampling).completions.texts)
