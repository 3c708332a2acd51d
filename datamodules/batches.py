"""What a DataModule hands to a LightningModule: text, never tokens.

Only the module knows its tokenizer and chat template, so one DataModule serves every model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, str]
"""One turn of a conversation: `{"role": ..., "content": ...}`."""

Prompt: TypeAlias = str | list[Message]
"""A plain string, or a conversation. Rewards see completions in the same form (TRL's convention)."""


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
    answers: list[str]
    tasks: list[str]
    uids: list[int]
    columns: dict[str, list[Any]]
    choices: list[list[str]]

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: Any) -> TextBatch:
        """Return the batch itself: text has no device. Lightning calls this to move a batch."""
        return self
