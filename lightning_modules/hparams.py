"""Hyper-parameters as plain data, so that a checkpoint holds no pickled objects and can be rebuilt."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from lightning_modules.secrets import without_secrets


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
        NotPlainError: If there is no such form (a lambda, a bound method, a partial with positional
            arguments, an object that does not keep its arguments).
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
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")  # the form that transformers takes
    if isinstance(value, partial) and not value.args:
        return {"class_path": _path(value.func), "init_args": plain(value.keywords)}
    if inspect.isclass(value) or inspect.isfunction(value) or inspect.isbuiltin(value):
        return _path(value)
    if dataclasses.is_dataclass(value) and _parameters(value) == {
        field.name for field in dataclasses.fields(value) if field.init
    }:
        arguments = {
            field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init and getattr(value, field.name) != _default(field)
        }
        return {"class_path": _path(type(value)), "init_args": arguments}
    names = _parameters(value)
    attributes = getattr(value, "__dict__", {})
    keeps_arguments = names <= attributes.keys() and not dataclasses.is_dataclass(value)
    # Without a constructor of its own, only a callable object (a reward) is known to be whole without one.
    is_whole = bool(names) or (callable(value) and not isinstance(value, partial | MethodType))
    if keeps_arguments and is_whole:
        arguments = {name: plain(attributes[name]) for name in sorted(names)}
        return {"class_path": _path(type(value)), "init_args": arguments}
    raise NotPlainError(f"{value!r} has no plain form")


def plain_hparams(hparams: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Apply `plain` to each hyper-parameter, and leave secrets such as API keys out.

    Returns:
        The plain ones, and the names of those that have no plain form or are secrets. A secret inside of an
        argument has a dotted name, `model_kwargs.token`.
    """
    result, left_out = {}, []
    for name, value in hparams.items():
        try:
            result[name] = plain(value)
        except NotPlainError:
            left_out.append(name)
    shown, secrets = without_secrets(result)
    return shown, [*left_out, *secrets]


def withhold_secrets(module: Any) -> None:
    """Take secrets out of the hyper-parameters that a module's checkpoints and loggers show.

    The module itself keeps them. A checkpoint of a `CausalLMModule` names what it lacks.

    Args:
        module: A LightningModule or LightningDataModule.
    """
    for name in ("_hparams", "_hparams_initial"):  # Lightning logs one and saves the other
        hparams = vars(module).get(name)
        if isinstance(hparams, dict):
            shown, secrets = without_secrets(hparams)
            hparams.clear()
            hparams.update(shown)
            if name == "_hparams" and hasattr(module, "left_out"):
                module.left_out = [*module.left_out, *secrets]


def _parameters(value: object) -> set[str]:
    """Names of the constructor's parameters."""
    if type(value).__init__ is object.__init__:
        return set()
    return set(inspect.signature(type(value).__init__).parameters) - {"self"}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def _path(item: Any) -> str:
    if "<" in item.__qualname__:
        raise NotPlainError(f"{item.__qualname__} is local to a function and cannot be imported")
    return f"{item.__module__}.{item.__qualname__}"
