"""Linear layers whose weights stay as they are while a CPU draws: laid out once for products with few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_modules.lora import LeanLoraLinear

_Forward = Callable[[Tensor], Tensor]

_OPS = torch.ops.mkldnn
_SUPPORTED: dict[torch.dtype, Callable[[], bool]] = {
    torch.bfloat16: lambda: bool(_OPS._is_mkldnn_bf16_supported()),
    torch.float16: lambda: bool(_OPS._is_mkldnn_fp16_supported()),
}


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Compute linear layers on a CPU from copies of their weights, which must not change meanwhile.

    A product with few rows, a token for each, spends much of its time on bringing weights into the order that the CPU
    multiplies in; `torch.compile` does so once when it freezes a model, by the operators that are used here. Plain
    LoRA layers multiply by W and A together. Outputs are those of the plain layers; to the bit, where torch takes the
    same product for those, as it does for contiguous inputs. Gradients are off meanwhile.

    Takes the memory of the linear layers' weights once more. Layers in float32, with a forward function of their own,
    or of any other class stay as they are, and so do all on a CPU without such products.
    """
    forwards: dict[nn.Module, _Forward] = {}
    done: set[nn.Module] = set()  # linear layers that are part of a LoRA layer's forward function
    for module in model.modules():  # a LoRA layer comes before those in it
        if module in done or "forward" in vars(module):
            continue
        if isinstance(module, LeanLoraLinear) and can_pack(module.base_layer.weight):
            weight = module.base_layer.weight
            if (factors := module.lean_factors(weight.dtype, weight.device)) is not None:
                forwards[module] = _packed_lora(weight, module.base_layer.bias, *factors)
                done.update(module.modules())
        elif type(module) is nn.Linear and can_pack(module.weight):
            forwards[module] = _packed_linear(module.weight, module.bias)
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        with torch.no_grad():
            yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


def can_pack(weight: Tensor) -> bool:
    """Return whether torch multiplies by a packed copy of a weight on this machine."""
    supported = _SUPPORTED.get(weight.dtype)
    return (
        supported is not None
        and type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and supported()
        and not torch.is_autocast_enabled("cpu")
    )


def _packed_linear(weight_OI: Tensor, bias_O: Tensor | None) -> _Forward:
    packed = _OPS._reorder_linear_weight(weight_OI)

    def forward(input_NI: Tensor) -> Tensor:
        output_NO: Tensor = _OPS._linear_pointwise(input_NI, packed, bias_O, "none", [], "")
        return output_NO

    return forward


def _packed_lora(
    weight_OI: Tensor, bias_O: Tensor | None, down_rI: Tensor, up_Or: Tensor, scaling: float
) -> _Forward:
    dtype, outputs, r = weight_OI.dtype, len(weight_OI), len(down_rI)
    bias = None if bias_O is None else torch.cat([bias_O, bias_O.new_zeros(r)])
    both = _packed_linear(torch.cat([weight_OI, down_rI.to(dtype)]), bias)
    up_rO = up_Or.to(dtype).T

    def forward(input_NI: Tensor) -> Tensor:
        output_NO, low_Nr = both(input_NI).flatten(0, -2).split([outputs, r], dim=-1)
        return torch.addmm(output_NO, low_Nr, up_rO, alpha=scaling).view(*input_NI.shape[:-1], outputs)

    return forward
