"""Data sets of the Hugging Face hub, and local Parquet, JSON and CSV files, through `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.base import Split, TextDataModule
from datamodules.rows import ParsedRow, Rows
from datamodules.splits import check_val_size, held_out
from datamodules.values import without_nulls

if TYPE_CHECKING:
    from datasets import DatasetDict

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


class HubDataModule(TextDataModule):
    """Rows of whatever `datasets.load_dataset` loads; they stay in their memory-mapped Arrow file.

    Columns are checked against the schema before training, and the first row; values when they are batched.

    Args:
        path: Hub id, local folder, local .parquet, .json, .jsonl or .csv file, or the name of a builder
            (`parquet`, `json`, ...) that reads `data_files`.
        name: Configuration of the data set.
        train_split: Split to train on, as `load_dataset` names it (a single file is `train`).
        val_split: Split to validate on.
        test_split: Split to test on.
        val_size: Part of the training split held out for validation, in place of `val_split`: a fraction
            in [0, 1) or a number of rows, drawn by `seed`.
        data_files: Files of the data set, by split or not.
        revision: Branch, tag or commit of the data set; a commit makes a run repeatable.
        **kwargs: Arguments of `TextDataModule`: columns, template, batch sizes, seed.

    Raises:
        ValueError: Both `val_split` and `val_size` are given.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_size: int | float = 0,
        data_files: str | list[str] | dict[str, str | list[str]] | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_val_size(val_size)
        if val_split is not None and val_size:
            raise ValueError(f"give either val_split={val_split!r} or val_size={val_size!r}, not both")
        self.path = path
        self.name = name
        self.split_names: dict[Split, str | None] = {
            "train": train_split,
            "val": train_split if val_size else val_split,
            "test": test_split,
        }
        self.val_size = val_size
        self.data_files = data_files
        self.revision = revision
        self._loaded: DatasetDict | None = None

    def prepare_data(self) -> None:
        """Download into the cache of `datasets`; Lightning calls this on one process per node."""
        self._load()

    def rows(self, split: Split) -> Rows:
        """Open a split; see `TextDataModule.rows`.

        Raises:
            ValueError: The data set has no such split, or the split is empty.
            ImportError: `datasets` is not installed.
        """
        name = self.split_names[split]
        if name is None:
            return []
        if self._loaded is None:
            self._loaded = self._load()
        if name not in self._loaded:
            raise ValueError(
                f"{split}_split={name!r}: {self.path} has no such split; it has {', '.join(self._loaded)}"
            )
        rows = self._loaded[name]
        if len(rows) == 0:
            raise ValueError(f"the split {name!r} of {self.path} has no rows")
        if self.val_size and split != "test":
            rows = rows.select(held_out(len(rows), self.val_size, self.seed, self.path)[split == "val"])
        opened: Rows = rows
        return opened

    def row_name(self, split: Split, index: int) -> str:
        """Return data set, split and index of a row."""
        return f"{self.path}, row {index} of the {split} split"

    def _parse(self, split: Split, index: int, row: object) -> ParsedRow:
        if isinstance(row, Mapping):
            row = {name: without_nulls(v) if isinstance(v, list | dict) else v for name, v in row.items()}
        return super()._parse(split, index, row)

    def _load(self) -> DatasetDict:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError("HubDataModule needs `datasets`: pip install lightning-quiver") from error
        path, data_files = self.path, self.data_files
        if Path(path).is_file():
            builder = _BUILDERS.get(Path(path).suffix)
            if builder is None:
                raise ValueError(f"path={path!r} is not one of the file types {', '.join(_BUILDERS)}")
            path, data_files = builder, path
        return load_dataset(path, self.name, data_files=data_files, revision=self.revision)
