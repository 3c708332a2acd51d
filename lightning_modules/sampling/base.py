"""The Sampler seam: token ids in, completions with log-probabilities out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from lightning_modules.ranges import check_number, check_whole, check_wholes

FinishReason = Literal["stop", "length"]

Announce: TypeAlias = Callable[[Sequence[int]], None]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: Length limit of a completion; a completion that reaches it is truncated.
        temperature: Divides the logits. 0 decodes greedily.
        top_p: Keep the most likely tokens up to this probability mass. 1 keeps all.
        top_k: Keep this many tokens. 0 keeps all.
        min_p: Keep tokens at least this likely relative to the most likely one. 0 keeps all.
        repetition_penalty: Positive logits of tokens that the prompt or the completion holds already are divided
            by it, negative ones multiplied. 1 leaves them. It changes greedy decoding too.
        stop: Strings that end a completion once its text contains one. Special tokens are no part of the text, but a
            string may be or hold one, such as `<|im_end|>`. The completion keeps the token that completed the
            string, and nothing is cut from it.
        stop_token_ids: Tokens that end a completion, besides the model's own end tokens. The completion keeps them.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        # YAML gives a list; a tuple keeps the frozen settings hashable.
        if isinstance(self.stop, str):
            raise ValueError(f"stop={self.stop!r}: give a list of strings, such as [{self.stop!r}].")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        check_whole("max_new_tokens", self.max_new_tokens)
        check_number("temperature", self.temperature, least=0, hint="0 decodes greedily.")
        check_number("top_p", self.top_p, above=0, most=1, hint="1 keeps every token.")
        check_whole("top_k", self.top_k, least=0, hint="0 keeps every token.")
        check_number("min_p", self.min_p, least=0, below=1, hint="0 keeps every token.")
        check_number("repetition_penalty", self.repetition_penalty, above=0, hint="1 changes nothing.")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(
                f"stop={list(self.stop)}: every entry must be a string that is not empty, for the empty one ends "
                "every completion. Remove the others."
            )
        check_wholes("stop_token_ids", self.stop_token_ids, least=0, hint="Write texts into stop.")


@dataclass(frozen=True)
class Completions:
    """What a sampler returns, one entry per prompt row.

    Attributes:
        token_ids: Generated ids (B rows of their own length), the end token included.
        texts: The same as text, without special tokens (B).
        finish: `stop` where the model ended the completion, `length` where the limit did (B).
        logprobs: The sampler's own log-probability of each generated token, nats, under the distribution
            that it was drawn from (B rows as long as `token_ids`).
    """

    token_ids: list[list[int]]
    texts: list[str]
    finish: list[FinishReason]
    logprobs: list[list[float]]


class Sampler(ABC):
    """Generates completions of token prompts with the current policy.

    Attributes:
        compute_dtype: Type in which the trainer's model computes, for engines that compute by themselves; the module
            sets it before `bind`. None is that of the weights.
    """

    compute_dtype: torch.dtype | None = None

    @abstractmethod
    def bind(self, model: nn.Module, tokenizer: Any) -> None:
        """Take the policy to sample from. Called before the first `generate`, and again when training starts anew."""

    def sync(self, version: int, save: Callable[[Path], None]) -> None:  # noqa: B027
        """Make the policy that completions are drawn from that of the trainer.

        Called on every rank before each rollout. Samplers that draw with the trainer's own model have nothing to do.

        Args:
            version: Optimiser updates so far. Equal numbers between two calls of `bind` are equal policies.
            save: Writes what was learned as a folder: a PEFT folder, or a Hugging Face folder of all weights. A
                collective under sharding: called on every rank or on none.
        """

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        announce: Announce | None = None,
        seeds: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
    ) -> Completions:
        """Draw one completion per row.

        Args:
            prompts: Token ids per row. A prompt with G completions stands in G neighbouring rows.
            sampling: How to draw.
            announce: Called with the positions in `prompts` of the rows that the next forward passes are about,
                whenever these change; adapters that treat rows differently need it.
            seeds: One for each row: what a row draws then depends on nothing but its prompt, the policy and its
                seed, whichever rows are drawn with it. None draws from torch's generator.
            groups: A number for each row. Rows of equal ids are one prompt to the model, and may share one pass over
                it, only if their numbers are equal too; None says that ids decide. Give it where an adapter treats
                rows of equal ids differently, for example by their tasks.

        Returns:
            One completion per row, in order.
        """
