"""How a row of data becomes a prompt, a gold answer, a task and choices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, NamedTuple, Protocol, runtime_checkable

from datamodules.batches import Answer, Prompt, split_tools
from datamodules.conversations import read_answer, read_messages, read_tools, split_conversation
from datamodules.values import as_text, has_column, kind_of, lookup

DEFAULT_TASK = "default"
"""The task of rows without a task column."""

TOOLS_COLUMN = "tools"
"""The column that offers tools where a row has it; one of another name must be there."""


class Rows(Protocol):
    """What a data set must offer: a length, and rows by index. Any list of dicts does."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@runtime_checkable
class ColumnarRows(Rows, Protocol):
    """Rows that all have the same known columns, read when needed: an Arrow table, generated rows."""

    @property
    def column_names(self) -> list[str]:
        """The columns of every row."""
        ...


class ParsedRow(NamedTuple):
    """What a `TextBatch` needs of one row."""

    prompt: Prompt
    answer: Answer
    task: str
    choices: list[str]


@dataclass(frozen=True)
class RowFormat:
    """Which columns mean what, and how the prompt is written. Fields as in `TextDataModule`.

    Raises:
        ValueError: The template is not a valid format string of plain column names.
    """

    prompt_column: str = "prompt"
    answer_column: str | None = "answer"
    task_column: str | None = None
    choices_column: str | None = None
    messages_column: str | None = None
    tools_column: str | None = TOOLS_COLUMN
    template: str = "{prompt}"
    system_prompt: str | None = None
    conversational: bool = False

    def __post_init__(self) -> None:
        try:
            fields = self.template_fields
        except ValueError as error:
            raise ValueError(
                f"template={self.template!r}: {error}; write {{{{ and }}}} for literal braces"
            ) from error
        for field in fields:
            if not field or field.startswith("prompt.") or any(character in field for character in "[]\"'"):
                raise ValueError(
                    f"template={self.template!r}: the field {{{field}}} is not a plain column name; write "
                    "{{ and }} for literal braces"
                )

    @property
    def template_fields(self) -> list[str]:
        """Names of the fields of the template, in order."""
        return [name for _, name, _, _ in Formatter().parse(self.template) if name is not None]

    def check_columns(self, columns: Iterable[str], optional: Iterable[str | None] = ()) -> None:
        """Check that `columns` holds every column the format names.

        Args:
            columns: Names of columns.
            optional: Of those that the format names, which may be missing.

        Raises:
            ValueError: A column is missing; the message names its argument and the columns there are.
        """
        present = list(columns)
        listing = f"the columns are: {', '.join(present)}"
        named = {"task_column": self.task_column, "choices_column": self.choices_column}
        if self.messages_column is None:
            named |= {"prompt_column": self.prompt_column, "answer_column": self.answer_column}
        else:
            named |= {"messages_column": self.messages_column}
        if self.tools_column != TOOLS_COLUMN:
            named |= {"tools_column": self.tools_column}
        for argument, column in named.items():
            if column is not None and column not in optional and not has_column(present, column):
                remedy = ". Set answer_column: null if there are none" if argument == "answer_column" else ""
                raise ValueError(f"there is no column {column!r} ({argument}); {listing}{remedy}")
        for field in self.template_fields:
            if field != "prompt" and not has_column(present, field):
                raise ValueError(f"there is no column {field!r} (a field of template); {listing}")

    def parse(self, row: Mapping[str, Any]) -> ParsedRow:
        """Read one row.

        Raises:
            ValueError: A column is missing or holds something unusable.
        """
        # A row of a ragged JSONL file may lack its choices and tools: they are optional per row.
        self.check_columns(row, optional=(self.choices_column, self.tools_column))
        prompt: Prompt
        answer: Answer = ""
        if self.messages_column is not None:
            prompt, answer = split_conversation(lookup(row, self.messages_column, "messages_column"))
        else:
            prompt = self._prompt(row)
            if self.answer_column is not None:
                value = lookup(row, self.answer_column, "answer_column")
                answer = read_answer(value, f"column {self.answer_column!r} (answer_column)")
        task = DEFAULT_TASK
        if self.task_column is not None:
            value = lookup(row, self.task_column, "task_column")
            task = as_text(value, f"column {self.task_column!r} (task_column)")
        return ParsedRow(self._with_roles(prompt, self._tools(row)), answer, task, self._choices(row, answer))

    def _prompt(self, row: Mapping[str, Any]) -> Prompt:
        value = lookup(row, self.prompt_column, "prompt_column")
        if isinstance(value, list):
            return read_messages(value)
        if not isinstance(value, str):
            raise ValueError(
                f"column {self.prompt_column!r} (prompt_column) must hold a string or a list of messages, "
                f"got {kind_of(value)}"
            )
        values = {"prompt": value}
        for field in self.template_fields:
            if field != "prompt":
                values[field] = lookup(row, field, "a field of template")
            if values[field] is None:
                raise ValueError(f"the template has a field {{{field}}}, but the row's value is null")
            as_text(values[field], f"column {field!r} (a field of template)")
        return _FORMATTER.vformat(self.template, (), values)

    def _tools(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        if self.tools_column is None or not has_column(row, self.tools_column):
            return []
        value = lookup(row, self.tools_column, "tools_column")
        return read_tools(value, f"column {self.tools_column!r} (tools_column)")

    def _choices(self, row: Mapping[str, Any], answer: Answer) -> list[str]:
        if self.choices_column is None or not has_column(row, self.choices_column):
            return []
        what = f"column {self.choices_column!r} (choices_column)"
        value = lookup(row, self.choices_column, "choices_column")
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            raise ValueError(f"{what}: the choices must be a list, got {kind_of(value)}")
        choices = [as_text(choice, what) for choice in value]
        has_answer = self.answer_column is not None or self.messages_column is not None
        if choices and has_answer and answer not in choices:
            raise ValueError(
                f"{what} does not hold the answer {answer!r:.60}: write the answer as one of the choices, not as its "
                "number or letter"
            )
        return choices

    def _with_roles(self, prompt: Prompt, tools: list[dict[str, Any]]) -> Prompt:
        if isinstance(prompt, list):
            if self.template != "{prompt}":
                raise ValueError(
                    f"template={self.template!r} applies to strings, but this prompt is a list of messages"
                )
            messages = prompt
        elif self.conversational or self.system_prompt is not None or tools:
            messages = [{"role": "user", "content": prompt}]
        else:
            return prompt
        messages, carried = split_tools(messages)
        carried = read_tools(carried, "'tools' of the first message")
        if carried and tools and carried != tools:
            raise ValueError("the first message carries other tools than the row: leave out one of the two")
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        if tools := tools or carried:
            messages[0] = {**messages[0], "tools": tools}
        return messages


class _Formatter(Formatter):
    """Takes a field by its whole name, so that one may be a path."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return kwargs[field_name], field_name


_FORMATTER = _Formatter()
