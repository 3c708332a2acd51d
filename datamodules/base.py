"""The base of all DataModules: rows of text in, `TextBatch`es out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningDataModule

from datamodules.batches import Prompt, TextBatch
from datamodules.conversations import holds_message
from datamodules.loader import EvalLoader, TextLoader, TrainLoader
from datamodules.rows import TOOLS_COLUMN, ColumnarRows, ParsedRow, RowFormat, Rows
from datamodules.splits import permutation, weighted
from lightning_modules.ranges import check_whole

Split: TypeAlias = Literal["train", "val", "test"]

_SPLITS_OF_STAGE: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test", "val"),
    None: ("train", "val", "test"),
}


class TextDataModule(LightningDataModule):
    """Batches of prompts and gold answers; a subclass says where the rows come from.

    A new data set is one method:

        class Capitals(TextDataModule):
            def rows(self, split):
                return [{"prompt": "Capital of France?", "answer": "Paris"}] if split == "train" else []

    Batches carry text, never tokens, so every model and chat template can read every DataModule. A column may be a path
    into a struct, such as `reward_model.ground_truth`. What is to be text is text or a number: a struct, a nested list,
    a truth value, a date or NaN is refused with its row, for none of them has one spelling.

    Args:
        batch_size: Prompts per rank and training step.
        val_batch_size: Prompts per rank and validation, test or prediction step; None means `batch_size`.
        prompt_column: Column with the prompt: a string, or a list of `{"role", "content"}` messages. The model goes
            on with the last one if that is an assistant's.
        answer_column: Column with the gold answer (of a list, its first element), or one assistant message; None for
            data without.
        task_column: Column that names the task of a row; None puts all rows into one task, `default`.
        choices_column: Column with the list of candidate answers of multiple choice, the answer among them.
        messages_column: Column with a whole conversation, in place of prompt and answer columns: its last
            message, the assistant's, is the gold answer, what precedes it is the prompt. Messages may hold what the
            chat template reads besides role and content, such as `tool_calls` and `reasoning_content`.
        tools_column: Column with the tools that a row offers, a list of schemas or the same as JSON text; read where
            rows have it. None if such a column is about something else.
        template: Format string over the row's columns that makes a string prompt; `{prompt}` is the value
            of the prompt column. Braces inside the values are left alone.
        system_prompt: Put before each prompt as a system message, unless the prompt brings its own.
        conversational: Make string prompts into messages, as a system prompt does by itself. Reward
            functions then get completions as lists of messages too (TRL's convention).
        shuffle: Whether the training rows are permuted anew in each epoch.
        seed: Seed of everything that a DataModule draws. The global RNG is not used.

    Raises:
        ValueError: `template` is malformed.
    """

    def __init__(
        self,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        prompt_column: str = "prompt",
        answer_column: str | None = "answer",
        task_column: str | None = None,
        choices_column: str | None = None,
        messages_column: str | None = None,
        tools_column: str | None = TOOLS_COLUMN,
        template: str = "{prompt}",
        system_prompt: str | None = None,
        conversational: bool = False,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_whole("batch_size", batch_size)
        check_whole("val_batch_size", val_batch_size, none=True, hint="null is batch_size.")
        check_whole("seed", seed, least=0)
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.row_format = RowFormat(
            prompt_column=prompt_column,
            answer_column=answer_column,
            task_column=task_column,
            choices_column=choices_column,
            messages_column=messages_column,
            tools_column=tools_column,
            template=template,
            system_prompt=system_prompt,
            conversational=conversational,
        )
        self._splits: dict[Split, Rows] = {}
        self._columns: dict[Split, list[str]] = {}
        self._left_out: dict[Split, torch.Tensor] = {}  # True at rows that nobody gets
        self._train_loader: TrainLoader | None = None
        self._weights: torch.Tensor | None = None
        self._weights_of_epoch: tuple[int, torch.Tensor | None] | None = None

    def rows(self, split: Split) -> Rows:
        """Return the rows of a split, in a fixed order; called once per split and process.

        Args:
            split: `train`, `val` or `test`.

        Returns:
            A sequence of mappings from column to value, or anything with a length, rows by index and
            `column_names` (an Arrow-backed `datasets.Dataset`), which is then read only as needed. Empty
            for a split that the data set lacks.
        """
        raise NotImplementedError(f"{type(self).__name__} must define rows(split)")

    def row_name(self, split: Split, index: int) -> str:
        """Return the name of a row for error messages; a subclass may name the file and line."""
        return f"{type(self).__name__}, row {index} of the {split} split"

    def train_order(self, epoch: int) -> torch.Tensor:
        """Return the row indices of a training epoch, (rows per epoch,) int64, a function of `epoch` alone.

        A subclass may override it to mix or repeat rows; the length must be the same in each epoch.
        """
        num_rows = len(self._splits["train"])
        return permutation(num_rows, self.seed, "epoch", epoch) if self.shuffle else torch.arange(num_rows)

    def num_rows(self, split: Split) -> int:
        """Return the number of rows of a split; its rows have the uids from 0 on."""
        return len(self._split_rows(split))

    def weigh_rows(self, weights: torch.Tensor | None) -> None:
        """Let training rows come as often as their weights say, from the next epoch on.

        The rows of an epoch are then drawn from those of `train_order`, as many as before.

        Args:
            weights: Of the training rows, not negative, any scale (rows,); the same on every rank. None: all alike.

        Raises:
            ValueError: If there is not one weight for each row, one is negative or not finite, or all are 0.
        """
        num_rows = len(self._split_rows("train"))
        if weights is not None:
            if weights.shape != (num_rows,):
                raise ValueError(
                    f"{tuple(weights.shape)} weights for {num_rows} training rows: give one for each row"
                )
            if (
                not bool(weights.isfinite().all())
                or bool((weights < 0).any())
                or not bool((weights > 0).any())
            ):
                raise ValueError("weights of rows must be finite, not negative, and not all 0")
        self._weights = weights

    def leave_out(self, split: Split, rows: Sequence[int]) -> None:
        """Give these rows to nobody, from the next loader on; the others keep their uids.

        An epoch of training has as many rows as the first one without them.

        Args:
            split: `train`, `val` or `test`.
            rows: Their indices; not all that there are.
        """
        self._left_out[split] = torch.zeros(self.num_rows(split), dtype=torch.bool)
        self._left_out[split][list(rows)] = True

    def _kept_order(self, epoch: int) -> torch.Tensor:
        order = self.train_order(epoch)
        if "train" not in self._left_out:
            return order
        left_out = self._left_out["train"]
        kept, first = order[~left_out[order]], self.train_order(0)
        length = int((~left_out[first]).sum())
        # Epochs that take each row once all have that many; others may lack some, and begin again with their first.
        return kept.repeat(-(-length // max(1, len(kept))))[:length]

    def _weighted_order(self, epoch: int) -> torch.Tensor:
        order = self._kept_order(epoch)
        # A resumed run must meet the weights with which the epoch began, not those of the time it was stopped.
        if self._weights_of_epoch is None or self._weights_of_epoch[0] != epoch:
            self._weights_of_epoch = (epoch, self._weights)
        weights = self._weights_of_epoch[1]
        return order if weights is None else weighted(order, weights[order], self.seed, "weighted", epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of rows in the epoch that runs and in the next one, for the checkpoint."""
        if self._weights is None:
            return {}
        epoch, weights = self._weights_of_epoch or (-1, None)
        return {"epoch": epoch, "weights": weights, "next_weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state_dict:
            self._weights_of_epoch = (state_dict["epoch"], state_dict["weights"])
            self._weights = state_dict["next_weights"]

    def task_names(self, split: Split = "train") -> list[str]:
        """Return the names of the tasks of a split, sorted.

        Args:
            split: `train`, `val` or `test`; loaded if it is not yet.
        """
        rows = self._split_rows(split)
        if self.row_format.task_column is None and len(rows):
            return [self._parse(split, 0, rows[0]).task]
        return sorted({self._parse(split, index, rows[index]).task for index in range(len(rows))})

    def examples(self, tasks: Sequence[str], number: int, split: Split = "train") -> list[Prompt]:
        """Return the prompts of some rows of some tasks, drawn by `seed`.

        Args:
            tasks: Names of tasks.
            number: At most so many.
            split: Where from.
        """
        rows = self._split_rows(split)
        chosen: list[Prompt] = []
        for index in permutation(len(rows), self.seed, "examples").tolist():
            if len(chosen) == number:
                break
            row = self._parse(split, index, rows[index])
            if row.task in tasks:
                chosen.append(row.prompt)
        return chosen

    def _split_rows(self, split: Split) -> Rows:
        if split not in self._splits:
            rows = self.rows(split)
            self._columns[split] = self._checked_columns(split, rows)
            self._splits[split] = rows
        return self._splits[split]

    def setup(self, stage: str | None = None) -> None:
        """Load and check the splits that `stage` needs.

        Args:
            stage: `fit`, `validate`, `test`, `predict`, or None for all splits.

        Raises:
            ValueError: There are no training rows, a column is missing, or a row is malformed. Rows with
                known columns (Arrow, generated) are checked one by one only when they are batched.
        """
        for split in _SPLITS_OF_STAGE[stage]:
            if len(self._split_rows(split)) == 0 and split == "train":
                raise ValueError(f"{type(self).__name__} has no training rows")
        if stage in ("fit", None):
            self._train_loader = None

    def train_dataloader(self) -> TextLoader:
        """Return the training batches of this rank: a `TrainLoader`, which resumes in mid-epoch.

        Under `Trainer(overfit_batches=...)` it is an `EvalLoader`: the same first rows in every epoch.

        Raises:
            ValueError: One step takes more rows than there are.
        """
        trainer = self.trainer
        # Lightning sets both attributes from its constructor arguments without declaring them.
        if trainer is not None and trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            return self._eval_loader("train", self.batch_size)
        # With reload_dataloaders_every_n_epochs a fresh loader would repeat epoch 0 for ever.
        reloads = trainer is not None and trainer.reload_dataloaders_every_n_epochs > 0  # type: ignore[attr-defined]
        if not reloads or self._train_loader is None:
            self._train_loader = TrainLoader(
                lambda indices: self.collate("train", indices),
                len(self._kept_order(0)),
                self.batch_size,
                *self._rank_and_world_size(),
                order=self._weighted_order,
            )
        return self._train_loader

    def val_dataloader(self) -> TextLoader | list[TextLoader]:
        """Return the validation batches of this rank, or `[]` (no validation) without validation rows."""
        return self._eval_loader("val", self.val_batch_size) if len(self._splits["val"]) else []

    def test_dataloader(self) -> TextLoader:
        """Return the test batches of this rank.

        Raises:
            ValueError: There are no test rows.
        """
        if not len(self._splits["test"]):
            raise ValueError(f"{type(self).__name__} has no test rows; give it a test split, or use validate")
        return self._eval_loader("test", self.val_batch_size)

    def predict_dataloader(self) -> TextLoader:
        """Return the test batches of this rank, or the validation batches without test rows.

        Raises:
            ValueError: There are neither test nor validation rows.
        """
        for split in _SPLITS_OF_STAGE["predict"]:
            if len(self._splits[split]):
                return self._eval_loader(split, self.val_batch_size)
        raise ValueError(f"{type(self).__name__} has neither test nor validation rows to predict")

    def collate(self, split: Split, indices: Sequence[int]) -> TextBatch:
        """Build the batch of the given rows; their indices are its uids.

        Raises:
            ValueError: A row is malformed.
        """
        rows = [self._splits[split][index] for index in indices]
        parsed = [self._parse(split, index, row) for index, row in zip(indices, rows, strict=True)]
        columns = {name: [row.get(name) for row in rows] for name in self._columns[split]}
        tasks = [row.task for row in parsed]
        has_answers = self.row_format.answer_column is not None or self.row_format.messages_column is not None
        batch = TextBatch(
            prompts=[row.prompt for row in parsed],
            answers=[row.answer for row in parsed],
            tasks=tasks,
            uids=list(indices),
            columns=columns,
            choices=[row.choices for row in parsed],
        )
        if has_answers and ("answer" not in columns or any(map(holds_message, columns["answer"]))):
            # A reward compares texts; of an answer that is tool calls it gets the message.
            texts = zip(batch.answers, batch.answer_texts(), strict=True)
            columns["answer"] = [text or answer for answer, text in texts]
        columns.setdefault("task", list(tasks))
        return batch

    def _checked_columns(self, split: Split, rows: Rows) -> list[str]:
        if isinstance(rows, ColumnarRows):
            columns = list(rows.column_names)
            if len(rows):  # the first row shows mistakes that all of them share
                self._parse(split, 0, rows[0])
        else:
            columns = list(dict.fromkeys(name for index in range(len(rows)) for name in rows[index]))
            for index in range(len(rows)):
                self._parse(split, index, rows[index])
        if len(rows):
            try:
                self.row_format.check_columns(columns)
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}, {split} split: {error}") from error
        return columns

    def _parse(self, split: Split, index: int, row: object) -> ParsedRow:
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{self.row_name(split, index)}: a row must be a mapping, got {type(row).__name__}"
            )
        try:
            return self.row_format.parse(row)
        except ValueError as error:
            raise ValueError(f"{self.row_name(split, index)}: {error}") from error

    def _eval_loader(self, split: Split, batch_size: int) -> EvalLoader:
        _, world_size = self._rank_and_world_size()
        rows = list(range(len(self._splits[split])))
        if split in self._left_out:
            rows = (~self._left_out[split]).nonzero()[:, 0].tolist()
        if len(rows) < world_size:
            raise ValueError(
                f"{type(self).__name__} has {len(rows)} {split} rows for {world_size} ranks; "
                "give each rank at least one row, or none to all of them"
            )
        return EvalLoader(
            lambda indices: self.collate(split, [rows[index] for index in indices]),
            len(rows),
            batch_size,
            *self._rank_and_world_size(),
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        # Ranks of one tensor-parallel group must read the same rows, so the strategy is asked for its place
        # among the data-parallel ranks; it answers None on a single device.
        sampler = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (0, 1) if sampler is None else (sampler["rank"], sampler["num_replicas"])
