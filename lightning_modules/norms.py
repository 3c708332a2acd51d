"""RMS norm that keeps its input for the backward pass, not the float32 tensors on the way.

Shapes: N tokens, H features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def rms_norm(input_NH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """Return w x / sqrt(mean(x^2) + epsilon) (arXiv 1910.07467, equation 4), computed as transformers' Llama does.

    The quotient is made in float32 and rounded to the type of x before w multiplies it. The output is that of
    transformers to the bit; gradients are equal to rounding. Autograd would keep x in float32; here x itself is kept,
    which in half precision is half of that, and the backward pass goes over it in fewer steps. Torch's own
    `rms_norm` rounds at another place, so a model would no longer compute what transformers does.

    Args:
        input_NH: x, with any number of axes in front.
        weight_H: w.
        epsilon: Added to the mean square.

    Returns:
        The output (N, H).
    """
    output_NH: Tensor
    if torch.is_grad_enabled():
        output_NH, _ = _RMSNorm.apply(input_NH, weight_H, epsilon)  # type: ignore[no-untyped-call]
    else:  # half of the time for the few tokens of a decoding step goes into autograd's machinery
        output_NH, _ = _RMSNorm.forward(input_NH, weight_H, epsilon)
    return output_NH


class _RMSNorm(torch.autograd.Function):
    """See `rms_norm`."""

    @staticmethod
    def forward(input_NH: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the output and the factor of each token."""
        wide_NH = input_NH.to(torch.float32, copy=True)
        factor_N1 = wide_NH.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        return weight_H * wide_NH.mul_(factor_N1).to(input_NH.dtype), factor_N1

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:2], output[1])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, of_output_NH: Tensor, _: None) -> tuple[Tensor | None, ...]:
        input_NH, weight_H, factor_N1 = ctx.saved_tensors
        needs_input, needs_weight, _ = ctx.needs_input_grad
        normed_NH = input_NH.to(torch.float32, copy=True).mul_(factor_N1)
        of_input_NH = of_weight_H = None
        if needs_weight:
            products_NH = of_output_NH * normed_NH.to(input_NH.dtype)
            of_weight_H = products_NH.flatten(0, -2).sum(0).to(weight_H.dtype)
        if needs_input:
            of_normed_NH = (of_output_NH * weight_H).to(input_NH.dtype).to(torch.float32, copy=True)
            # What a step along x would add to all features is taken out: it leaves the norm as it is.
            along_N1 = (of_normed_NH * normed_NH).mean(-1, keepdim=True)
            of_input_NH = of_normed_NH.addcmul_(normed_NH, along_N1, value=-1).mul_(factor_N1)
            of_input_NH = of_input_NH.to(input_NH.dtype)
        return of_input_NH, of_weight_H, None


class LeanRMSNorm(nn.Module):
    """A norm of transformers that computes `rms_norm`."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the norm of hidden states, of any shape that ends with the features."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def make_norms_lean(model: nn.Module) -> None:
    """Make each norm that computes what Llama's does a `LeanRMSNorm`. Names and tensors stay.

    Transformers copies the norm of Llama into most architectures; those copies are known by their compiled code, so
    that one which adds 1 to the weight, or rounds at another place, stays as it is.
    """
    for module in model.modules():
        if _code_of(type(module)) == _code_of(LlamaRMSNorm):
            module.__class__ = LeanRMSNorm


def _code_of(kind: type[nn.Module]) -> tuple[Any, ...] | None:
    code = getattr(kind.forward, "__code__", None)
    return code and (code.co_code, code.co_consts, code.co_names, code.co_varnames)
