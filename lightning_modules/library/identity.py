"""Names a function or object by all that its results depend on, as a part of the key under which they are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def identity_of(encoder: Callable[..., Any]) -> str:
    """Name a function or object by what its results depend on.

    Args:
        encoder: With a method `identity()` of its own; or a function, by its code and what it closes over; or an
            object, by its class and its attributes without underscore, a module by its weights.
    """
    if hasattr(encoder, "identity"):
        return str(encoder.identity())
    if isinstance(encoder, partial):
        arguments = [*encoder.args, *sorted(encoder.keywords.items())]
        return f"{identity_of(encoder.func)} with {[_content_of(value) for value in arguments]}"
    if isinstance(encoder, FunctionType):
        inner = [_content_of(cell.cell_contents) for cell in encoder.__closure__ or ()]
        return f"{encoder.__module__}.{encoder.__qualname__} {_code_of(encoder.__code__)} {inner}"
    if isinstance(encoder, nn.Module):
        facts = [(name, _content_of(tensor)) for name, tensor in encoder.state_dict().items()]
    else:
        held = getattr(encoder, "__dict__", {})
        facts = sorted((name, _content_of(value)) for name, value in held.items() if name[:1] != "_")
    return f"{type(encoder).__module__}.{type(encoder).__qualname__} {facts}"


def _code_of(code: CodeType) -> list[Any]:
    """Return what a function does, without addresses."""
    consts = [_code_of(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return [code.co_code.hex(), code.co_names, *consts]


def _content_of(value: Any) -> str:
    """Return a text that differs where a value differs; of arrays, which print only some numbers, a hash."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().flatten().view(torch.uint8).numpy()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(flat.tobytes()).hexdigest()}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return repr(value)
