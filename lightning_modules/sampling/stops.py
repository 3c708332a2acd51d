"""When a completion ends: end tokens, stop tokens, and strings found in its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_modules.sampling.base import Sampling


class StopStrings:
    """Finds out whether the newest token of a completion completed a string that ends it.

    Text is read without special tokens, as completions are; but for a string that holds one, with them.

    Args:
        tokenizer: Turns ids into text.
        stop: The strings.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        special = special_tokens(tokenizer) if stop else {}
        self._with_special = [text for text in stop if any(token in text for token in special)]
        self._plain = [text for text in stop if text not in self._with_special]
        # A token with text has at least one byte. The extra ones may be what is left of a character at the border.
        self.window = max((len(text.encode()) for text in stop), default=0) + 4

    @property
    def reads_special(self) -> bool:
        """Whether one of the strings holds a special token."""
        return bool(self._with_special)

    def completed(self, tails: list[list[int]]) -> list[bool]:
        """Return for each row whether its text contains one of the strings.

        Args:
            tails: The newest `window` ids of each completion (B rows), or all of them.
        """
        found = [False] * len(tails)
        for strings, skips in ((self._plain, True), (self._with_special, False)):
            if strings:
                texts = self._tokenizer.batch_decode(tails, skip_special_tokens=skips)
                found = [
                    was or any(one in text for one in strings) for was, text in zip(found, texts, strict=True)
                ]
        return found


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the tokens that are left out of a completion's text, and their ids."""
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {**{str(token): int(number) for token, number in named}, **added}


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Return the ids that end a completion: the tokenizer's, and those of the model's generation config."""
    configured = model.generation_config.eos_token_id  # type: ignore[union-attr]
    more = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (tokenizer.eos_token_id, *more) if i is not None})


def stop_tokens(model: nn.Module, tokenizer: Any, sampling: Sampling) -> list[int]:
    """Return all ids that end a completion: `end_tokens`, those of the settings, and stop strings that are one token.

    Args:
        model: A model of transformers, wrapped or not.
        tokenizer: Its tokenizer.
        sampling: The settings.

    Raises:
        ValueError: If the settings name an id that the model does not have.
    """
    size = int(model.config.get_text_config(decoder=True).vocab_size)  # type: ignore[union-attr, operator]
    for number in sampling.stop_token_ids:
        if number >= size:
            raise ValueError(
                f"stop_token_ids={list(sampling.stop_token_ids)}: {number} is no token of the model, whose vocabulary "
                f"has the ids 0 to {size - 1}. Look it up with tokenizer.convert_tokens_to_ids."
            )
    special = special_tokens(tokenizer) if sampling.stop else {}
    whole = [special[text] for text in sampling.stop if text in special]
    return sorted({*end_tokens(model, tokenizer), *sampling.stop_token_ids, *whole})
