"""Procedurally generated tasks of the package `reasoning_gym` (Stojanovski et al., arXiv 2505.24760)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from datamodules.base import Split, TextDataModule
from datamodules.rows import Rows
from datamodules.splits import check_sizes, permutation, quotas, stable_hash
from lightning_modules.ranges import check_numbers

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset


class ReasoningGymDataModule(TextDataModule):
    """Questions of one or more task families, generated when they are read.

    Validation and test questions are drawn first and are all distinct; a training question that equals one
    of them is replaced by another one, so no held-out text occurs in training. Training questions of a small
    family may repeat.

    Columns: `question`, `answer` ("" where a family has no single gold answer), `task` (the family),
    `metadata`, `entry` (the family's own dict) and `options` (the family's difficulty options). A reward is
    `reasoning_gym.create_dataset(task, **options).score_answer(answer, entry)`; the shorter
    `get_score_answer_fn(task)(answer, entry)` scores by the family's default options, which a few families
    (decimal_arithmetic, puzzle24, ...) read. `entry` must not pass through JSON: some compare tuples.

    Args:
        tasks: Family names, or a mapping from family name to its difficulty options, such as
            `{"chain_sum": {"min_terms": 2, "max_terms": 3}}`.
        weights: Share of each family, in the order of `tasks`; None means equal shares.
        train_size: Number of training rows.
        val_size: Number of validation rows.
        test_size: Number of test rows.
        **kwargs: Arguments of `TextDataModule`: template, system prompt, batch sizes, seed.

    Raises:
        ValueError: No task, or not one positive weight per task.
    """

    def __init__(
        self,
        tasks: dict[str, dict[str, Any]] | list[str],
        weights: list[float] | None = None,
        train_size: int = 1000,
        val_size: int = 100,
        test_size: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(prompt_column="question", answer_column="answer", task_column="task", **kwargs)
        self.tasks: dict[str, dict[str, Any]] = (
            dict(tasks) if isinstance(tasks, dict) else {t: {} for t in tasks}
        )
        if not self.tasks:
            raise ValueError("tasks is empty; name at least one family of reasoning_gym")
        check_numbers(
            "weights", weights, length=len(self.tasks), none=True, above=0, hint="One belongs to each task."
        )
        check_sizes(train_size=train_size, val_size=val_size, test_size=test_size)
        self.weights = [1.0] * len(self.tasks) if weights is None else weights
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        self._families: dict[str, _Family] | None = None

    def rows(self, split: Split) -> Rows:
        """Return a split, generated row by row; see `TextDataModule.rows`.

        Raises:
            ValueError: A family or one of its options is unknown or invalid, or a family has too few
                different questions.
            ImportError: `reasoning_gym` is not installed.
        """
        counts: dict[Split, list[int]] = {
            name: quotas(self.weights, size) for name, size in self.sizes.items()
        }
        if self._families is None:
            self._families = {
                task: _Family(
                    task,
                    options,
                    stable_hash(self.seed, task) % 2**31,
                    {name: counts[name][index] for name in self.sizes},
                )
                for index, (task, options) in enumerate(self.tasks.items())
            }
        places = [
            (task, number)
            for task, count in zip(self.tasks, counts[split], strict=True)
            for number in range(count)
        ]
        mixed = permutation(len(places), self.seed, "mix", split).tolist()
        return _GeneratedRows(self._families, split, [places[index] for index in mixed])


class _Family:
    """The questions of one family: indices of its data set for each split.

    A data set of reasoning_gym seeds row i with `seed + i`, so splits are ranges of i under one seed: two
    neighbouring seeds would share nearly all rows.
    """

    def __init__(self, task: str, options: dict[str, Any], seed: int, counts: dict[Split, int]) -> None:
        self.task = task
        self.options = options
        num_train, num_held_out = counts["train"], counts["val"] + counts["test"]
        self.size = num_train + 4 * num_held_out + 100
        self.dataset = _create(task, options, seed=seed, size=self.size)
        self._held_out: dict[str, int] = {}
        for index in range(num_train, self.size):
            if len(self._held_out) == num_held_out:
                break
            self._held_out.setdefault(self.dataset[index]["question"], index)
        if len(self._held_out) < num_held_out:
            raise ValueError(
                f"the family {task!r} has too few different questions: {num_held_out} are to be held out for "
                f"validation and test, only {len(self._held_out)} were found; lower val_size and test_size "
                "or widen the family's options"
            )
        indices = list(self._held_out.values())
        self._indices: dict[Split, list[int]] = {
            "val": indices[: counts["val"]],
            "test": indices[counts["val"] :],
        }
        if num_train:
            # A family without any training question fails here, not in mid-training.
            self.entry("train", 0)

    def entry(self, split: Split, number: int) -> dict[str, Any]:
        if split != "train":
            return dict(self.dataset[self._indices[split][number]])
        for offset in range(self.size):
            entry = self.dataset[(number + offset) % self.size]
            if entry["question"] not in self._held_out:
                return dict(entry)
        raise ValueError(
            f"the family {self.task!r} has too few different questions: all that were found are held out for "
            "validation and test; lower val_size and test_size or widen the family's options"
        )


class _GeneratedRows:
    """Rows of one split; `places` holds family and number of each."""

    column_names: tuple[str, ...] = ("question", "answer", "task", "metadata", "entry", "options")

    def __init__(self, families: dict[str, _Family], split: Split, places: list[tuple[str, int]]) -> None:
        self._families = families
        self._split = split
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        task, number = self._places[index]
        family = self._families[task]
        entry = family.entry(self._split, number)
        return {
            "question": entry["question"],
            "answer": "" if entry["answer"] is None else entry["answer"],
            "task": task,
            "metadata": entry["metadata"],
            "entry": entry,
            "options": family.options,
        }


def _create(task: str, options: dict[str, Any], seed: int, size: int) -> ProceduralDataset:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError(
            "ReasoningGymDataModule needs `reasoning-gym`: pip install 'lightning-quiver[tasks]'"
        ) from error
    # `composite` mixes families by itself, which is the business of `tasks` and `weights` here.
    families = sorted(set(DATASETS) - {"composite"})
    if task not in families:
        close = difflib.get_close_matches(task, families, n=5) or families
        raise ValueError(f"reasoning_gym has no task family {task!r}; did you mean: {', '.join(close)}?")
    valid = [
        field.name for field in dataclasses.fields(DATASETS[task][1]) if field.name not in ("seed", "size")
    ]
    for option in options:
        if option not in valid:
            raise ValueError(
                f"the family {task!r} has no option {option!r}; its options are: {', '.join(valid)}"
            )
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=size, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"the family {task!r} refuses the options {options}: {error}") from error
