"""What a DataModule hands to a LightningModule: text, never tokens.

Only the module knows its tokenizer and chat template, so one DataModule serves every model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
"""One turn of a conversation: `{"role": ..., "content": ...}`, and whatever else a chat template may read, such as
`tool_calls` or `reasoning_content`. The first message of a conversation carries the tools on offer as `tools`."""

Prompt: TypeAlias = str | list[Message]
"""A plain string, or a conversation. Rewards see completions in the same form (TRL's convention)."""

Answer: TypeAlias = str | Message
"""A text, or an assistant's message that holds more than its content, such as tool calls or reasoning."""


def split_tools(messages: Sequence[Message]) -> tuple[list[Message], Any]:
    """Return a conversation without the tools that its first message carries, and these; None where it has none."""
    first, *rest = messages
    return [{key: item for key, item in first.items() if key != "tools"}, *rest], first.get("tools")


@dataclass(frozen=True)
class TextBatch:
    """B rows of text.

    Attributes:
        prompts: What the model reads (B).
        answers: The gold answer of each row, the target of supervised training (B).
        tasks: The task that each row belongs to (B).
        uids: Position of each row in its data set; stable across epochs, ranks and resumes (B).
        columns: Every column of the data by name, each B long, handed to reward functions as keyword
            arguments. `answer` and `task` are added where the data has no columns of these names.
        choices: Candidate answers per row for multiple choice, empty where a row has none (B).
    """

    prompts: list[Prompt]
    answers: list[Answer]
    tasks: list[str]
    uids: list[int]
    columns: dict[str, list[Any]]
    choices: list[list[str]]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Iterable[int]) -> TextBatch:
        """Return some rows, by position; one may come several times."""
        rows = list(rows)
        return TextBatch(
            prompts=[self.prompts[row] for row in rows],
            answers=[self.answers[row] for row in rows],
            tasks=[self.tasks[row] for row in rows],
            uids=[self.uids[row] for row in rows],
            columns={name: [values[row] for row in rows] for name, values in self.columns.items()},
            choices=[self.choices[row] for row in rows],
        )

    @staticmethod
    def joined(batches: Sequence[TextBatch]) -> TextBatch:
        """Return the rows of several batches of one DataModule as one batch."""
        first, *others = batches
        return TextBatch(
            prompts=[*first.prompts, *(one for batch in others for one in batch.prompts)],
            answers=[*first.answers, *(one for batch in others for one in batch.answers)],
            tasks=[*first.tasks, *(one for batch in others for one in batch.tasks)],
            uids=[*first.uids, *(one for batch in others for one in batch.uids)],
            columns={
                name: [*values, *(one for batch in others for one in batch.columns[name])]
                for name, values in first.columns.items()
            },
            choices=[*first.choices, *(one for batch in others for one in batch.choices)],
        )

    def answer_texts(self) -> list[str]:
        """Return the text of each answer, "" where it is tool calls alone (B)."""
        return [one if isinstance(one, str) else one.get("content") or "" for one in self.answers]

    def to(self, device: Any) -> TextBatch:
        """Return the batch itself: text has no device. Lightning calls this to move a batch."""
        return self
