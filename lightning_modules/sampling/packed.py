"""Linear layers whose weights stay as they are while a CPU draws: laid out once for products with few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_modules.lora import LeanLoraLinear

_OPS = torch.ops.mkldnn
_SUPPORTED = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Compute linear layers on a CPU from copies of their weights, which must not change meanwhile.

    A product with 32 rows, a token for each, spends a third of its time on bringing weights into the order that the
    CPU multiplies in; `torch.compile` does so once when it freezes a model, by the operators that are used here. Plain
    LoRA layers keep copies of their factors in half precision too. Outputs are the same to the bit.

    Takes the memory of the linear layers' weights once more. Layers in float32, in a sharded model, with a forward
    function of their own, or of any other class stay as they are, and so do all on a CPU without such products.
    """
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    for module in model.modules():
        if "forward" not in vars(module) and (forward := _packed(module)) is not None:
            forwards[module] = forward
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            del vars(module)["forward"]


def _packed(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    if type(module) is nn.Linear and can_pack(module.weight):
        return _packed_linear(module.weight, module.bias)
    if isinstance(module, LeanLoraLinear) and can_pack(module.base_layer.weight):
        return module.frozen_forward()
    return None


def can_pack(weight: Tensor) -> bool:
    """Return whether torch multiplies by a packed copy of a weight on this machine."""
    supported = _SUPPORTED.get(weight.dtype)
    return (
        supported is not None
        and type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and bool(getattr(_OPS, supported)())
        and not torch.is_autocast_enabled("cpu")
    )


def _packed_linear(weight_OI: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    packed = _OPS._reorder_linear_weight(weight_OI)

    def forward(input_NI: Tensor) -> Tensor:
        output_NO: Tensor = _OPS._linear_pointwise(input_NI, packed, bias_O, "none", [], "")
        return output_NO

    return forward
