"""Local JSONL files: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.base import Split, TextDataModule
from datamodules.splits import check_val_size, held_out


class JsonlDataModule(TextDataModule):
    """Rows of JSONL files, held in memory; every row is checked before training starts.

    Args:
        train_file: Training rows, one JSON object per line in UTF-8; blank lines are skipped.
        val_file: Validation rows.
        test_file: Test rows.
        val_size: Part of the training rows held out for validation, in place of `val_file`: a fraction in
            [0, 1) or a number of rows, drawn by `seed`.
        **kwargs: Arguments of `TextDataModule`: columns, template, batch sizes, seed.

    Raises:
        ValueError: Both `val_file` and `val_size` are given.
    """

    def __init__(
        self,
        train_file: str,
        val_file: str | None = None,
        test_file: str | None = None,
        val_size: int | float = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_val_size(val_size)
        if val_file is not None and val_size:
            raise ValueError(f"give either val_file={val_file!r} or val_size={val_size!r}, not both")
        self.train_file = train_file
        self.val_file = val_file
        self.test_file = test_file
        self.val_size = val_size
        self._lines: dict[Split, tuple[str, list[int]]] = {}

    def rows(self, split: Split) -> list[Mapping[str, Any]]:
        """Read a split; see `TextDataModule.rows`.

        Raises:
            ValueError: The file is missing or empty, or a line is not a JSON object in UTF-8.
        """
        if split == "val" and self.val_file is None and not self.val_size:
            return []
        path = {"train": self.train_file, "val": self.val_file or self.train_file, "test": self.test_file}[
            split
        ]
        if path is None:
            return []
        rows, lines = read_jsonl(path)
        if self.val_size and split != "test":
            indices = held_out(len(rows), self.val_size, self.seed, path)[split == "val"]
            rows, lines = [rows[index] for index in indices], [lines[index] for index in indices]
        self._lines[split] = (path, lines)
        return rows

    def row_name(self, split: Split, index: int) -> str:
        """Return `file:line` of a row."""
        path, lines = self._lines[split]
        return f"{path}:{lines[index]}"


def read_jsonl(path: str | Path) -> tuple[list[Mapping[str, Any]], list[int]]:
    """Read a JSONL file.

    Returns:
        The rows, and the line number of each, counted from 1.

    Raises:
        ValueError: The file is missing, a folder or without rows, or a line is not a JSON object in UTF-8;
            the message names file and line.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{file.resolve()} is a folder, not a JSONL file; {_files_in(file)}")
    if not file.is_file():
        hint = f"; {_files_in(file.parent)}" if file.parent.is_dir() else ""
        raise ValueError(f"there is no file {file.resolve()}{hint}")
    rows: list[Mapping[str, Any]] = []
    lines: list[int] = []
    # Lines are split as bytes, so that bad UTF-8 can be located and U+2028 in a text ends no line.
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            row = _parse_line(line, f"{path}:{number}")
            if row is not None:
                rows.append(row)
                lines.append(number)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows, lines


def _parse_line(line: bytes, where: str) -> Mapping[str, Any] | None:
    try:
        # Editors on Windows put a byte order mark before the first line.
        text = line.decode("utf-8-sig" if where.endswith(":1") else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start + 1}: {error.reason})") from error
    if not text:
        return None
    try:
        row = json.loads(text)
        if "\\u" in text:  # an escape can name half a character, which no tokenizer takes
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}: {text[:80]!r}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not text: {error.object[error.start]!r} is half a character") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ValueError(f"{where}: not JSON that can be read: {error}: {text[:80]!r}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a line must be a JSON object, got {type(row).__name__}: {text[:80]!r}")
    return row


def _files_in(folder: Path) -> str:
    names = sorted(file.name for file in folder.glob("*.jsonl"))
    return f"{folder.resolve()} holds " + (", ".join(names) if names else "no .jsonl file")
