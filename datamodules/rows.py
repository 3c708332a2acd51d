"""How a row of data becomes a prompt, a gold answer, a task and choices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any, NamedTuple, Protocol, runtime_checkable

from datamodules.batches import Message, Prompt

DEFAULT_TASK = "default"
"""The task of rows without a task column."""


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
    answer: str
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
            if not field or any(character in field for character in ".[]\"'"):
                raise ValueError(
                    f"template={self.template!r}: the field {{{field}}} is not a plain column name; write "
                    "{{ and }} for literal braces"
                )

    @property
    def template_fields(self) -> list[str]:
        """Names of the fields of the template, in order."""
        return [name for _, name, _, _ in Formatter().parse(self.template) if name is not None]

    def check_columns(self, columns: Iterable[str]) -> None:
        """Check that `columns` holds every column the format names.

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
        for argument, column in named.items():
            if column is not None and column not in present:
                remedy = ". Set answer_column: null if there are none" if argument == "answer_column" else ""
                raise ValueError(f"there is no column {column!r} ({argument}); {listing}{remedy}")
        for field in self.template_fields:
            if field != "prompt" and field not in present:
                raise ValueError(f"there is no column {field!r} (a field of template); {listing}")

    def parse(self, row: Mapping[str, Any]) -> ParsedRow:
        """Read one row.

        Raises:
            ValueError: A column is missing or holds something unusable.
        """
        # A row of a ragged JSONL file may lack its choices: they are optional per row.
        self.check_columns([*row, self.choices_column] if self.choices_column is not None else row)
        prompt: Prompt
        if self.messages_column is not None:
            prompt, answer = split_conversation(row[self.messages_column])
        else:
            prompt = self._prompt(row)
            answer = (
                "" if self.answer_column is None else _answer(row[self.answer_column], self.answer_column)
            )
        return ParsedRow(
            prompt=self._with_roles(prompt),
            answer=answer,
            task=DEFAULT_TASK if self.task_column is None else str(row[self.task_column]),
            choices=[] if self.choices_column is None else _choices(row.get(self.choices_column)),
        )

    def _prompt(self, row: Mapping[str, Any]) -> Prompt:
        value = row[self.prompt_column]
        if isinstance(value, list):
            return read_messages(value)
        if not isinstance(value, str):
            raise ValueError(
                f"column {self.prompt_column!r} (prompt_column) must hold a string or a list of messages, "
                f"got {type(value).__name__}"
            )
        values = {**row, "prompt": value}
        for field in self.template_fields:
            if values[field] is None:
                raise ValueError(f"the template has a field {{{field}}}, but the row's value is null")
        return self.template.format_map(values)

    def _with_roles(self, prompt: Prompt) -> Prompt:
        if isinstance(prompt, list):
            if self.template != "{prompt}":
                raise ValueError(
                    f"template={self.template!r} applies to strings, but this prompt is a list of messages"
                )
            messages = prompt
        elif self.conversational or self.system_prompt is not None:
            messages = [{"role": "user", "content": prompt}]
        else:
            return prompt
        if self.system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]


def read_messages(value: Any) -> list[Message]:
    """Check a conversation and keep the role and content of each message.

    Raises:
        ValueError: It is not a non-empty list of messages whose role and content are strings.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"a conversation must be a non-empty list of messages, got {value!r:.80}")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} must be an object with role and content, got {message!r:.80}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"message {number} needs a string {key!r}, got {message.get(key)!r:.80}")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def split_conversation(value: Any) -> tuple[list[Message], str]:
    """Split a conversation into what precedes its last message, and the text of that assistant message.

    Raises:
        ValueError: The conversation is malformed or does not end with an assistant message after a prompt.
    """
    messages = read_messages(value)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message must be the assistant's, not of role {messages[-1]['role']!r}")
    if len(messages) == 1:
        raise ValueError("there is no message before the assistant's, so there is no prompt")
    return messages[:-1], messages[-1]["content"]


def _answer(value: Any, column: str) -> str:
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    if value is None:
        raise ValueError(f"column {column!r} (answer_column) holds no answer; answer_column=None needs none")
    return str(value)


def _choices(value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise ValueError(f"the choices must be a list, got {type(value).__name__}")
    return [str(choice) for choice in value]
