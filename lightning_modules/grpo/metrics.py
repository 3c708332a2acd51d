"""What a rollout and an update tell: the metrics under `train/`.

Shapes: B rows, b rows of a micro-batch, T completion tokens.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from lightning_modules.grpo.losses import kl_estimate
from lightning_modules.grpo.policy import Tokens
from lightning_modules.grpo.policy_losses import PolicyLoss
from lightning_modules.grpo.rollout import Rollout, Scores
from lightning_modules.metrics import Means

OWN_METRICS = frozenset(
    {
        "accuracy",
        "answer_tokens",
        "best_loss",
        "clip_high",
        "clip_low",
        "completion_length",
        "dead_easy",
        "dead_groups",
        "dead_hard",
        "entropy",
        "epoch",
        "grad_norm",
        "kl",
        "length_reward_correlation",
        "loss",
        "lr",
        "no_reward",
        "nonfinite_updates",
        "pass_rate_known",
        "reward",
        "sampler_gap",
        "skipped_steps",
        "step",
        "time",
        "tokens",
        "truncated",
    }
)
"""Names, up to the first slash, that modules and callbacks log under `train/`, reserved from reward functions."""

_EVALUATED = re.compile(r"(mean|pass|maj)@[0-9]+")

# Names of the means from which the correlation of length and reward is made; they are not logged.
_MOMENTS = ("_length", "_reward", "_length^2", "_reward^2", "_length*reward")


def add_rollout_means(means: Means, rollout: Rollout, scores: Scores, advantages_B: Tensor) -> None:
    """Add what a rollout tells before any update: rewards, success, dead groups, lengths.

    A group is dead when all its advantages are zero: easy where every completion succeeded, else hard.
    Groups without any reward are dead, but neither easy nor hard. `right` and `wrong` are the completions that
    succeeded and failed; for rows without success there is neither.
    """
    G = rollout.group_size
    success_QG = scores.success.view(-1, G)
    dead_Q = (advantages_B.view(-1, G) == 0).all(1)
    rewarded_Q = (~scores.total.view(-1, G).isnan()).any(1)
    easy_Q = ((success_QG == 1) | success_QG.isnan()).all(1) & (success_QG == 1).any(1)
    truncated_B, outcomes = (
        rollout.truncated.float(),
        {"right": scores.success == 1, "wrong": scores.success == 0},
    )
    means.add("reward", scores.total)
    for name, missing_B in no_reward(scores).items():
        means.add(name, missing_B)
    for name, rewards_B in zip(scores.names, scores.by_function.unbind(1), strict=True):
        means.add(f"reward/{name}", rewards_B)
        for outcome, rows_B in outcomes.items():
            means.add(f"reward/{name}/{outcome}", rewards_B, rows_B & ~rewards_B.isnan())
    means.add("accuracy", scores.success)
    means.add("dead_groups", dead_Q.float())
    means.add("dead_easy", (dead_Q & easy_Q).float())
    means.add("dead_hard", (dead_Q & rewarded_Q & ~easy_Q).float())
    means.add("completion_length", rollout.lengths.float())
    means.add("truncated", truncated_B)
    for outcome, rows_B in outcomes.items():
        means.add(f"truncated/{outcome}", truncated_B, rows_B)
    length_B = torch.where(scores.total.isnan(), torch.nan, rollout.lengths.float())
    moments = (length_B, scores.total, length_B**2, scores.total**2, length_B * scores.total)
    for name, values_B in zip(_MOMENTS, moments, strict=True):
        means.add(name, values_B)


def free_name(name: str) -> str:
    """Return the name under which a reward function's own metric is logged, apart from ours.

    >>> free_name("judged"), free_name("loss"), free_name("sums/pass@4")
    ('judged', 'log_metric/loss', 'log_metric/sums/pass@4')
    """
    parts = name.split("/")
    is_ours = OWN_METRICS.intersection(parts) or any(map(_EVALUATED.fullmatch, parts))
    return f"log_metric/{name}" if is_ours else name


def no_reward(scores: Scores) -> dict[str, Tensor]:
    """Mark the rows without a reward: from any function, and where there are several from each.

    Returns:
        1 where a row has none (B), by the name of the metric.
    """
    found = {"no_reward": scores.total.isnan().float()}
    if len(scores.names) > 1:
        for name, rewards_B in zip(scores.names, scores.by_function.unbind(1), strict=True):
            found[f"no_reward/{name}"] = rewards_B.isnan().float()
    return found


def with_correlation(values: dict[str, float]) -> dict[str, float]:
    """Turn the moments of length and reward into `length_reward_correlation`, over all rows of all ranks.

    Args:
        values: The means of a step.

    Returns:
        The metrics to log; the correlation is NaN where all lengths or all rewards are equal.
    """
    rest = {name: value for name, value in values.items() if name not in _MOMENTS}
    if _MOMENTS[0] not in values:
        return rest
    length, reward, length2, reward2, product = (values[name] for name in _MOMENTS)
    spread = max(length2 - length**2, 0.0) * max(reward2 - reward**2, 0.0)
    # Means of squares are float32: what is left of equal values is rounding.
    known = spread > 1e-10 * length2 * reward2
    correlation = (product - length * reward) / math.sqrt(spread) if known else math.nan
    return rest | {"length_reward_correlation": correlation}


def update_metric_names(*, kl: bool) -> list[str]:
    """Names of the metrics that only a step with an update has."""
    return ["entropy", "clip_low", "clip_high", "sampler_gap", "grad_norm", *(["kl"] if kl else [])]


def add_update_means(means: Means, tokens: Tokens, policy_loss: PolicyLoss) -> None:
    """Add entropy, clip shares, KL and what sampler and trainer differ by, each a mean over tokens.

    The latter over rows of this step: of those that waited, the old policy is known by the sampler's account alone.
    """
    logprobs_bT = tokens.logprobs.detach()
    low_bT, high_bT = policy_loss.clipped(logprobs_bT, tokens.old_logprobs, tokens.advantages, tokens.mask)
    means.add("entropy", tokens.entropy, tokens.mask)
    means.add("clip_low", low_bT.float(), tokens.mask)
    means.add("clip_high", high_bT.float(), tokens.mask)
    means.add("sampler_gap", (tokens.old_logprobs - tokens.sampler_logprobs).abs(), tokens.fresh_mask)
    if tokens.ref_logprobs is not None:
        means.add("kl", kl_estimate(logprobs_bT, tokens.ref_logprobs, "k3"), tokens.mask)
