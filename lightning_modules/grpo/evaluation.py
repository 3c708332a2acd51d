"""Numbers for evaluation: pass@k, maj@k, and their means over prompts, with intervals.

The unit is the prompt: completions of one prompt are not independent. Standard library only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from lightning_modules.grpo.intervals import Interval, mean_interval, paired_gain

__all__ = [
    "Interval",
    "PromptRecord",
    "majority_at_k",
    "mean_interval",
    "paired_gain",
    "pass_at_k",
    "success_at_k",
    "summarise",
]


class PromptRecord(NamedTuple):
    """What is kept of one prompt: its task, and one finite value for each metric that applies to it."""

    task: str
    values: dict[str, float]


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """Estimate without bias the probability that at least one of k completions is correct.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374, equation 1):
    1 - C(n - c, k) / C(n, k), as a product of n - k + 1 to n, which neither overflows nor cancels.

    Args:
        num_correct: c, correct completions of the prompt.
        num_samples: n, completions of the prompt.
        k: Size of the subsets, at most n.

    Returns:
        Probability, 0 to 1.

    Raises:
        ValueError: Unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.

    >>> pass_at_k(1, 4, 2)
    0.5
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct={num_correct} must lie between 0 and num_samples={num_samples}")
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"k={k} must lie between 1 and num_samples={num_samples}: sample more completions or lower k"
        )
    wrong = num_samples - num_correct
    if wrong < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(wrong + 1, num_samples + 1))


def majority_at_k(answers: Sequence[Hashable | None], success: Sequence[float]) -> float:
    """Return the success of the answer that most of a prompt's k completions give.

    Majority voting is the self-consistency of Wang et al. 2022, "Self-Consistency Improves Chain of Thought
    Reasoning in Language Models" (arXiv 2203.11171), with one vote for each completion. Among answers that tie
    the winner is drawn at random, and the expected value returned: the mean success over the tied answers,
    which is the mean over their completions, as each has as many.

    Args:
        answers: What each completion answered (k), compared by `==` and hash. None where no answer was found;
            it wins only where all are None.
        success: 1 for each correct completion, else 0 (k). Of completions with one answer the mean counts.

    Returns:
        0 to 1.

    Raises:
        ValueError: For no completions, different lengths, a success that is not finite, or an answer without
            a hash.

    >>> majority_at_k(["4", "5", "5", None, None, None], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    0.0
    >>> majority_at_k(["4", "5"], [1.0, 0.0])
    0.5
    """
    if len(answers) != len(success) or not answers:
        raise ValueError(
            f"answers has {len(answers)} values and success {len(success)}: give one each for every completion, "
            "and at least one"
        )
    for row, value in enumerate(success):
        if not math.isfinite(value):
            raise ValueError(
                f"success[{row}]={value} is not finite: leave out prompts to which no reward applies"
            )
    try:
        votes: Counter[Hashable] = Counter(answer for answer in answers if answer is not None)
    except TypeError as error:
        raise ValueError(
            f"answers={answers!r:.100} must be hashable, such as strings or numbers: {error}"
        ) from error
    most = max(votes.values(), default=0)
    # None has no votes: as many as the winner only where there are no votes at all.
    return fmean(value for answer, value in zip(answers, success, strict=True) if votes[answer] == most)


def success_at_k(success: Sequence[float], answers: Sequence[Hashable | None]) -> dict[str, float]:
    """Measure the k completions of one prompt.

    Args:
        success: 1 for each correct completion, else 0; NaN where the reward does not apply (k).
        answers: What each completion answered, None where no answer was found (k).

    Returns:
        `mean@k` over the completions to which the reward applies. If that is all of them and k > 1, also
        `pass@j` for the powers of two 1 < j < k, `pass@k`, and `maj@k`. Nothing where it applies to none.

    >>> success_at_k([1.0, 0.0, 0.0, 0.0], ["4", "5", "5", None])
    {'mean@4': 0.25, 'pass@2': 0.5, 'pass@4': 1.0, 'maj@4': 0.0}
    """
    k = len(success)
    applicable = [value for value in success if not math.isnan(value)]
    if not applicable:
        return {}
    values = {f"mean@{k}": fmean(applicable)}
    if k > 1 and len(applicable) == k:
        sizes = sorted({2**power for power in range(1, k.bit_length())} | {k})
        values |= {f"pass@{j}": pass_at_k(applicable.count(1), k, j) for j in sizes}
        values[f"maj@{k}"] = majority_at_k(answers, applicable)
    return values


def summarise(records: Iterable[PromptRecord], with_interval: Collection[str] = ()) -> dict[str, float]:
    """Average each metric over the prompts to which it applies: over all of them, and over each task's.

    Args:
        records: One for each prompt, in any order, which changes nothing.
        with_interval: Metrics that get their 95% interval (`mean_interval`).

    Returns:
        `<metric>`, and `<metric>/low` and `<metric>/high`; where there are several tasks also
        `<task>/<metric>` and so on. In the name of a task `_` stands for `/`.

    >>> summarise([PromptRecord("sums", {"reward": 1.0}), PromptRecord("a/b", {"reward": 2.0})])
    {'reward': 1.5, 'sums/reward': 1.0, 'a_b/reward': 2.0}
    """
    records = list(records)
    by_task: dict[str, list[PromptRecord]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    groups = {"": records}
    if len(by_task) > 1:
        groups |= {f"{label}/": by_task[task] for task, label in _labels(by_task).items()}
    summary: dict[str, float] = {}
    for prefix, members in groups.items():
        columns: dict[str, list[float]] = {}
        for record in members:
            for name, value in record.values.items():
                columns.setdefault(name, []).append(value)
        for name, column in columns.items():
            summary[prefix + name] = fmean(column)
            if name in with_interval:
                _, low, high = mean_interval(column)
                summary |= {f"{prefix}{name}/low": low, f"{prefix}{name}/high": high}
    return summary


def _labels(tasks: Iterable[str]) -> dict[str, str]:
    """Give each task a name of its own without a slash; names that have none stay as they are."""
    labels: dict[str, str] = {}
    for task in sorted(tasks, key=lambda task: ("/" in task, task)):
        label = task.replace("/", "_")
        while label in labels.values():
            label += "_"
        labels[task] = label
    return labels
