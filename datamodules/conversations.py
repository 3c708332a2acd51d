"""Conversations in data: messages with tool calls and reasoning, the tools on offer, and the answer at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from datamodules.batches import Answer, Message
from datamodules.values import as_text, kind_of, plain


def read_messages(value: Any) -> list[Message]:
    """Check a conversation and keep all that its messages hold, but for what is null.

    Raises:
        ValueError: It is not a non-empty list of messages with a role and a content, both strings. An assistant's
            message may hold something else, such as tool calls, in place of its content.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"a conversation must be a non-empty list of messages, got {value!r:.80}")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} must be an object with role and content, got {message!r:.80}")
        kept: Message = {
            key: plain(item) for key, item in message.items() if item is not None or key == "content"
        }
        if not isinstance(kept.get("role"), str):
            raise ValueError(f"message {number} needs a string 'role', got {kept.get('role')!r:.80}")
        content = kept.get("content")
        if not isinstance(content, str) and not (
            content is None and kept["role"] == "assistant" and holds_more(kept)
        ):
            raise ValueError(f"message {number} needs a string 'content', got {content!r:.80}")
        calls = kept.get("tool_calls", [])
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise ValueError(
                f"message {number}: 'tool_calls' must be a list of objects, got {kind_of(calls)}"
            )
        messages.append(kept)
    return messages


def holds_more(message: Mapping[str, Any]) -> bool:
    """Return whether a message holds something besides its role and content."""
    return any(item for key, item in message.items() if key not in ("role", "content"))


def is_message(value: Any) -> bool:
    """Return whether a value is a message rather than another struct."""
    return isinstance(value, Mapping) and isinstance(value.get("role"), str)


def holds_message(value: Any) -> bool:
    """Return whether a value is a message, or a list with one in it."""
    return is_message(value) or (isinstance(value, list | tuple) and any(map(is_message, value)))


def split_conversation(value: Any) -> tuple[list[Message], Answer]:
    """Split a conversation into what precedes its last message, and that assistant message.

    Raises:
        ValueError: The conversation is malformed, or does not end with one assistant message after a prompt.
    """
    messages = read_messages(value)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message must be the assistant's, not of role {messages[-1]['role']!r}")
    if len(messages) == 1:
        raise ValueError("there is no message before the assistant's, so there is no prompt")
    if messages[-2]["role"] == "assistant":
        raise ValueError(
            f"messages {len(messages) - 1} and {len(messages)} are both the assistant's, so that the last would go "
            "on where the one before it ends: join the two, or put what came between them"
        )
    return messages[:-1], _answer_of(messages[-1])


def read_answer(value: Any, what: str) -> Answer:
    """Read a gold answer: text or a number, the first of a list of these, or one assistant message.

    Args:
        value: The value.
        what: What it is, for messages.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(value, list | tuple):
        if holds_message(value):
            if len(value) > 1:
                raise ValueError(
                    f"{what} holds {len(value)} messages, but an answer is one: put the whole conversation into one "
                    "column and name it by messages_column"
                )
            value = value[0]
        else:
            texts = [as_text(plain(one), what) for one in value]
            value = texts[0] if texts else None
    if value is None:
        raise ValueError(f"{what} holds no answer; answer_column=None needs none")
    if not is_message(value):
        return as_text(value, what)
    [message] = read_messages([value])
    if message["role"] != "assistant":
        raise ValueError(f"{what} holds a message of role {message['role']!r}, not the assistant's")
    return _answer_of(message)


def _answer_of(message: Message) -> Answer:
    """Return an assistant's message as text, if text is all that it holds."""
    if holds_more(message):
        return message
    content: str = message["content"]
    if not content.strip():
        raise ValueError("the assistant's message, which is the answer, is empty: complete or drop the row")
    return content


def read_tools(value: Any, what: str) -> list[dict[str, Any]]:
    """Read the tools that a row offers: a list of schemas, or the same as JSON text.

    Args:
        value: The value; null, or an empty list or text, offers none.
        what: What it is, for messages.

    Raises:
        ValueError: If it is something else.
    """
    if isinstance(value, str) and value.strip():
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not value:
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(one, Mapping) for one in value):
        raise ValueError(
            f"{what} must hold a list of tool schemas, got {kind_of(value)}; set tools_column: null if it is about "
            "something else"
        )
    return [dict(one) for one in value]
