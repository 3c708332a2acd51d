"""Sends (token, expert) pairs through the matrices of their experts, without a copy of a matrix per token.

Shapes: T tokens, k experts per token, P = T k pairs, E experts, r rank.

Pairs are sorted by expert, and each expert's matrix is multiplied once with all its tokens. Three ways of doing
that give the same numbers; `dispatch` picks one by shape and device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_WIDE, _UNEVEN = (
    2**21,
    0.1,
)  # elements, and a share of pairs; measured on a server CPU with benchmarks/routing.py


class Dispatch(ABC):
    """The pairs of one routing decision, sorted by expert.

    Args:
        expert_index: The experts of each token, int64 (T, k).
        num_experts: E.

    Attributes:
        order: Position in the flattened (T, k) of each sorted pair (P).
        token: The token of each sorted pair (P).
    """

    def __init__(self, expert_index: Tensor, num_experts: int) -> None:
        self.num_tokens, k = expert_index.shape
        self.num_experts = num_experts
        flat = expert_index.flatten()
        self.order = flat.argsort(stable=True)
        self.token = self.order // k
        self._expert = flat[self.order]

    @abstractmethod
    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Multiply each pair's token with its expert's A.

        Args:
            x: (T, in).
            A: (E, r, in).

        Returns:
            Codes of the sorted pairs (P, r).
        """

    @abstractmethod
    def up(self, codes: Tensor, B: Tensor) -> Tensor:
        """Multiply each pair's code with its expert's B, and add up over the pairs of a token.

        Args:
            codes: Of the sorted pairs (P, r).
            B: (E, out, r).

        Returns:
            (T, out).
        """

    def _counts(self) -> Tensor:
        """Return the number of pairs of each expert (E), without asking the device for a size."""
        zeros = torch.zeros(self.num_experts, dtype=torch.int64, device=self._expert.device)
        return zeros.scatter_add(0, self._expert, torch.ones_like(self._expert))

    def _sum_tokens(self, values: Tensor, token: Tensor, like: Tensor) -> Tensor:
        return like.new_zeros(self.num_tokens, values.shape[-1]).index_add(0, token, values)


class LoopedDispatch(Dispatch):
    """One small product per expert in use: the fastest for few pairs, such as a decoded token."""

    def __init__(self, expert_index: Tensor, num_experts: int) -> None:
        super().__init__(expert_index, num_experts)
        experts, counts = torch.unique_consecutive(self._expert, return_counts=True)
        self._groups = list(zip(experts.tolist(), self.token.split(counts.tolist()), strict=True))

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """See `Dispatch.down`."""
        return torch.cat([x[token] @ A[expert].T for expert, token in self._groups])

    def up(self, codes: Tensor, B: Tensor) -> Tensor:
        """See `Dispatch.up`."""
        parts = codes.split([len(token) for _, token in self._groups])
        values = [code @ B[expert].T for code, (expert, _) in zip(parts, self._groups, strict=True)]
        return self._sum_tokens(torch.cat(values), self.token, codes)


class TiledDispatch(Dispatch):
    """A batched product with a few places per expert; what has no place goes through a grouped product.

    On CPU a batched product of small matrices runs on all threads and costs a fraction of as many single ones.
    With a little more than an even share of places, few experts need the grouped product, and copies of theirs
    are small.
    """

    def __init__(self, expert_index: Tensor, num_experts: int) -> None:
        super().__init__(expert_index, num_experts)
        pairs = len(self.order)
        self._places = _places(pairs, num_experts)
        counts = self._counts()
        rank = torch.arange(pairs) - (counts.cumsum(0) - counts)[self._expert]
        fits = rank < self._places
        self._fits, self._over = fits.nonzero()[:, 0], (~fits).nonzero()[:, 0]
        self._slot = (self._expert * self._places + rank)[self._fits]
        self._slot_token = torch.zeros(num_experts * self._places, dtype=torch.int64)
        self._slot_token[self._slot] = self.token[self._fits]
        self._crowded, sizes = torch.unique_consecutive(self._expert[self._over], return_counts=True)
        self._ends = sizes.cumsum(0).int()
        self._from = torch.cat([self._fits, self._over]).argsort()

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """See `Dispatch.down`. Empty places are computed with the first token and never read."""
        codes = torch.bmm(self._tiles(x[self._slot_token]), A.transpose(1, 2)).flatten(0, 1)[self._slot]
        if not len(self._over):
            return codes
        rest = grouped_product(x[self.token[self._over]], A[self._crowded], self._ends)
        return torch.cat([codes, rest])[self._from]

    def up(self, codes: Tensor, B: Tensor) -> Tensor:
        """See `Dispatch.up`. Empty places hold zeros."""
        tiles = codes.new_zeros(len(self._slot_token), codes.shape[1])
        tiles = tiles.index_copy(0, self._slot, codes[self._fits])
        values = torch.bmm(self._tiles(tiles), B.transpose(1, 2)).flatten(0, 1)
        result = self._sum_tokens(values, self._slot_token, codes)
        if not len(self._over):
            return result
        rest = grouped_product(codes[self._over], B[self._crowded], self._ends)
        return result.index_add(0, self.token[self._over], rest)

    def _tiles(self, values: Tensor) -> Tensor:
        return values.view(self.num_experts, self._places, -1)


class GroupedDispatch(Dispatch):
    """torch's grouped product: no size depends on the data, as GPUs and `torch.compile` want it."""

    def __init__(self, expert_index: Tensor, num_experts: int) -> None:
        super().__init__(expert_index, num_experts)
        self._ends = self._counts().cumsum(0).int()

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """See `Dispatch.down`."""
        return grouped_product(x[self.token], A, self._ends)

    def up(self, codes: Tensor, B: Tensor) -> Tensor:
        """See `Dispatch.up`."""
        return self._sum_tokens(grouped_product(codes, B, self._ends), self.token, codes)


def grouped_product(values: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply groups of neighbouring rows, each with a matrix of its own.

    Args:
        values: (P, n).
        weights: One matrix per group (G, m, n).
        ends: Where each group ends, int32 (G).

    Returns:
        (P, m).
    """
    product: Tensor
    if torch.compiler.is_compiling():  # torch traces its grouped product for bfloat16 alone
        product = _compiled_product(values, weights, ends)
    else:
        product = _GroupedProduct.apply(values, weights, ends)  # type: ignore[no-untyped-call]
    return product


def outer_products(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Sum up outer products group by group, zeros for groups without rows.

    Args:
        left: (P, m).
        right: (P, n).
        ends: Where each group ends, int32 (G).

    Returns:
        (G, m, n).
    """
    m, n = left.shape[1], right.shape[1]
    left = functional.pad(left, (0, _missing(m, left)))
    right = functional.pad(right, (0, _missing(n, right)))
    product = functional.grouped_mm(left.T, right, offs=ends)[:, :m, :n]
    # On some GPUs (sm_100) torch leaves what memory held in the products of groups without rows: pytorch#172439.
    is_empty = ends.diff(prepend=ends.new_zeros(1)) == 0
    return product.masked_fill(is_empty[:, None, None], 0)


def _product(values: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    rows, columns = weights.shape[1:]
    if _missing(rows, values) or _missing(columns, values):  # else padding would copy all weights
        weights = functional.pad(weights, (0, _missing(columns, values), 0, _missing(rows, values)))
        values = functional.pad(values, (0, _missing(columns, values)))
    return functional.grouped_mm(values, weights.transpose(1, 2), offs=ends)[:, :rows]


def _missing(side: int, like: Tensor) -> int:
    """How many entries a side lacks to a multiple of 16 bytes, which torch wants."""
    return -side % (16 // like.element_size())


class _GroupedProduct(torch.autograd.Function):
    """`grouped_product`, whose weights get gradients by `outer_products`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(values, weights, ends)
        return _product(values, weights, ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        values, weights, ends = ctx.saved_tensors
        to_values, to_weights, _ = ctx.needs_input_grad
        gradient = gradient.contiguous()
        return (
            _product(gradient, weights.mT, ends) if to_values else None,
            outer_products(gradient, values, ends) if to_weights else None,
            None,
        )


@torch.library.custom_op("quiver::grouped_product", mutates_args=())
def _compiled_product(values: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`grouped_product`, as one node of a compiled graph."""
    return _product(values, weights, ends).contiguous()


@_compiled_product.register_fake
def _(values: Tensor, weights: Tensor, ends: Tensor) -> Tensor:  # noqa: ARG001
    return values.new_empty(values.shape[0], weights.shape[1])


@torch.library.custom_op("quiver::grouped_outer_product", mutates_args=())
def _compiled_outer_products(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """`outer_products`, as one node of a compiled graph."""
    return outer_products(left, right, ends).contiguous()


@_compiled_outer_products.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _compiled_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    values, weights, ends = ctx.saved_tensors
    to_values, to_weights, _ = ctx.needs_input_grad
    return (
        _compiled_product(gradient.contiguous(), weights.mT.contiguous(), ends) if to_values else None,
        _compiled_outer_products(gradient.contiguous(), values, ends) if to_weights else None,
        None,
    )


_compiled_product.register_autograd(_compiled_backward, setup_context=_keep)


def dispatch(expert_index: Tensor, num_experts: int, x: Tensor) -> Dispatch:
    """Sort the pairs of a routing decision in the way that is fastest for their number and device.

    Args:
        expert_index: The experts of each token, int64 (T, k).
        num_experts: E.
        x: What will be sent (T, in).
    """
    pairs = expert_index.numel()
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return GroupedDispatch(expert_index, num_experts)
    if num_experts >= 4 * pairs:
        return LoopedDispatch(expert_index, num_experts)
    if num_experts > pairs:
        return GroupedDispatch(expert_index, num_experts)
    if x.dtype == torch.float32:  # of which single small products are fast
        counts = expert_index.flatten().bincount(minlength=num_experts)
        left_over = int((counts - _places(pairs, num_experts)).clamp(min=0).sum())
        # Tiles hold more than the pairs, which costs more than it saves where these outgrow the cache.
        if pairs * x.shape[-1] > _WIDE or left_over > pairs * _UNEVEN:
            return GroupedDispatch(expert_index, num_experts)
    return TiledDispatch(expert_index, num_experts)


def _places(pairs: int, num_experts: int) -> int:
    """Places for each expert in tiles: a little more than an even share."""
    return math.ceil(1.25 * pairs / num_experts) + 1
