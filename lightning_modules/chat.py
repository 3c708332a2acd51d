"""A model's own chat template: the text of a conversation, and what of a conversation it leaves out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2.meta
import jinja2.nodes
from jinja2 import Environment, TemplateError
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.batches import Answer, Message, Prompt, split_tools

# What a template is given anyway: the data's, and functions of transformers.
_GIVEN = frozenset(
    {
        "messages",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "raise_exception",
        "strftime_now",
    }
)
# What of a message is text that the model should see. transformers hands all names of reasoning to the template.
_REASONING = ("reasoning_content", "reasoning", "thinking")
_SPOKEN = frozenset({"tool_calls", "function_call", "tools", *_REASONING})
# What links messages to each other; templates rarely write it.
_LINKS = frozenset({"role", "content", "name", "tool_call_id", "id"})
_EMPTY_BLOCK = re.compile(r"<(\w+)>\s*</\1>\s*$")
_PROBE = "7391048265"  # survives upper(), trim, tojson and from_json


class ChatTemplate:
    """Renders conversations by a tokenizer's template, and refuses those of which it would lose something.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        settings: Further variables of the template, such as `enable_thinking`.
        source: Where the model comes from, for messages.

    Raises:
        ValueError: If the template does not read one of `settings`, or is malformed.
    """

    def __init__(self, tokenizer: Any, settings: Mapping[str, Any] | None = None, source: str = "") -> None:
        self._tokenizer = tokenizer
        self.source = source
        self._settings = dict(settings or {})
        self._seen: set[tuple[str, bool]] = set()
        self._warned: set[str] = set()
        templates = tokenizer.chat_template
        sources = templates.values() if isinstance(templates, dict) else [templates]
        try:
            read = frozenset[str]().union(*map(_variables, sources))
        except TemplateError as error:
            raise ValueError(f"model={source!r}: its chat template is malformed: {_line(error)}") from error
        known = read - _GIVEN - set(tokenizer.special_tokens_map)
        for name in self._settings:
            if name in ("messages", "tools"):
                raise ValueError(f"chat_template_kwargs.{name}: the data says that. Leave it out.")
            if name not in known:
                raise ValueError(
                    f"chat_template_kwargs.{name}: the chat template of model={source!r} does not read it. It reads: "
                    f"{', '.join(sorted(known)) or 'no setting'}."
                )

    def prompt(self, prompt: Prompt) -> str:
        """Return the text after which the model writes: a new turn, or the rest of an assistant's last one.

        Args:
            prompt: A conversation, or the content of a user's turn.

        Raises:
            ValueError: If the template refuses the conversation or leaves something of it out.
        """
        messages = as_messages(prompt)
        text = self._render(messages, continues=ends_open(prompt))
        self._check(messages, text, continues=ends_open(prompt))
        return text

    def answer(self, prompt: Prompt, answer: Answer) -> tuple[str, str]:
        """Return the text of a prompt, and what the answered conversation adds to it, the end of the turn included.

        An empty block such as `<think></think>` at the end of the prompt may be missing in the conversation.

        Args:
            prompt: A conversation, or the content of a user's turn.
            answer: What the assistant says, or the rest of it where the prompt ends within an assistant's turn.

        Raises:
            ValueError: If the template refuses the conversation, leaves something of it out, or does not write the
                prompt's text in front of it.
        """
        messages = as_messages(prompt)
        message: Message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
        before = self._render(messages, continues=ends_open(prompt))
        if ends_open(prompt):
            *messages, opened = messages
            message = {**opened, **message, "content": opened["content"] + (message.get("content") or "")}
        whole = [*messages, message]
        text = self._render(whole)
        self._check(whole, text)
        written = before
        if not text.startswith(before) and (block := _EMPTY_BLOCK.search(before)):
            # The generation prompt says that there is no reasoning, and the template does not repeat that in what
            # was said: the model meets the block, then the answer.
            written = before[: block.start()]
        if not text.startswith(written):
            same = next((i for i, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), len(text))
            raise ValueError(
                f"the model's chat template ends the prompt with {before[same:][:60]!r}, but writes the answer as "
                f"{text[same:][:60]!r}, so the model would be trained on what it never meets. Give answers that begin "
                "as the prompt ends, or set chat_template_kwargs (such as enable_thinking) so that both agree."
            )
        rest = text[len(written) :]
        if not rest.strip() or (self._loses_words(message, text) and self._render_empty(whole) == text):
            raise ValueError("the model's chat template writes nothing of the answer. Drop the row.")
        return before, rest

    # ------------------------------------------------------------------ rendering

    def _render(self, messages: Sequence[Message], *, continues: bool | None = None) -> str:
        """Render a conversation; `continues` None closes it, False opens a turn, True goes on with the last one."""
        bare, tools = split_tools(messages)
        if continues and (bare[-1].get("tool_calls") or not (bare[-1].get("content") or "").strip()):
            raise ValueError(
                "the prompt ends with an assistant's message that has tool calls or no text, so there is nothing to go "
                "on with. Leave it out, or add what followed it, such as the message of role 'tool'."
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                bare,
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=continues is False,
                continue_final_message=bool(continues),
                **self._settings,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = [turn["role"] for turn in messages]
            raise ValueError(
                f"the model's chat template refuses a conversation with the roles {roles}: {_line(error)}. Change the "
                "data, or leave out data.system_prompt."
            ) from error
        return text

    def _check(self, messages: Sequence[Message], text: str, *, continues: bool | None = None) -> None:
        """Refuse a conversation of which the template leaves something out."""
        source = self._tokenizer.get_chat_template(None, messages[0].get("tools") or None)
        names = _names(source)
        for number, message in enumerate(messages):
            for key, value in message.items():
                aliases = _REASONING if key in _REASONING else (key,)
                if value and key not in _LINKS and not names.intersection(aliases):
                    self._check_key(messages, number, key, continues)
            self._check_content(messages, number, text)

    def _check_key(self, messages: Sequence[Message], number: int, key: str, continues: bool | None) -> None:
        """Look whether the template writes a key that it does not name: it may write all of a message."""
        without = [dict(message) for message in messages]
        del without[number][key]
        if self._render(without, continues=continues) != self._render(messages, continues=continues):
            return
        if key in _SPOKEN:
            where = "" if key == "tools" else f" of message {number + 1} ({messages[number]['role']})"
            raise ValueError(
                f"the model's chat template does not read {key!r}{where}, so the model would never see it. Leave it "
                "out of the data, or use a model whose template does."
                + (" tools_column: null ignores a column of that name." if key == "tools" else "")
            )
        self._warn(
            key, f"The model's chat template does not read {key!r} of messages, so the model never sees it."
        )

    def _check_content(self, messages: Sequence[Message], number: int, text: str) -> None:
        """Refuse roles whose messages the template skips. A probe in place of the content shows it."""
        message = messages[number]
        content, place = message.get("content"), (message["role"], number == 0)
        if not content or not content.strip() or (place in self._seen and content.strip() in text):
            return
        probed = [*messages[:number], {**message, "content": _PROBE}, *messages[number + 1 :]]
        try:
            written = _PROBE in self._render(probed)
        except ValueError:  # a template may ask more of a text than a probe can give
            written = content.strip() in text
        if written:
            self._seen.add(place)
        elif message["role"] != "assistant":
            raise ValueError(
                f"the model's chat template leaves out message {number + 1}, of role {message['role']!r}, so the model "
                "would never see it. Put its text into another message, or drop it (data.system_prompt: null)."
            )
        elif number + 1 < len(messages):
            self._warn(
                "content",
                "The model's chat template leaves out what the assistant says beside its tool calls.",
            )

    def _loses_words(self, message: Message, text: str) -> bool:
        """Return whether words of an answer are not in the text, with a warning; refuse it if a tool call is not."""
        for call in message.get("tool_calls") or []:
            function = call.get("function", call)
            name = function.get("name") if isinstance(function, Mapping) else None
            if not name or name not in text:
                raise ValueError(
                    f"the model's chat template does not write the answer's call of {name!r}, so there is nothing to "
                    "learn from it. Drop the row, or use a model whose template writes tool calls."
                )
        parts = [message.get(key) for key in ("content", *_REASONING)]
        lost = [
            part
            for part in parts
            if isinstance(part, str) and "".join(part.split()) not in "".join(text.split())
        ]
        if lost:
            self._warn(
                "answer",
                f"The model's chat template leaves out a part of answers, such as of {lost[0][:60]!r}: what it leaves "
                "out is not trained.",
            )
        return bool(lost)

    def _render_empty(self, whole: Sequence[Message]) -> str:
        """Render a conversation whose answer says nothing."""
        return self._render([*whole[:-1], {"role": "assistant", "content": ""}])

    def _warn(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            rank_zero_warn(message)


def as_messages(prompt: Prompt) -> list[Message]:
    """Return a prompt as a conversation: a string is a user's turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def ends_open(prompt: Prompt) -> bool:
    """Return whether a prompt ends within an assistant's turn, with which the model goes on."""
    return not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def _parse(source: str) -> jinja2.nodes.Template:
    # transformers' own tag, which marks what an assistant says.
    plain = re.sub(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}", r"{#\1 \2#}", source)
    return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)


@lru_cache
def _variables(source: str) -> frozenset[str]:
    """Return the variables that a template takes from outside."""
    return frozenset(jinja2.meta.find_undeclared_variables(_parse(source)))


@lru_cache
def _names(source: str) -> frozenset[str]:
    """Return what a template may look up in a message: attributes, keys, and variables."""
    tree = _parse(source)
    attributes = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    texts = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return frozenset(attributes | texts | {node.name for node in tree.find_all(jinja2.nodes.Name)})
