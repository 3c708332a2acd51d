"""From the name of a method to its function."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch

from lightning_modules.merging.elementwise import (
    average,
    breadcrumbs,
    consensus,
    dare,
    overlap_average,
    sign_consistent_average,
    task_arithmetic,
    ties,
)
from lightning_modules.merging.lora import factor_average
from lightning_modules.merging.spectral import iso_c, tsv_m
from lightning_modules.merging.vectors import Delta, TaskVector
from lightning_modules.ranges import check_number

# (experts) -> merged, its options bound
Method = Callable[[Sequence[TaskVector]], Mapping[str, Delta]]

METHODS: dict[str, Callable[..., Mapping[str, Delta]]] = {
    function.__name__: function
    for function in (
        average,
        overlap_average,
        sign_consistent_average,
        task_arithmetic,
        ties,
        dare,
        breadcrumbs,
        consensus,
        iso_c,
        tsv_m,
        factor_average,
    )
}
# These take the LoRA factors of experts; all others take changes.
METHODS_OF_FACTORS = frozenset({factor_average})


def find_method(name: str) -> Callable[..., Mapping[str, Delta]]:
    """Find the function of a method.

    Args:
        name: Of a function here, or the dotted path of a function of the user, as `my_merging.median`.

    Returns:
        A function that takes task vectors, and options as keywords.

    Raises:
        ValueError: If there is none.
    """
    if name in METHODS:
        return METHODS[name]
    module_name, _, function_name = name.rpartition(".")
    if not module_name:
        close = get_close_matches(name, METHODS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"method={name!r} is unknown.{hint} There are {', '.join(METHODS)}; a function of yours is named by "
            "its dotted path, such as my_merging.median."
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that the user's own one imports
        raise ValueError(
            f"method={name!r}: no module {error.name!r} is installed or in this folder."
        ) from None
    function: Any = vars(module).get(function_name)
    if not callable(function):
        raise ValueError(f"method={name!r}: the module {module_name!r} has no function {function_name!r}.")
    return function  # type: ignore[no-any-return]


def check_options(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Check that a function takes these options.

    Args:
        function: A method.
        options: Names and values.

    Raises:
        ValueError: If it does not know one, lacks one, one is out of range, or a default is a number and the value is
            not.
    """
    try:
        known = dict(list(inspect.signature(function).parameters.items())[1:])
    except ValueError as error:
        raise ValueError(f"method: {function!r} is no Python function of task vectors.") from error
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
    kinds_of_many = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = {name: one for name, one in known.items() if one.kind not in kinds_of_many}
    title = getattr(function, "__name__", str(function))
    takes = f"{title} takes {', '.join(named) or 'none'}."
    for name, value in options.items():
        if name not in named:
            if takes_all:
                continue
            raise ValueError(f"options: {title} has no option {name!r}. {takes}")
        default = named[name].default
        if type(default) is float:
            check_number(f"options.{name}", value, hint=f"{default} is usual.")
        elif type(default) is int:
            check_number(f"options.{name}", value, whole=True, hint=f"{default} is usual.")
    missing = [
        name for name, one in named.items() if one.default is inspect.Parameter.empty and name not in options
    ]
    if missing:
        raise ValueError(f"options: {title} needs {', '.join(missing)}. Give --options.{missing[0]} VALUE.")
    if function in METHODS.values() and function not in METHODS_OF_FACTORS:
        function([{"w": torch.zeros(1, 1)}], **options)  # a method checks the ranges of its options
