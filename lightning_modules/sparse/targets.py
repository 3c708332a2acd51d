"""Which modules a sparse adapter trains, and who else uses their weights."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from lightning_modules.sparse.layers import supported


def find_targets(model: nn.Module, target_modules: list[str] | str) -> list[str]:
    """Return the names of the modules that `target_modules` means.

    Args:
        model: A transformers model.
        target_modules: As `SparseAdapter` takes it.

    Raises:
        ValueError: If nothing matches, or a module is neither a plain linear layer nor an embedding.
    """
    names = dict(model.named_modules())
    if target_modules == "all-linear":
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        found = [n for n, module in names.items() if isinstance(module, nn.Linear) and module is not head]
    elif isinstance(target_modules, str):
        try:
            found = [name for name in names if re.fullmatch(target_modules, name)]
        except re.error as error:
            raise ValueError(
                f"target_modules={target_modules!r} is no regular expression: {error}. {_linears(names)}"
            ) from error
    else:
        missing = [end for end in target_modules if not any(_ends(name, end) for name in names)]
        if missing:
            raise ValueError(f"target_modules: nothing in the model is called {missing}. {_linears(names)}")
        found = [name for name in names if any(_ends(name, end) for end in target_modules)]
    if not found:
        raise ValueError(f"target_modules={target_modules!r} matches nothing in the model. {_linears(names)}")
    for name in found:
        if not supported(names[name]):
            raise ValueError(
                f"target_modules: {name} is a {type(names[name]).__name__}. Sparse adapters train plain "
                "nn.Linear and nn.Embedding weights in floating point that no other adapter or hook has "
                f"taken over. {_linears(names)}"
            )
    return found


def find_users(model: nn.Module, targets: list[str]) -> dict[str, list[nn.Module]]:
    """Return, for each weight of the targets, every module that uses it.

    Args:
        model: The model.
        targets: Names of modules.

    Returns:
        Parameter name, as `model.named_parameters()` has it, to modules; several where weights are tied.

    Raises:
        ValueError: If a tied weight is also used by a module that is not supported.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wanted = {id(model.get_submodule(target).get_parameter("weight")) for target in targets}
    users: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in wanted:
                continue
            if attribute != "weight" or not supported(module):
                raise ValueError(
                    f"target_modules: {names[id(parameter)]} is also {name}.{attribute} of a "
                    f"{type(module).__name__}, through which sparse adapters cannot train."
                )
            users.setdefault(names[id(parameter)], []).append(module)
    return users


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _linears(modules: dict[str, nn.Module]) -> str:
    ends = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)}
    return f"Its linear layers are {', '.join(sorted(ends))}."
