"""LoRA's product beside a linear layer of a half-precision base, without float32 copies of activations.

Shapes: N tokens, I and O features of the linear layer, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def lora_linear(
    input_NI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    down_rI: Tensor,
    up_Or: Tensor,
    scaling: float,
) -> Tensor:
    """Return a frozen linear layer's output plus LoRA's: x W' + b + s (x A') B' (arXiv 2106.09685, equation 3).

    In each layer that has an adapter PEFT makes a float32 copy of x, the type of A and B, and keeps it for the backward
    pass: 4 bytes for each feature. Here A and B are turned into the type of x instead, and x is kept once however many
    layers read it. So the products of A and B are rounded to that type, as under autocast; so are gradients of A and
    B before they are turned into the type of A and B and added up in it.

    Args:
        input_NI: x, with any number of axes in front.
        weight_OI: W, of the type of x; it gets no gradient.
        bias_O: b, likewise.
        down_rI: A.
        up_Or: B.
        scaling: s, `lora_alpha / r` or what the variant makes of it.

    Returns:
        The output (N, O), of the type of x.
    """
    if torch.is_grad_enabled():
        outputs = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            input_NI, weight_OI, bias_O, down_rI, up_Or, scaling
        )
    else:  # A token of 32 rows takes as long in autograd's machinery as in both products.
        outputs = _LoraLinear.forward(input_NI, weight_OI, bias_O, down_rI, up_Or, scaling)
    output_NO: Tensor = outputs[0]
    return output_NO


class _LoraLinear(torch.autograd.Function):
    """See `lora_linear`."""

    @staticmethod
    def forward(  # type: ignore[override]
        input_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        down_rI: Tensor,
        up_Or: Tensor,
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        """Return the output and x A'."""
        output_NO = F.linear(input_NI, weight_OI, bias_O)
        low_Nr = F.linear(input_NI, down_rI.to(input_NI.dtype)).flatten(0, -2)
        output_NO.view(-1, output_NO.shape[-1]).addmm_(low_Nr, up_Or.to(low_Nr.dtype).T, alpha=scaling)
        return output_NO, low_Nr

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input_NI, weight_OI, _, down_rI, up_Or, ctx.scaling = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(input_NI, weight_OI, down_rI, up_Or, output[1])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, of_output_NO: Tensor, _: None) -> tuple[Tensor | None, ...]:
        input_NI, weight_OI, down_rI, up_Or, low_Nr = ctx.saved_tensors
        needs_input, _, _, needs_down, needs_up, _ = ctx.needs_input_grad
        of_input_NI = of_down_rI = of_up_Or = None
        flat_NO = of_output_NO.flatten(0, -2)
        of_low_Nr = (flat_NO @ up_Or.to(flat_NO.dtype)).mul_(ctx.scaling)
        if needs_input:
            of_input_NI = of_output_NO @ weight_OI
            of_input_NI.view(-1, of_input_NI.shape[-1]).addmm_(of_low_Nr, down_rI.to(flat_NO.dtype))
        if needs_down:
            of_down_rI = (of_low_Nr.T @ input_NI.flatten(0, -2)).to(down_rI.dtype)
        if needs_up:
            of_up_Or = (flat_NO.T @ low_Nr).to(up_Or.dtype).mul_(ctx.scaling)
        return of_input_NI, None, None, of_down_rI, of_up_Or, None


class LeanLoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer that computes `lora_linear` where that is what it would compute, in float32, by itself."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the layer with its adapter."""
        factors = None if args or kwargs else self.lean_factors(x.dtype, x.device)
        if factors is None:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        base = self.base_layer
        return lora_linear(x, base.weight, base.bias, *factors)

    def lean_factors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, float] | None:
        """Return A, B and s, if `lora_linear` by these does all that the layer does to such an input; else None."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        (name,) = self.active_adapters
        base = self.base_layer
        if (
            name in self.lora_A
            and name not in self.lora_variant
            and dtype in (torch.bfloat16, torch.float16)
            and dtype == base.weight.dtype != self.lora_A[name].weight.dtype
            and not torch.is_autocast_enabled(device.type)
            and self.lora_B[name].bias is None
            and (not self.training or isinstance(self.lora_dropout[name], nn.Identity))
            and not any(parameter.requires_grad for parameter in base.parameters())
            and not (base._forward_hooks or base._forward_pre_hooks)
        ):
            return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        return None


def make_lean(model: nn.Module) -> None:
    """Make each plain LoRA layer of a PEFT model a `LeanLoraLinear`. Names and tensors stay."""
    for module in model.modules():
        # Layers over quantized weights, and those of other kinds of modules, have classes of their own.
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = LeanLoraLinear
