"""MissingRewards: says when no reward function applies, so that a run without rewards does not look like one with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from lightning.pytorch.utilities import rank_zero_warn

_REMEDY = (
    "It returned None (or NaN, with scoring.nan='ignore') for each. Look at the gold answers in the data: does it read "
    "the right column, and can it parse what is there?"
)


class MissingRewards:
    """Counts the completions to which reward functions apply, over all ranks; each rank counts alike."""

    def __init__(self) -> None:
        self._completions: Counter[str] = Counter()
        self._applied: Counter[tuple[str, str]] = Counter()
        self._names: dict[str, Sequence[str]] = {}
        self._in_a_row = 0

    def observe(self, names: Sequence[str], applied: Sequence[int], completions: int, patience: int) -> None:
        """Take the rewards of a training step.

        Args:
            names: Of the reward functions (K).
            applied: Completions to which each applies (K).
            completions: Of the step.
            patience: Steps in a row without any reward after which training stops.

        Raises:
            ValueError: If that many had none.
        """
        is_first = not self._completions["train"]
        self._add("train", names, applied, completions)
        if is_first:
            self._warn("train", f"{completions} completions of the first step")
        self._in_a_row = 0 if any(applied) else self._in_a_row + 1
        if self._in_a_row == patience:
            raise ValueError(
                f"No completion of {patience} steps in a row had a reward from {_listed(names)}, so there is "
                f"nothing to learn from. {_REMEDY} scoring.patience sets after how many steps training stops."
            )

    def evaluated(self, stage: str, no_reward: Mapping[str, float], prompts: int) -> None:
        """Take what an evaluation found.

        Args:
            stage: `val` or `test`.
            no_reward: By reward function, the share of completions to which it does not apply.
            prompts: How many.
        """
        is_first = not self._completions[stage]
        applied = [int(share < 1) for share in no_reward.values()]
        self._add(stage, list(no_reward), applied, prompts)
        if is_first and prompts:
            self._warn(
                stage, f"completions of {prompts} prompts in {'testing' if stage == 'test' else 'validation'}"
            )

    def summary(self) -> str:
        """Repeat what never applied, a line for each stage; empty where everything did."""
        lines = []
        for stage, names in self._names.items():
            never = [name for name in names if not self._applied[stage, name]]
            if never and self._completions[stage]:
                where = {"train": "training", "val": "validation"}.get(stage, "testing")
                lines.append(f"No completion in {where} had a reward from {_listed(never)}.")
                if stage == "train" and len(never) == len(names):
                    lines.append("Nothing was learned from rewards.")
        return "\n".join(lines)

    def _add(self, stage: str, names: Sequence[str], applied: Sequence[int], completions: int) -> None:
        self._names[stage] = names
        self._completions[stage] += completions
        for name, count in zip(names, applied, strict=True):
            self._applied[stage, name] += count

    def _warn(self, stage: str, where: str) -> None:
        never = [name for name in self._names[stage] if not self._applied[stage, name]]
        if never:
            rank_zero_warn(f"None of the {where} has a reward from {_listed(never)}. {_REMEDY}")


def _listed(names: Sequence[str]) -> str:
    return f"reward function{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
