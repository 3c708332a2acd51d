"""Hyper-parameters as plain data, so that a checkpoint holds no pickled objects and can be rebuilt."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any


class NotPlainError(TypeError):
    """A value that cannot be written as plain data, such as a lambda."""


def plain(value: Any) -> Any:
    """Write a constructor argument as numbers, strings, lists and dicts that LightningCLI can read back.

    Classes and functions become their import path; configuration objects, partials and objects that keep
    their constructor arguments as attributes become `{"class_path": ..., "init_args": ...}`.

    Args:
        value: An argument of a LightningModule.

    Returns:
        Plain data.

    Raises:
        NotPlainError: If there is no such form (a lambda, a local function).
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, partial):
        return {"class_path": _path(value.func), "init_args": plain(value.keywords)}
    if inspect.isroutine(value) or inspect.isclass(value):
        return _path(value)
    if dataclasses.is_dataclass(value):
        arguments = {
            field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init and getattr(value, field.name) != _default(field)
        }
        return {"class_path": _path(type(value)), "init_args": arguments}
    names = [name for name in inspect.signature(type(value).__init__).parameters if name != "self"]
    if all(name in vars(value) for name in names):
        return {
            "class_path": _path(type(value)),
            "init_args": {name: plain(vars(value)[name]) for name in names},
        }
    raise NotPlainError(f"{value!r} has no plain form")


def plain_hparams(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Apply `plain` to each hyper-parameter and leave out those that have no plain form."""
    result = {}
    for name, value in hparams.items():
        try:
            result[name] = plain(value)
        except NotPlainError:
            continue
    return result


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def _path(item: Any) -> str:
    if "<" in item.__qualname__:
        raise NotPlainError(f"{item.__qualname__} is local to a function and cannot be imported")
    return f"{item.__module__}.{item.__qualname__}"
