"""How a step divides into rows and forward passes, in numbers alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepShape:
    """One optimiser step of a rank. All rows are as long as rows may be.

    Attributes:
        prompts: Prompts of a rank.
        group_size: Completions of a prompt; 1 where answers are given.
        prompt_tokens: Length of a prompt.
        completion_tokens: Length of a completion or answer.
        rows_per_pass: Rows of a full micro-batch.
        updates: Optimiser updates from the rows.
    """

    prompts: int
    group_size: int
    prompt_tokens: int
    completion_tokens: int
    rows_per_pass: int
    updates: int = 1

    @property
    def rows(self) -> int:
        """Rows of a rank."""
        return self.prompts * self.group_size

    @property
    def width(self) -> int:
        """Tokens of a row."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def passes(self) -> int:
        """Micro-batches of an update."""
        return -(-self.rows // self.rows_per_pass)
