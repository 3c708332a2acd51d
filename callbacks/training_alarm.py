"""Warns, or stops the run, when GRPO goes wrong: KL, entropy, clipping, or length without success."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.grpo.module import GRPOModule
from lightning_modules.ranges import check_number, check_whole

_METRICS = ("kl", "entropy", "clip_low", "clip_high", "completion_length", "reward", "accuracy")


class TrainingAlarm(lightning.Callback):
    """Warns or stops when training goes wrong, from averages of what GRPOModule logs.

    Each average covers the last `window` steps that measured the metric; steps without an update measure no KL,
    entropy or clipping. It sounds only where at least two of these steps are beyond the bound themselves, so
    that one step never does, however far off. A cause is reported once, and again after it has recovered.

    Length is an alarm only where it buys nothing: long answers may be how a model learns to reason. It sounds
    where completions of the last `window` steps are on average more than `max_length_growth` times as long as
    those of the first ones, while `train/accuracy` (success by the first reward function) did not rise. Where
    success says nothing, because all or none of the completions had it in both windows, `train/reward`
    decides. So a reward that pays for length is found also where it rises with the length, if the first reward
    function measures what the run is for. A correlation of reward and length over steps would not tell the two
    apart: whatever improves steadily is correlated. To rise is to rise by two standard errors of the difference
    of the two averages, and the two windows never overlap.

    A stop lets Lightning finish: it validates, and callbacks write their files. `min_steps` and `min_epochs`
    delay it. A resumed run stops again while the cause lasts.

    Args:
        max_kl: Largest `train/kl`, nats per token. Needs `kl.coef`.
        min_entropy: Smallest `train/entropy`, nats per token; a policy that collapses goes to 0.
        max_clip: Largest share of clipped tokens, `train/clip_low` plus `train/clip_high`. Needs
            `updates_per_rollout` of 2 or more, or resampling.
        max_length_growth: Largest `train/completion_length` relative to that of the first steps, above 1.
        window: Steps of an average, at least 2.
        stop: Stop the run; otherwise only warn.

    Raises:
        ValueError: If no bound is set, or one that every run or none would exceed.
    """

    def __init__(
        self,
        max_kl: float | None = None,
        min_entropy: float | None = None,
        max_clip: float | None = None,
        max_length_growth: float | None = None,
        window: int = 10,
        stop: bool = False,
    ) -> None:
        bounds: dict[str, tuple[float | None, float, float | None]] = {
            "max_kl": (max_kl, 0, None),
            "min_entropy": (min_entropy, 0, None),
            "max_clip": (max_clip, 0, 1),
            "max_length_growth": (max_length_growth, 1, None),
        }
        for name, (value, low, high) in bounds.items():
            check_number(name, value, above=low, below=high, none=True, hint="null watches something else.")
        if all(value is None for value, _, _ in bounds.values()):
            raise ValueError(f"TrainingAlarm watches nothing. Set {', '.join(bounds)}, or leave it out.")
        check_whole("window", window, least=2, hint="One step is noise.")
        self.max_kl = max_kl
        self.min_entropy = min_entropy
        self.max_clip = max_clip
        self.max_length_growth = max_length_growth
        self.window = window
        self.stop = stop
        self._history = {name: History(window) for name in (*_METRICS, "clip")}
        self._reported: set[str] = set()
        self._updates = 0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Check that the module measures what is watched.

        Raises:
            ValueError: If it does not.
        """
        if not isinstance(pl_module, GRPOModule):
            raise ValueError(
                f"TrainingAlarm watches the metrics of a GRPOModule; {type(pl_module).__name__} has others. "
                "Leave it out."
            )
        if self.max_kl is not None and not pl_module.kl.coef:
            raise ValueError(
                f"TrainingAlarm, max_kl={self.max_kl}: with kl.coef=0 the run computes no KL. Set the model's "
                "kl.coef, to 0.001 say, or leave max_kl out."
            )
        once = pl_module.updates_per_rollout == 1 and pl_module.resampling is None
        if self.max_clip is not None and once:
            raise ValueError(
                f"TrainingAlarm, max_clip={self.max_clip}: with updates_per_rollout=1 no token is ever "
                "clipped, because the update starts from the policy that sampled. Set the model's "
                "updates_per_rollout to 2 or more, or leave max_clip out."
            )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Count updates from here."""
        self._updates = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any
    ) -> None:
        """Take the step's metrics, which are alike on all ranks, and report what is beyond its bound."""
        if trainer.global_step == self._updates:  # with resampling a batch may only draw, and logs nothing
            return
        self._updates = trainer.global_step
        metrics = trainer.callback_metrics
        found = self.observe({name: float(metrics.get(f"train/{name}", math.nan)) for name in _METRICS})
        step = trainer.fit_loop.total_batch_idx + 1
        for cause, message in found.items():
            if cause not in self._reported:
                action = " Training stops here." if self.stop else ""
                rank_zero_warn(f"Step {step}: {message}{action}")
        self._reported = set(found)
        if found and self.stop:
            trainer.should_stop = True

    def observe(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Take the metrics of a step, and say what is beyond its bound now.

        Args:
            metrics: Without `train/`. Those that are NaN or absent do not count.

        Returns:
            A message with value, bound and remedy for each cause, by the name of the argument that bounds it.
        """
        history = self._history
        for name in _METRICS:
            history[name].add(metrics.get(name, math.nan))
        history["clip"].add(metrics.get("clip_low", math.nan) + metrics.get("clip_high", math.nan))
        found = {}
        if self.max_kl is not None and history["kl"].is_above(self.max_kl):
            found["max_kl"] = (
                f"{self._average('train/kl', history['kl'])}, above max_kl={self.max_kl:g}: the policy has "
                "moved far from the base model. Try a smaller learning rate or a larger kl.coef."
            )
        if self.min_entropy is not None and history["entropy"].is_below(self.min_entropy):
            found["min_entropy"] = (
                f"{self._average('train/entropy', history['entropy'])}, below min_entropy="
                f"{self.min_entropy:g}: completions become alike, so groups teach nothing. Try a smaller "
                "learning rate, a larger upper clip such as [0.2, 0.28], or a KL term."
            )
        if self.max_clip is not None and history["clip"].is_above(self.max_clip):
            found["max_clip"] = (
                f"{self._average('train/clip_low + train/clip_high', history['clip'])}, above max_clip="
                f"{self.max_clip:g}: updates go beyond what the rollouts support. Try a smaller learning rate "
                "or fewer updates_per_rollout."
            )
        if self.max_length_growth is not None and self._is_idle_growth(self.max_length_growth):
            length, accuracy, reward = (history[x] for x in ("completion_length", "accuracy", "reward"))
            found["max_length_growth"] = (
                f"{self._average('train/completion_length', length)}, more than max_length_growth="
                f"{self.max_length_growth:g} times that of the first steps, {length.first_mean:.4g}; meanwhile "
                f"train/accuracy went from {accuracy.first_mean:.3g} to {accuracy.mean:.3g} and train/reward "
                f"from {reward.first_mean:.3g} to {reward.mean:.3g}. Look at the longest completions (quiver "
                "rollouts FILE --sort tokens). Try objective.over: constant, a smaller max_new_tokens, or a reward "
                "that does not pay for length."
            )
        return found

    def _average(self, name: str, history: History) -> str:
        return f"{name} is {history.mean:.4g} on average over {self.window} steps"

    def _is_idle_growth(self, growth: float) -> bool:
        """Whether completions grew and nothing came of it."""
        length, accuracy, reward = (self._history[x] for x in ("completion_length", "accuracy", "reward"))
        if not (length.is_apart and length.is_above(growth * length.first_mean)):
            return False
        says_something = accuracy.is_apart and {*accuracy.first, *accuracy.last} not in ({0.0}, {1.0})
        return not (accuracy if says_something else reward).has_risen

    def state_dict(self) -> dict[str, Any]:
        """Keep the averages for a resumed run."""
        return {
            "history": {name: one.state() for name, one in self._history.items()},
            "reported": sorted(self._reported),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the averages. What stopped the run is reported again."""
        for name, state in state_dict["history"].items():
            self._history[name].load(state)
        self._reported = set() if self.stop else set(state_dict["reported"])


class History:
    """The first and the last values of a metric.

    Args:
        window: How many of each.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.count = 0
        self.first: list[float] = []
        self.last: list[float] = []

    def add(self, value: float) -> None:
        """Take the value of a step; NaN is none."""
        if math.isnan(value):
            return
        if self.count == len(self.first) < self.window:
            self.first.append(value)
        self.last = [*self.last, value][-self.window :]
        self.count += 1

    @property
    def mean(self) -> float:
        """Of the last values; NaN without any."""
        return _mean(self.last)

    @property
    def first_mean(self) -> float:
        """Of the first values; NaN without any."""
        return _mean(self.first)

    @property
    def is_apart(self) -> bool:
        """Whether first and last values are two full windows without a common step."""
        return self.count >= len(self.first) + self.window

    @property
    def has_risen(self) -> bool:
        """Whether the mean rose by more than two standard errors of the difference of the two means.

        >>> history = History(2)
        >>> for value in (1.0, 1.2, 1.9, 2.1):
        ...     history.add(value)
        >>> history.has_risen
        True
        """
        if not self.is_apart:
            return False
        error = math.sqrt(_squared_error(self.first) + _squared_error(self.last))
        return self.mean - self.first_mean > 2 * error

    def is_above(self, bound: float) -> bool:
        """Whether a full window has its mean, and at least two of its values, above `bound`."""
        beyond = sum(value > bound for value in self.last)
        return len(self.last) == self.window and self.mean > bound and beyond >= 2

    def is_below(self, bound: float) -> bool:
        """Whether a full window has its mean, and at least two of its values, below `bound`."""
        beyond = sum(value < bound for value in self.last)
        return len(self.last) == self.window and self.mean < bound and beyond >= 2

    def state(self) -> dict[str, Any]:
        """Return all that `load` needs."""
        return {"count": self.count, "first": self.first, "last": self.last}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`, also one of another window."""
        self.count = state["count"]
        self.first, self.last = list(state["first"])[: self.window], list(state["last"])[-self.window :]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _squared_error(values: list[float]) -> float:
    """Squared standard error of a mean."""
    mean = _mean(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)
