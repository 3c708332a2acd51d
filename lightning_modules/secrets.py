"""Finds API keys, tokens and passwords, so that none reaches a file, a log or W&B."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

REDACTED = "<secret, left out>"

# A shorter value would be found in innocent text: a password of 1234 in every number.
_SHORTEST = 8
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_SINGLE = {
    "apikey", "auth", "authorization", "bearer", "credential", "credentials", "passphrase", "passwd", "password",
    "passwords", "secret", "secrets",
}  # fmt: skip
_BEFORE_KEY = {"access", "account", "api", "auth", "encryption", "private", "secret", "service", "signing"}
# Tokens of a tokenizer are no secrets.
_BEFORE_TOKEN = {
    "additional", "audio", "begin", "bos", "boundary", "cls", "end", "eos", "extra", "image", "mask", "new", "next",
    "pad", "per", "sep", "special", "start", "stop", "think", "unk", "video",
}  # fmt: skip
# Keys that are known by their form: Hugging Face, OpenAI and its like, GitHub, GitLab, AWS, Slack; and a password
# inside an address.
_FORMS = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|"
    r"github_pat_[A-Za-z0-9_]{30,}|glpat-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16}|xox[abprs]-[A-Za-z0-9-]{20,})"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_NAME = re.compile(r"""([\w.-]+)["']?\s*[:=]\s*["']?""")
_VALUE = re.compile(r"""(?:(?:Bearer|Basic) )?[^\s"',;}\]]+""")
# Values that the configuration of this process gave as secrets; messages may quote them anywhere.
_remembered: set[str] = set()


def is_secret_name(name: str) -> bool:
    """Tell whether a value of this name is a secret.

    Args:
        name: A key of a configuration, a parameter, a header, or a variable.

    >>> [is_secret_name(name) for name in ("api_key", "hf_token", "x-api-key", "clientSecret", "HF_TOKEN")]
    [True, True, True, True, True]
    >>> [is_secret_name(name) for name in ("max_new_tokens", "eos_token", "pad_token_id", "sort_key", "tokenizer")]
    [False, False, False, False, False]
    """
    words = [word.lower() for word in _WORDS.findall(name)]
    while words and (words[-1].isdigit() or words[-1] in ("value", "string")):
        words.pop()
    if not words:
        return False
    *before, last = words
    if last == "token":
        return not before or before[-1] not in _BEFORE_TOKEN
    if last in ("key", "keys"):
        return bool(before) and before[-1] in _BEFORE_KEY
    return last in _SINGLE or words[-3:] == ["access", "key", "id"]


def environment_secrets(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the values of environment variables that are secrets by their name.

    Args:
        environment: By default that of the process.
    """
    variables = os.environ if environment is None else environment
    return [
        value
        for name, value in variables.items()
        if len(value) >= _SHORTEST and (is_secret_name(name) or name.upper().endswith(("_KEY", "_PAT")))
    ]


def secrets_in(value: Any) -> list[str]:
    """Return the secrets of nested plain data: what stands under a secret's name.

    >>> secrets_in({"rewards": [{"init_args": {"api_key": "sk-1234567890", "scale": 2}}]})
    ['sk-1234567890']
    """
    return list(_secrets(value, hidden=False))


def secrets_in_yaml(text: str) -> list[str]:
    """Return the secrets of a YAML text; none where it is no YAML."""
    try:
        return secrets_in(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, RecursionError):
        return []


def secrets_in_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the secrets of a command line.

    >>> secrets_in_arguments(["fit", "--model.api_key=abc", "--model.model_kwargs", "{token: def}"])
    ['abc', 'def']
    """
    found = []
    option = ""
    for argument in arguments:
        if argument.startswith("-"):
            option, _, value = argument.partition("=")
        else:
            value = argument
        name = option.rsplit(".", 1)[-1].strip("-+")
        found += [value] if value and is_secret_name(name) else secrets_in_yaml(value)
    return found


def redacted_yaml(text: str) -> str:
    """Replace the secrets in a YAML text. One without secrets stays as it is."""
    content = yaml.safe_load(text)
    shown = redacted(content)
    if shown == content:
        return text
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    return header + yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def remember(values: Iterable[str]) -> None:
    """Let `redact` know secrets of this process that are in no environment variable.

    Args:
        values: Those of a configuration, by `secrets_in`.
    """
    _remembered.update(value for value in values if len(value) >= _SHORTEST and value != REDACTED)


def redact(text: str, secrets: Iterable[str] | None = None) -> str:
    """Replace the secrets in a text.

    Args:
        text: Any.
        secrets: Values to look for; by default those of the environment and of this process's configuration.

    >>> redact("key=planted-secret-1", ["planted-secret-1"])
    'key=<secret, left out>'
    """
    values = _known() if secrets is None else set(secrets)
    for value in sorted(values, key=len, reverse=True):  # one may hold another
        text = text.replace(value, REDACTED)
    return _FORMS.sub(REDACTED, text)


def redact_message(text: str) -> str:
    """Replace the secrets in a message, those too that stand after a secret's name: `api_key: VALUE`.

    >>> redact_message("cannot read api_key: abc, seed: 1")
    'cannot read api_key: <secret, left out>, seed: 1'
    """
    text = redact(text)
    shown, done = "", 0
    for name in _NAME.finditer(text):
        value = _VALUE.match(text, name.end())
        if value and name.end() >= done and is_secret_name(name[1].rsplit(".", 1)[-1]):
            shown += text[done : value.start()] + REDACTED
            done = value.end()
    return shown + text[done:]


def redacted(value: Any) -> Any:
    """Replace the secrets in nested plain data, by their names and by `redact`.

    >>> redacted({"url": "https://me:pass@host", "token": "abc", "max_new_tokens": 3})
    {'url': 'https://<secret, left out>@host', 'token': '<secret, left out>', 'max_new_tokens': 3}
    """
    return _redacted(value, _known() | set(secrets_in(value)), hidden=False)


def redact_strings(value: Any) -> Any:
    """Replace the secrets in every string of nested plain data, whatever its name: rows of a user's data, say."""
    return _redacted(value, _known(), hidden=False, names=False)


def without_secrets(value: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Leave the secrets of nested plain data out.

    Args:
        value: Constructor arguments as plain data.

    Returns:
        The data without the keys whose value is a secret, or a list with one; and the paths of those keys.

    >>> without_secrets({"rewards": [{"class_path": "a.B", "init_args": {"api_key": "abc"}}], "n": 2})
    ({'rewards': [{'class_path': 'a.B', 'init_args': {}}], 'n': 2}, ['rewards.0.init_args.api_key'])
    """
    left_out: list[str] = []
    kept: dict[str, Any] = _kept(value, redacted(value), "", left_out)
    return dict(kept), left_out  # a copy also where there is no secret


def secret_places(value: Any, path: str = "") -> list[str]:
    """Return where nested plain data holds `REDACTED`, as dotted paths."""
    if isinstance(value, str):
        return [path] if REDACTED in value else []
    return [
        place for key, item in _items(value) for place in secret_places(item, f"{path}.{key}".lstrip("."))
    ]


def _known() -> set[str]:
    return {*environment_secrets(), *_remembered}


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()


def _kept(value: Any, shown: Any, path: str, left_out: list[str]) -> Any:
    """Return what of `value` may be shown, given its redacted form."""
    if value == shown:
        return value
    if not isinstance(value, Mapping):  # a list of mappings; `_is_changed` saw to it
        pairs = enumerate(zip(value, shown, strict=True))
        return [_kept(one, other, f"{path}{i}.", left_out) for i, (one, other) in pairs]
    kept = {}
    for key, item in value.items():
        if _is_changed(item, shown[key]):
            left_out.append(f"{path}{key}")
        else:
            kept[key] = _kept(item, shown[key], f"{path}{key}.", left_out)
    return kept


def _is_changed(value: Any, shown: Any) -> bool:
    """Whether a secret is the value itself, or an entry of a list, which has no name to leave out."""
    if isinstance(value, Mapping):
        return False
    if isinstance(value, list | tuple):
        return any(_is_changed(one, other) for one, other in zip(value, shown, strict=True))
    return bool(value != shown)


def _secrets(value: Any, *, hidden: bool) -> Iterator[str]:
    if hidden and isinstance(value, str) and value:
        yield value
    for key, item in _items(value):
        yield from _secrets(item, hidden=hidden or (isinstance(key, str) and is_secret_name(key)))


def _redacted(value: Any, secrets: set[str], *, hidden: bool, names: bool = True, number: bool = True) -> Any:
    """Redact nested data: strings, and numbers where `number`, wholly where `hidden`."""
    if isinstance(value, Mapping):
        shown = {}
        for key, item in value.items():
            own = hidden or (names and is_secret_name(str(key)))
            is_count = str(key).endswith("token")  # a token that is a number is one of a tokenizer
            shown[key] = _redacted(item, secrets, hidden=own, names=names, number=not is_count)
        return shown
    if isinstance(value, list | tuple):
        return [_redacted(item, secrets, hidden=hidden, names=names, number=number) for item in value]
    if isinstance(value, str):
        return (
            REDACTED if hidden and value else redact(value, (one for one in secrets if len(one) >= _SHORTEST))
        )
    # YAML makes a number of a password of digits.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return REDACTED if hidden and number and is_number else value
