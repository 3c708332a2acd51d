"""Forward passes of layers whose weight is trained in part. Torch alone.

Shapes: T rows of all dimensions but the last one flattened; L rows or columns of the weight that are trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_modules.sparse.weight import SparseWeight


def supported(module: nn.Module) -> bool:
    """Return whether a module's use of its weight is known here, and the weight can be written in place.

    Not so where something else has replaced the module's forward already, another sparse adapter say.
    """
    weight = getattr(module, "weight", None)
    if type(module).forward not in FORWARDS or "forward" in vars(module) or not isinstance(weight, Tensor):
        return False
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return False
    return weight.is_floating_point() and weight.is_contiguous()


def with_gradient(owner: SparseWeight) -> Tensor:
    """Return the weight to compute with, whose whole gradient is made and gathered at the trained entries."""
    weight = owner.sum() if owner.trains_all else owner.weight
    return _Weight.apply(owner.values, weight, owner)  # type: ignore[no-untyped-call, no-any-return]


class _Weight(torch.autograd.Function):
    """Hands out a weight."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, owner: SparseWeight) -> Tensor:  # noqa: ARG004
        ctx.owner = owner
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.owner.gather(gradient), None, None


class _AllLinear(torch.autograd.Function):
    """A linear layer with weight + values, which the backward pass adds again, so that no sum is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, owner: SparseWeight) -> Tensor:  # noqa: ARG004
        ctx.owner = owner
        ctx.save_for_backward(x)
        return F.linear(x, owner.sum().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        weight = ctx.owner.sum().to(x.dtype)
        of_values = ctx.owner.gather(_rows(gradient).T @ _rows(x))
        return *_of_input_and_bias(ctx, gradient, weight, of_values), None


class _LinesLinear(torch.autograd.Function):
    """A linear layer of which whole rows or columns are trained: the gradient of no other entry is made."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,  # noqa: ARG004
        bias: Tensor | None,
        weight: Tensor,
        lines_L: Tensor,
        dim: int,
    ) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(x, weight, lines_L)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, lines_L = ctx.saved_tensors
        gradient_TO, x_TI = _rows(gradient), _rows(x)
        if ctx.dim == 0:
            gradient_TO = gradient_TO.index_select(1, lines_L)
        else:
            x_TI = x_TI.index_select(1, lines_L)
        of_values = (gradient_TO.T @ x_TI).float().flatten()
        return *_of_input_and_bias(ctx, gradient, weight.to(x.dtype), of_values), None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _of_input_and_bias(ctx: Any, gradient: Tensor, weight: Tensor, of_values: Tensor) -> tuple[Any, ...]:
    needs_x, _, needs_bias, *_ = ctx.needs_input_grad
    of_x = gradient @ weight if needs_x else None
    of_bias = _rows(gradient).sum(0) if needs_bias else None
    return of_x, of_values, of_bias


def _linear(owner: SparseWeight, module: nn.Linear, x: Tensor) -> Tensor:
    lines = owner.lines
    if owner.is_off or not torch.is_grad_enabled() or (lines is None and not owner.trains_all):
        return F.linear(x, owner.effective(), module.bias)
    bias: Tensor | None = module.bias
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if lines is None:
        return _AllLinear.apply(x, owner.values, bias, owner)  # type: ignore[no-untyped-call, no-any-return]
    return _LinesLinear.apply(x, owner.values, bias, owner.weight, lines, owner.line_dim)  # type: ignore[no-untyped-call, no-any-return]


def _embedding(owner: SparseWeight, module: nn.Embedding, ids: Tensor) -> Tensor:
    return F.embedding(ids, owner.effective(), module.padding_idx)


# By the forward function, not the class: a quantised layer is a Linear whose forward is another one.
FORWARDS: dict[Any, Any] = {nn.Linear.forward: _linear, nn.Embedding.forward: _embedding}
