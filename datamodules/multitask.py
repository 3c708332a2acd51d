"""Many tasks in one folder, a file each, mixed by temperature, with paraphrased instructions."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from datamodules.base import Split, TextDataModule
from datamodules.jsonl import read_jsonl
from datamodules.splits import check_val_size, held_out, permutation, quotas, stable_hash
from datamodules.values import as_text
from lightning_modules.ranges import check_number, check_whole


class MultiTaskDataModule(TextDataModule):
    """Rows of `folder/train/<task>.jsonl` and `folder/test/<task>.jsonl` with keys `input` and `output`.

    Other keys of the rows are kept as columns; `task` and `instruction` are added. In each epoch task i
    gives a share of n_i^(1/T) / sum_j n_j^(1/T) of the rows, rounded to whole rows, where n_i is its number
    of training rows and T the temperature. A task's rows come in rounds over its whole file that go on
    across epochs, so that all its rows are seen equally often; with T = 1 and no `examples_per_epoch` an
    epoch is each row once.

    Args:
        folder: Folder with `train/` and, to test, `test/`.
        tasks: Names of the tasks to use; None means all files of `folder/train`.
        temperature: T > 0: 1 mixes in proportion to size, a large T uniformly.
        instructions: JSON file that maps each task to a list of paraphrased instructions. A row's
            paraphrase depends on `seed`, task and row alone: it is the same in every epoch.
        examples_per_epoch: Rows of an epoch; None means as many as there are training rows.
        val_size: Part of each task's training rows held out for validation: a fraction in [0, 1) or a
            number of rows per task, drawn by `seed`.
        validate_on_test: Validate on the test rows instead of held-out training rows.
        max_per_task_val: At most so many validation rows per task, drawn by `seed`; None means all.
        template: Format string of the prompt over `instruction`, `input` and the other columns; None means
            `{instruction}`, a blank line and `Input: {input}`, or just `{input}` without `instructions`.
        **kwargs: Arguments of `TextDataModule`: system prompt, choices, batch sizes, seed.

    Raises:
        ValueError: `temperature` is not above 0, or both kinds of validation rows are asked for.
    """

    def __init__(
        self,
        folder: str,
        tasks: list[str] | None = None,
        temperature: float = 1.0,
        instructions: str | None = None,
        examples_per_epoch: int | None = None,
        val_size: int | float = 0,
        validate_on_test: bool = False,
        max_per_task_val: int | None = None,
        template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if template is None:
            template = "{input}" if instructions is None else "{instruction}\n\nInput: {input}"
        super().__init__(
            prompt_column="input", answer_column="output", task_column="task", template=template, **kwargs
        )
        check_number("temperature", temperature, above=0, hint="1 is proportional to size.")
        check_whole("examples_per_epoch", examples_per_epoch, none=True)
        check_val_size(val_size)
        check_whole("max_per_task_val", max_per_task_val, none=True)
        if validate_on_test and val_size:
            raise ValueError(f"give either validate_on_test or val_size={val_size!r}, not both")
        self.folder = Path(folder)
        self.tasks = tasks
        self.temperature = temperature
        self.instructions = instructions
        self.examples_per_epoch = examples_per_epoch
        self.val_size = val_size
        self.validate_on_test = validate_on_test
        self.max_per_task_val = max_per_task_val
        self._places: dict[Split, list[str]] = {}
        self._task_sizes: dict[str, int] = {}

    def rows(self, split: Split) -> list[Mapping[str, Any]]:
        """Read a split of all tasks, task after task; see `TextDataModule.rows`.

        Raises:
            ValueError: A task is unknown or has no instruction, or a file is missing or malformed.
        """
        if split == "val" and not self.val_size and not self.validate_on_test:
            return []
        if split == "test" and not (self.folder / "test").is_dir():
            return []
        tasks = self._task_names()
        paraphrases = self._paraphrases(tasks)
        rows: list[Mapping[str, Any]] = []
        places: list[str] = []
        for task in tasks:
            task_rows = self._task_rows(task, split)
            if split == "train":
                self._task_sizes[task] = len(task_rows)
            for place, row in task_rows:
                chosen = paraphrases[task][stable_hash(self.seed, task, place) % len(paraphrases[task])]
                # The file name is the task, also where the rows have a `task` key of their own.
                rows.append({**row, "task": task, "instruction": chosen})
                places.append(place)
        self._places[split] = places
        return rows

    def row_name(self, split: Split, index: int) -> str:
        """Return `file:line` of a row."""
        return f"{self.folder}/{self._places[split][index]}"

    def train_order(self, epoch: int) -> torch.Tensor:
        """Return the row indices of an epoch by the temperature formula of the class.

        Raises:
            ValueError: `examples_per_epoch` is too small to give each task a row.
        """
        sizes = list(self._task_sizes.values())
        total = sum(sizes) if self.examples_per_epoch is None else self.examples_per_epoch
        counts = quotas([size ** (1 / self.temperature) for size in sizes], total)
        if without := [task for task, count in zip(self._task_sizes, counts, strict=True) if not count]:
            raise ValueError(
                f"examples_per_epoch={total} gives no row to {', '.join(without)}; raise it, or raise "
                f"temperature={self.temperature}"
            )
        parts = []
        first_row = 0
        for task, size, count in zip(self._task_sizes, sizes, counts, strict=True):
            parts.append(self._take(task, size, epoch * count, count) + first_row)
            first_row += size
        order = torch.cat(parts)
        return order[permutation(total, self.seed, "epoch", epoch)] if self.shuffle else order

    def _take(self, task: str, size: int, start: int, count: int) -> torch.Tensor:
        """Return positions [start, start + count) of the task's endless sequence of rounds over its rows."""
        rounds = range(start // size, (start + count - 1) // size + 1)
        if self.shuffle:
            rows = torch.cat([permutation(size, self.seed, "round", task, number) for number in rounds])
        else:
            rows = torch.arange(size).repeat(len(rounds))
        return rows[start - rounds[0] * size :][:count]

    def _task_names(self) -> list[str]:
        available = sorted(file.stem for file in (self.folder / "train").glob("*.jsonl"))
        if not available:
            raise ValueError(f"there is no .jsonl file in {(self.folder / 'train').resolve()}")
        for task in self.tasks or ():
            if task not in available:
                close = difflib.get_close_matches(task, available) or available
                raise ValueError(f"unknown task {task!r} in {self.folder}; did you mean: {', '.join(close)}?")
        return available if self.tasks is None else self.tasks

    def _paraphrases(self, tasks: list[str]) -> dict[str, list[str]]:
        if self.instructions is None:
            return {task: [""] for task in tasks}
        try:
            texts = json.loads(Path(self.instructions).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"instructions={self.instructions!r} is no readable JSON file: {error}"
            ) from error
        for task in tasks:
            if not isinstance(texts, dict) or not isinstance(texts.get(task), list) or not texts[task]:
                raise ValueError(
                    f"instructions={self.instructions!r} has no list of texts for the task {task!r}"
                )
            for text in texts[task]:
                as_text(text, f"instructions={self.instructions!r}: the task {task!r}")
        return {task: texts[task] for task in tasks}

    def _task_rows(self, task: str, split: Split) -> list[tuple[str, Mapping[str, Any]]]:
        """Return the rows of one task and split, each with its `part/task.jsonl:line`."""
        part = "test" if split == "test" or (split == "val" and self.validate_on_test) else "train"
        rows, lines = read_jsonl(self.folder / part / f"{task}.jsonl")
        placed = [(f"{part}/{task}.jsonl:{line}", row) for line, row in zip(lines, rows, strict=True)]
        if part == "train" and self.val_size:
            train, val = held_out(len(placed), self.val_size, self.seed, f"the task {task}")
            placed = [placed[index] for index in (val if split == "val" else train)]
        if split == "val" and self.max_per_task_val is not None:
            drawn = permutation(len(placed), self.seed, "validation", task)[: self.max_per_task_val]
            placed = [placed[index] for index in sorted(drawn.tolist())]
        return placed
