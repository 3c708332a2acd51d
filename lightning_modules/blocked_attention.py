"""Attention in blocks of scores, of a size that stays in the cache of a CPU where rows are not too long.

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
    query_BHTD: Tensor,
    key_BKSD: Tensor,
    value_BKSE: Tensor,
    scale: float,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    """Return softmax(scale q k' where it is allowed to look) v.

    For half precision on CPUs, where `scaled_dot_product_attention` takes longer, most of it in the backward pass
    (`benchmarks/update.py`). The query heads that share keys are rows of one matrix product, keys after the last one
    that a block of queries may see are left out, and scores are made again in the backward pass, so that what is kept
    grows with T + S. Scores are rounded to the inputs' type, as in the `eager` attention of transformers, but less that
    of the first key; the sums of a softmax are float32. A query that may see nothing gets a mean of values that is of
    no use, and nothing should look at it.

    Args:
        query_BHTD: Queries; H is a multiple of K.
        key_BKSD: Keys. Query head h uses head h K // H.
        value_BKSE: Values.
        scale: Factor of the scores.
        mask: True where a query may see a key (B, H, T, S); any axis but that of keys may be 1. None for everywhere.
        causal: Without a mask: whether query t sees the keys up to t + S - T alone.

    Returns:
        (B, H, T, E), in memory as (B, T, H, E).
    """
    if mask is not None:
        mask = mask.expand(len(query_BHTD), -1, query_BHTD.shape[2], key_BKSD.shape[2])
    output: Tensor = _Blocks.apply(query_BHTD, key_BKSD, value_BKSE, scale, mask, causal)  # type: ignore[no-untyped-call]
    return output


def single_query_attention(
    query_BH1D: Tensor, key_BKSD: Tensor, value_BKSE: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Return what `blocked_attention` does for one query in each row, as in decoding: a block needs no bounds.

    Args:
        query_BH1D: As there, with T = 1.
        key_BKSD: As there.
        value_BKSE: As there.
        scale: As there.
        mask: As there.

    Returns:
        (B, H, 1, E).
    """
    # Keys of a cache with room for more have gaps between heads, by which a product with their transpose is slow.
    weights_NQS = _weights(query_BH1D, key_BKSD.contiguous(), mask, scale)
    return (weights_NQS @ value_BKSE.flatten(0, 1)).view(*query_BH1D.shape[:3], -1)


class _Blocks(torch.autograd.Function):
    """See `blocked_attention`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, causal: bool
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale, ctx.causal = scale, causal
        B, H, T, _ = query.shape
        output = query.new_empty(B, T, H, value.shape[-1]).transpose(1, 2)
        for b, t, s, allowed in _pieces(query, key, mask, causal):
            part = query[b, :, t]
            weights_NQS = _weights(part, key[b, :, s], allowed, scale)
            output[b, :, t] = (weights_NQS @ value[b, :, s].flatten(0, 1)).view(*part.shape[:3], -1)
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(one, dtype=torch.float32) for one in (key, value))
        for b, t, s, allowed in _pieces(query, key, mask, ctx.causal):
            part, keys, values = query[b, :, t], key[b, :, s], value[b, :, s]
            weights_NQS = _weights(part, keys, allowed, ctx.scale)
            of_part_NQE = _by_key_head(of_output[b, :, t], keys)
            of_value[b, :, s] += (weights_NQS.mT @ of_part_NQE).view(values.shape)
            of_weights_NQS = of_part_NQE @ values.flatten(0, 1).mT
            of_scores_NQS = torch._softmax_backward_data(of_weights_NQS, weights_NQS, -1, query.dtype)
            of_query[b, :, t] = _scaled(of_scores_NQS, keys.flatten(0, 1), ctx.scale).view(part.shape)
            of_key[b, :, s] += _scaled(of_scores_NQS.mT, _by_key_head(part, keys), ctx.scale).view(keys.shape)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None, None


def _pieces(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool
) -> Iterator[tuple[slice, slice, slice, Tensor | None]]:
    """Divide rows and queries, end keys where the queries' sight ends, and cut out the mask."""
    B, H, T, _ = query.shape
    S = key.shape[2]
    seen_TS = None if mask is None else mask.flatten(0, 1).any(0)
    for start in range(0, T, _QUERIES):
        queries = slice(start, min(start + _QUERIES, T))
        end, allowed = S, None
        if seen_TS is not None:
            last = seen_TS[queries].any(0).nonzero()
            end = int(last[-1]) + 1 if len(last) else 1
        elif causal:
            end = queries.stop + S - T
            allowed = torch.ones(queries.stop - start, end, dtype=torch.bool).tril(start + S - T)
        rows = max(1, _BLOCK // (H * (queries.stop - start) * end))
        for row in range(0, B, rows):
            if mask is not None:
                allowed = mask[row : row + rows, :, queries, :end]
            yield slice(row, row + rows), queries, slice(0, end), allowed


def _by_key_head(of_queries: Tensor, key: Tensor) -> Tensor:
    """Turn (b, H, t, D) into (b K, H/K t, D)."""
    return of_queries.reshape(key.shape[0] * key.shape[1], -1, of_queries.shape[-1])


def _weights(query: Tensor, key: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """Return what each query takes of each key's value (b K, H/K t, s)."""
    b, H, t, _ = query.shape
    query_NQD, key_NSD = _by_key_head(query, key), key.flatten(0, 1)
    # A softmax ignores what is taken from all scores of a query, and what keys have in common is not rounded with it.
    first_NQ1 = _scaled(query_NQD, key_NSD[:, :1].mT, scale)
    scores_NQS = torch.baddbmm(first_NQ1, query_NQD, key_NSD.mT, beta=-1, alpha=scale)
    if allowed is not None:
        _hide(scores_NQS.view(b, H, t, -1), ~allowed)
    return scores_NQS.softmax(-1)


def _hide(scores_bHts: Tensor, hidden: Tensor) -> None:
    """Make scores the least there is; finite, for a query that may see nothing."""
    least = torch.finfo(scores_bHts.dtype).min
    if scores_bHts.dtype == torch.bfloat16:  # has room for a sum, which is faster than filling
        scores_bHts.add_(torch.zeros_like(hidden, dtype=scores_bHts.dtype).masked_fill_(hidden, least / 2))
    else:
        scores_bHts.masked_fill_(hidden, least)


def _scaled(left_NIJ: Tensor, right_NJK: Tensor, scale: float) -> Tensor:
    """Return scale x left x right, scaled before it is rounded: float16 would overflow."""
    return torch.baddbmm(left_NIJ.new_empty(()), left_NIJ, right_NJK, beta=0, alpha=scale)
