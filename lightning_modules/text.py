"""From prompts to token ids, and from completions to rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from datamodules.batches import Answer, Prompt, TextBatch
from lightning_modules.chat import ChatTemplate

Rendered = TypeVar("Rendered")


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    chat: ChatTemplate | None,
    limits: Sequence[int] | None = None,
    uids: Sequence[int] | None = None,
) -> list[list[int]]:
    """Tokenise prompts, through the chat template where there is one.

    Args:
        tokenizer: A transformers tokenizer.
        prompts: Strings or conversations.
        chat: Puts strings into the template as one user turn; None feeds them as they are.
        limits: The most tokens that each prompt may have; None checks none.
        uids: Numbers of the rows in their data set, for messages.

    Returns:
        Token ids of each prompt, unpadded.

    Raises:
        ValueError: If a prompt is empty or too long, the template refuses it, or it is a conversation while there is
            no template.
    """
    with_rows = list(zip(prompts, _rows(len(prompts), uids), strict=True))
    if chat is None:
        texts = [_plain(prompt) for prompt in prompts]
    else:
        texts = [_named(chat, row, partial(chat.prompt, prompt)) for prompt, row in with_rows]
    # A chat template writes the special tokens itself.
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=chat is None)["input_ids"]
    if chat is None:  # some tokenizers end every text, but the model shall go on here
        end = tokenizer.eos_token_id
        encoded = [ids[:-1] if ids and ids[-1] == end else ids for ids in encoded]
    for i, (text, ids, (_, row)) in enumerate(zip(texts, encoded, with_rows, strict=True)):
        if not ids:
            raise ValueError(f"{row}: its prompt has no tokens. Remove empty prompts from the data.")
        if limits is not None and len(ids) > limits[i]:
            raise ValueError(
                f"{row}: its prompt has {len(ids)} tokens; beside its completion only {limits[i]} fit the model's "
                f"context: {text[:60]!r}... Shorten or drop it, or lower max_new_tokens."
            )
    return encoded


def encode_answers(
    tokenizer: Any,
    answers: Sequence[Answer],
    prompts: Sequence[Prompt] | None = None,
    *,
    chat: ChatTemplate | None,
    uids: Sequence[int] | None = None,
) -> list[list[int]]:
    """Tokenise what answers add to their prompts, the end of the turn included.

    With a template that is the rendered conversation less the rendered prompt, whatever the template writes around an
    answer; without one, the answer and the end token.

    Args:
        tokenizer: A transformers tokenizer.
        answers: Texts, or assistants' messages.
        prompts: The prompt of each answer; None takes one user turn for all, which is the same for templates that
            write an answer alike after any prompt.
        chat: The template.
        uids: Numbers of the rows in their data set, for messages.

    Returns:
        Token ids of each answer, which follow those of `encode_prompts`.

    Raises:
        ValueError: If an answer is empty, the template does not write it after its prompt, or there is no template
            and it is a message, or the tokenizer has no end token.
    """
    rows = _rows(len(answers), uids)
    for answer, row in zip(answers, rows, strict=True):
        if isinstance(answer, str) and not answer.strip():
            raise ValueError(
                f"{row} has an empty answer, so there is nothing to learn from it. Check answer_column, or drop the "
                "row."
            )
    if chat is None:
        return _ended(tokenizer, answers)
    prompts = [_STAND_IN] * len(answers) if prompts is None else prompts
    parts = [
        _named(chat, row, partial(chat.answer, prompt, answer))
        for prompt, answer, row in zip(prompts, answers, rows, strict=True)
    ]

    def ids(texts: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return encoded

    before, whole = ids([prompt for prompt, _ in parts]), ids([prompt + rest for prompt, rest in parts])
    # A tokenizer may join the last characters of a prompt with the first ones of an answer, but at inference the
    # prompt stands alone.
    return [
        together[len(prompt) :] if together[: len(prompt)] == prompt else ids([rest])[0]
        for prompt, together, (_, rest) in zip(before, whole, parts, strict=True)
    ]


_STAND_IN = "?"


def _rows(number: int, uids: Sequence[int] | None) -> list[str]:
    if uids is None:
        return [f"Row {i} of the batch" for i in range(number)]
    return [f"Row {uid} of the data" for uid in uids]


def _named(chat: ChatTemplate, row: str, render: Callable[[], Rendered]) -> Rendered:
    """Render, and name model and row if that fails."""
    try:
        return render()
    except ValueError as error:
        raise ValueError(f"model={chat.source!r}. {row}: {error}") from error


def _plain(prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        raise ValueError(
            "The data holds conversations but chat_template is false. Set chat_template: true, or give "
            "plain string prompts."
        )
    return prompt


def _ended(tokenizer: Any, answers: Sequence[Answer]) -> list[list[int]]:
    """Tokenise texts and end each with the end token."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end token (eos_token), so an answer would have no end. Set one, or chat_template: "
            "true where the template ends turns by itself."
        )
    texts = [answer for answer in answers if isinstance(answer, str)]
    if len(texts) < len(answers):
        raise ValueError("The data has answers with tool calls or reasoning, which need chat_template: true.")
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def prediction_rows(batch: TextBatch, completions: Sequence[str]) -> list[dict[str, Any]]:
    """Return what `predict` gives for a batch: one dict of `uid`, `prompt` and `completion` per row."""
    rows = zip(batch.uids, batch.prompts, completions, strict=True)
    return [{"uid": uid, "prompt": prompt, "completion": text} for uid, prompt, text in rows]
