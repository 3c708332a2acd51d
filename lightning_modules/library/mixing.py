"""What several experts of a layer do together: the mixture of their outputs, or of their factors.

Shapes: B rows, S positions, E experts, k of them chosen, H heads, r rank. An expert adds B_e A_e x; each expert's
alpha / r is in its B.

Two functions go under the name of "mixture of LoRAs":

- output mixing, sum_e w_e B_e A_e x: the mixture of the experts' changes (PEFT's Arrow, Phatgoose);
- factor mixing, (sum_e w_e B_e)(sum_e w_e A_e) x, with cross terms w_i w_j B_i A_j (Polytropon, MHR, and the
  default of Arrow's paper, arXiv 2405.11157).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_modules.library.dispatch import Dispatch, dispatch

_FEW_FLOAT32, _FEW = 128, 512  # E r; measured on a server CPU, whose bfloat16 products are fast


@dataclass(frozen=True)
class Routing:
    """What a router decided for one layer.

    Attributes:
        weight: The weight of each chosen expert: (k) for every token alike, (B, k) per row, (B, S, k) per token.
            For all experts in their order k is E. (B, H, E) with `heads`.
        index: The chosen experts, int64, of the same shape; None for all experts in their order.
        heads: Whether `weight` is per row and head, a head being one of H equal parts of the layer's inputs and
            of its outputs (MHR, arXiv 2211.03831). Factor mixing only.
    """

    weight: Tensor
    index: Tensor | None = None
    heads: bool = False


Mixing: TypeAlias = Callable[[Tensor, Tensor, Tensor, Routing], Tensor]
"""`(x (B, S, in), A (E, r, in), B (E, out, r), routing) -> (B, S, out)`"""


def output_mixing(x: Tensor, A: Tensor, B: Tensor, routing: Routing) -> Tensor:
    """Return sum_e w_e B_e A_e x.

    Args:
        x: (B, S, in).
        A: (E, r, in).
        B: (E, out, r).
        routing: Experts and weights.

    Returns:
        (B, S, out).

    Raises:
        ValueError: If the routing is per head, which has no meaning for outputs.
    """
    if routing.heads:
        raise ValueError("mixing=output_mixing: heads mix parts of the factors. Use factor_mixing.")
    routing = _with_all(routing, x, A)
    weight = routing.weight.to(x.dtype)
    if routing.index is None:  # two products for all experts together
        codes = (x @ A.flatten(0, 1).T).unflatten(-1, A.shape[:2]) * _spread(weight, x)[..., None]
        mixed: Tensor = codes.flatten(-2) @ _wide(B)
        return mixed
    if _by_token(routing, x, A):
        sent, weight_P = _send(x, routing, len(A))
        codes = sent.down(x.flatten(0, -2), A) * weight_P
        return sent.up(codes, B).view(*x.shape[:-1], -1)
    own_A, own_B = A[routing.index], B[routing.index]  # (B, k, r, in), (B, k, out, r)
    codes = (x @ own_A.flatten(1, 2).mT).unflatten(-1, own_A.shape[1:3]) * weight[:, None, :, None]
    result: Tensor = codes.flatten(-2) @ own_B.mT.flatten(1, 2)
    return result


def factor_mixing(x: Tensor, A: Tensor, B: Tensor, routing: Routing) -> Tensor:
    """Return (sum_e w_e B_e)(sum_e w_e A_e) x.

    Per token this is (sum_e w_e B_e) z with z = sum_e w_e A_e x: no token gets matrices of its own.

    Args:
        x: (B, S, in).
        A: (E, r, in).
        B: (E, out, r).
        routing: Experts and weights.

    Returns:
        (B, S, out).
    """
    routing = _with_all(routing, x, A)
    weight = routing.weight.to(x.dtype)
    if routing.index is not None and _by_token(routing, x, A):
        sent, weight_P = _send(x, routing, len(A))
        codes = sent.down(x.flatten(0, -2), A) * weight_P
        summed = codes.new_zeros(sent.num_tokens, A.shape[1]).index_add(0, sent.token, codes)
        return sent.up(summed[sent.token] * weight_P, B).view(*x.shape[:-1], -1)
    if routing.index is not None:
        mean_A = torch.einsum("bk,bkri->bri", weight, A[routing.index])
        mean_B = torch.einsum("bk,bkor->bor", weight, B[routing.index])
    elif routing.heads:
        heads = weight.shape[1]
        mean_A = torch.einsum("bhe,erhd->brhd", weight, A.unflatten(2, (heads, -1))).flatten(2)
        mean_B = torch.einsum("bhe,ehdr->bhdr", weight, B.unflatten(1, (heads, -1))).flatten(1, 2)
    elif weight.dim() <= 2:
        mean_A = torch.tensordot(weight, A, dims=1)  # (r, in), or (B, r, in)
        mean_B = torch.tensordot(weight, B, dims=1)
    else:
        codes = ((x @ A.flatten(0, 1).T).unflatten(-1, A.shape[:2]) * weight[..., None]).sum(-2)
        mixed: Tensor = (weight[..., None] * codes[..., None, :]).flatten(-2) @ _wide(B)
        return mixed
    return x @ mean_A.mT @ mean_B.mT


def _with_all(routing: Routing, x: Tensor, A: Tensor) -> Routing:
    """Give a choice per token weights for all experts, mostly 0, where two products for all cost less than sorting.

    That is where the experts' ranks add up to little. Codes of all experts then take less memory than copies of
    the chosen pairs' inputs.
    """
    if routing.index is None or routing.index.dim() != 3:
        return routing
    exact_on_cpu = x.dtype == torch.float32 and x.device.type == "cpu"
    ranks = A.shape[0] * A.shape[1]
    if ranks > (_FEW_FLOAT32 if exact_on_cpu else _FEW) or ranks > routing.index.numel():
        return routing
    zeros = routing.weight.new_zeros(*routing.weight.shape[:-1], len(A))
    return Routing(zeros.scatter_add(-1, routing.index, routing.weight))


def _by_token(routing: Routing, x: Tensor, A: Tensor) -> bool:
    """Whether pairs are sent to the experts; else rows get copies of them, which must cost less than the rows."""
    assert routing.index is not None
    return routing.index.dim() == 3 or x.shape[1] < routing.index.shape[-1] * A.shape[1]


def _send(x: Tensor, routing: Routing, num_experts: int) -> tuple[Dispatch, Tensor]:
    """Sort the pairs, and their weights (P, 1)."""
    assert routing.index is not None
    shape = (*x.shape[:-1], routing.index.shape[-1])
    index, weight = (
        _spread(part, x).expand(shape).flatten(0, -2) for part in (routing.index, routing.weight)
    )
    sent = dispatch(index, num_experts, x.flatten(0, -2))
    return sent, weight.flatten()[sent.order, None].to(x.dtype)


def _spread(weight: Tensor, x: Tensor) -> Tensor:
    """Give a weight per row the dimension of positions."""
    return weight[:, None] if weight.dim() == 2 and x.dim() == 3 else weight


def _wide(B: Tensor) -> Tensor:
    """Put the experts' B (E, out, r) beside each other: (E r, out)."""
    return B.mT.flatten(0, 1)
