"""Attention in blocks of scores that stay in the cache of a CPU.

Shapes: B rows, H query heads, K heads of keys and values, T queries, S keys, D their width, E width of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 2**20  # scores: 2 MB of half precision
_QUERIES = 128  # whose keys end where the last of them may look


def blocked_attention(
    query_BHTD: Tensor, key_BKSD: Tensor, value_BKSE: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Return softmax(scale q k' where the mask allows) v.

    On CPUs torch's own attention takes two to three times as long in half precision, most of it in the backward pass,
    and wants keys and values copied for each query head. Here the query heads that share keys are rows of one matrix
    product, keys after the last one that a block of queries may see are left out, and scores are made again in the
    backward pass, so that memory grows with T + S. Scores are rounded to the inputs' type, as in the `eager` attention
    of transformers; the sums of a softmax are float32. A query that may see nothing sees everything alike; nothing
    should look at it.

    Args:
        query_BHTD: Queries; H is a multiple of K.
        key_BKSD: Keys. Query head h uses head h K // H.
        value_BKSE: Values.
        mask: True where a query may see a key (B or 1, H or 1, T, S); None for everywhere.
        scale: Factor of the scores.

    Returns:
        (B, H, T, E), in memory as (B, T, H, E).
    """
    if mask is not None:
        mask = mask.expand(query_BHTD.shape[0], -1, -1, -1)
    output: Tensor = _Blocks.apply(query_BHTD, key_BKSD, value_BKSE, mask, scale)  # type: ignore[no-untyped-call]
    return output


class _Blocks(torch.autograd.Function):
    """See `blocked_attention`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        B, H, T, _ = query.shape
        output = query.new_empty(B, T, H, value.shape[-1]).transpose(1, 2)
        for b, t, s in _pieces(query, key, mask):
            part = query[b, :, t]
            weights_NQS = _weights(part, key[b, :, s], _of(mask, b, t, s), scale)
            output[b, :, t] = (weights_NQS @ value[b, :, s].flatten(0, 1)).view(*part.shape[:3], -1)
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(one, dtype=torch.float32) for one in (key, value))
        for b, t, s in _pieces(query, key, mask):
            part, keys, values = query[b, :, t], key[b, :, s], value[b, :, s]
            weights_NQS = _weights(part, keys, _of(mask, b, t, s), ctx.scale)
            of_part_NQE = _by_key_head(of_output[b, :, t], keys)
            of_value[b, :, s] += (weights_NQS.mT @ of_part_NQE).view(values.shape)
            of_weights_NQS = of_part_NQE @ values.flatten(0, 1).mT
            of_scores_NQS = torch._softmax_backward_data(of_weights_NQS, weights_NQS, -1, query.dtype)
            of_scores_NQS.mul_(ctx.scale)
            of_query[b, :, t] = (of_scores_NQS @ keys.flatten(0, 1)).view(part.shape)
            of_key[b, :, s] += (of_scores_NQS.mT @ _by_key_head(part, keys)).view(keys.shape)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None


def _pieces(query: Tensor, key: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, slice, slice]]:
    """Divide rows and queries, and end keys where the queries' sight ends."""
    B, H, T, _ = query.shape
    S = key.shape[2]
    seen_TS = None if mask is None else mask.flatten(0, 1).any(0)
    for start in range(0, T, _QUERIES):
        queries = slice(start, min(start + _QUERIES, T))
        end = S
        if seen_TS is not None:
            last = seen_TS[queries].any(0).nonzero()
            end = int(last[-1]) + 1 if len(last) else 1
        rows = max(1, _BLOCK // (H * (queries.stop - start) * end))
        for row in range(0, B, rows):
            yield slice(row, row + rows), queries, slice(0, end)


def _of(mask: Tensor | None, rows: slice, queries: slice, keys: slice) -> Tensor | None:
    return None if mask is None else mask[rows, :, queries, keys]


def _by_key_head(of_queries: Tensor, key: Tensor) -> Tensor:
    """Turn (b, H, t, D) into (b K, H/K t, D)."""
    return of_queries.reshape(key.shape[0] * key.shape[1], -1, of_queries.shape[-1])


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return what each query takes of each key's value (b K, H/K t, s)."""
    b, H, t, _ = query.shape
    scores_NQS = (_by_key_head(query, key) @ key.flatten(0, 1).mT).mul_(scale)
    if mask is not None:
        scores_NQS.view(b, H, t, -1).masked_fill_(~mask, torch.finfo(scores_NQS.dtype).min)
    return scores_NQS.softmax(-1)
