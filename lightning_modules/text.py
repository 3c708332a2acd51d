"""From prompts to token ids, and from completions to rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from datamodules.batches import Prompt, TextBatch


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    chat_template: bool,
    limit: int,
    uids: Sequence[int] | None = None,
) -> list[list[int]]:
    """Tokenise prompts, through the chat template where it is on.

    Args:
        tokenizer: A transformers tokenizer.
        prompts: Strings or conversations.
        chat_template: Put strings into the template as one user turn.
        limit: The most tokens that a prompt may have.
        uids: Numbers of the rows in their data set, for messages.

    Returns:
        Token ids of each prompt, unpadded.

    Raises:
        ValueError: If a prompt is empty or too long, or is a conversation while `chat_template` is off.
    """
    texts = [_prompt_text(tokenizer, prompt, chat_template) for prompt in prompts]
    # A chat template writes the special tokens itself.
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=not chat_template)["input_ids"]
    if not chat_template:  # some tokenizers end every text, but the model shall go on here
        end = tokenizer.eos_token_id
        encoded = [ids[:-1] if ids and ids[-1] == end else ids for ids in encoded]
    for i, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
        row = "A row's prompt" if uids is None else f"Row {uids[i]} of the data: its prompt"
        if not ids:
            raise ValueError(f"{row} has no tokens. Remove empty prompts from the data.")
        if len(ids) > limit:
            raise ValueError(
                f"{row} has {len(ids)} tokens; beside its completion only {limit} fit the model's context: "
                f"{text[:60]!r}... Shorten or drop it, or lower max_new_tokens."
            )
    return encoded


def _prompt_text(tokenizer: Any, prompt: Prompt, chat_template: bool) -> str:
    if chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            roles = [turn["role"] for turn in messages]
            raise ValueError(
                f"The model's chat template refuses a prompt with the roles {roles}: {error} Change the "
                "data, or leave out data.system_prompt."
            ) from error
        return text
    if not isinstance(prompt, str):
        raise ValueError(
            "The data holds conversations but chat_template is false. Set chat_template: true, or give "
            "plain string prompts."
        )
    return prompt


def prediction_rows(batch: TextBatch, completions: Sequence[str]) -> list[dict[str, Any]]:
    """Return what `predict` gives for a batch: one dict of `uid`, `prompt` and `completion` per row."""
    rows = zip(batch.uids, batch.prompts, completions, strict=True)
    return [{"uid": uid, "prompt": prompt, "completion": text} for uid, prompt, text in rows]
