"""The LM head at scored positions, a chunk of rows at a time: log-probabilities and entropies without kept logits.

Shapes: N scored positions, c of them in a chunk, b of those in a block, H hidden units, V entries of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**24
"""Logits that are held at a time."""

# Logits that are reduced at a time on a CPU: what stays in its cache in float32, which takes a quarter of the time that
# passes over a whole chunk do. Products need many rows instead, to read the head's weights seldom.
_BLOCK = 2**20


def scored_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    ids_N: Tensor,
    *,
    temperature: float,
    chunk: int = CHUNK,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each scored token and the entropy of the distribution that it comes from.

    The same as `token_logprobs` and `token_entropy` of the head's logits, to rounding. Those keep for the backward
    pass the logits and two to four float32 copies of them (each N x V); this holds those of one chunk at a time.
    Worth it as soon as N x V is much larger than `chunk`.

    Cost: with a frozen head nothing beyond the head's own two products. The gradient of a row's log-probability in
    its hidden state is a vector times a number that the backward pass brings, so the forward pass makes the vector
    (N, H) while it has the logits; and a second one for the entropy if it carries a gradient. A head that is trained
    needs its logits once more in the backward pass: a third more work in the head.

    Logits are made in the type of `hidden_NH`, or in that of autocast, and reduced in float32 (float64 stays).

    Args:
        hidden_NH: What the head gets at the position before each scored token.
        weight_VH: Of the head; of the type of `hidden_NH`.
        bias_V: Of the head, if it has one.
        ids_N: The scored tokens.
        temperature: Divides the logits. 0 (greedy) leaves them as they are, as in `completion_logits`.
        chunk: Logits that are held at a time; at least one row's.
        entropy_gradient: Whether the entropy carries a gradient.

    Returns:
        Log-probabilities and entropies, nats, float32 (N) each. Gradients reach what requires them.

    Raises:
        ValueError: If `chunk` is not positive.

    >>> hidden, weight = torch.zeros(1, 2), torch.ones(4, 2)
    >>> logprobs, entropy = scored_logprobs(hidden, weight, None, torch.tensor([3]), temperature=1.0)
    >>> logprobs.exp(), entropy.exp()
    (tensor([0.2500]), tensor([4.]))
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1.")
    device = hidden_NH.device.type
    if torch.is_autocast_enabled(device):  # here, so that the backward pass computes in the same type
        dtype = torch.get_autocast_dtype(device)
        hidden_NH, weight_VH = hidden_NH.to(dtype), weight_VH.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    rows = max(1, chunk // weight_VH.shape[0])
    with torch.autocast(device, enabled=False):
        found: tuple[Tensor, Tensor] = _Scored.apply(  # type: ignore[no-untyped-call]
            hidden_NH, weight_VH, bias_V, ids_N, temperature or 1.0, rows, entropy_gradient
        )
    return found


class _Scored(torch.autograd.Function):
    """See `scored_logprobs`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        ids_N: Tensor,
        temperature: float,
        rows: int,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        ctx.temperature, ctx.rows, ctx.entropy_gradient = temperature, rows, entropy_gradient
        ctx.head_is_trained = needs_weight or needs_bias
        makes_slopes = needs_hidden and not ctx.head_is_trained
        exact = torch.promote_types(hidden_NH.dtype, torch.float32)
        logprobs_N = hidden_NH.new_empty(len(ids_N), dtype=exact)
        entropy_N = torch.empty_like(logprobs_N)
        slope_NH = torch.empty_like(hidden_NH) if makes_slopes else None
        entropy_slope_NH = torch.empty_like(hidden_NH) if makes_slopes and entropy_gradient else None
        for part in _parts(len(ids_N), rows):
            # What is made of the logits takes their place.
            logits_cV = F.linear(hidden_NH[part], weight_VH, bias_V)
            rises_cV = None if entropy_slope_NH is None else torch.empty_like(logits_cV)
            for block in _blocks(logits_cV):
                found = _Reduced(logits_cV[block], ids_N[part][block], temperature)
                logprobs_N[part][block], entropy_N[part][block] = found.logprob_b, found.entropy_b
                if rises_cV is not None:
                    rises_cV[block] = found.entropy_rises().div_(temperature)
                if makes_slopes:
                    logits_cV[block] = found.rises().div_(temperature)
            if entropy_slope_NH is not None and rises_cV is not None:
                entropy_slope_NH[part] = rises_cV @ weight_VH
            if slope_NH is not None:
                slope_NH[part] = logits_cV @ weight_VH
        if ctx.head_is_trained:
            ctx.save_for_backward(hidden_NH, weight_VH, bias_V, ids_N)
        else:
            ctx.save_for_backward(slope_NH, entropy_slope_NH)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, of_logprobs_N: Tensor, of_entropy_N: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.head_is_trained:
            return *_with_trained_head(ctx, of_logprobs_N, of_entropy_N), None, None, None, None
        slope_NH, entropy_slope_NH = ctx.saved_tensors
        of_hidden_NH = of_logprobs_N[:, None] * slope_NH
        if entropy_slope_NH is not None:
            of_hidden_NH += of_entropy_N[:, None] * entropy_slope_NH
        return of_hidden_NH.to(slope_NH.dtype), None, None, None, None, None, None


def _with_trained_head(
    ctx: Any, of_logprobs_N: Tensor, of_entropy_N: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Make the logits once more, and the gradients of hidden states, weight and bias from them."""
    hidden_NH, weight_VH, bias_V, ids_N = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    exact = of_logprobs_N.dtype
    of_hidden_NH = torch.empty_like(hidden_NH) if needs_hidden else None
    # Chunks are added up in float32, as a product of all rows does it.
    of_weight_VH = torch.zeros_like(weight_VH, dtype=exact) if needs_weight else None
    of_bias_V = torch.zeros_like(bias_V, dtype=exact) if needs_bias else None
    for part in _parts(len(ids_N), ctx.rows):
        logits_cV = F.linear(hidden_NH[part], weight_VH, bias_V)
        for block in _blocks(logits_cV):
            found = _Reduced(logits_cV[block], ids_N[part][block], ctx.temperature)
            of_logits_bV: Tensor | float = 0.0
            if ctx.entropy_gradient:
                of_logits_bV = found.entropy_rises().mul_(of_entropy_N[part][block, None])
            of_logits_bV = found.rises().mul_(of_logprobs_N[part][block, None]).add_(of_logits_bV)
            logits_cV[block] = of_logits_bV.div_(ctx.temperature)
        of_logits_cV = logits_cV
        if of_hidden_NH is not None:
            of_hidden_NH[part] = of_logits_cV @ weight_VH
        if of_weight_VH is not None:
            of_weight_VH += of_logits_cV.T @ hidden_NH[part]
        if of_bias_V is not None:
            of_bias_V += of_logits_cV.sum(0)
    return (
        of_hidden_NH,
        None if of_weight_VH is None else of_weight_VH.to(weight_VH.dtype),
        None if of_bias_V is None else of_bias_V.to(bias_V.dtype),
    )


def _parts(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _blocks(logits_cV: Tensor) -> list[slice]:
    rows, entries = logits_cV.shape
    return _parts(rows, max(1, _BLOCK // entries) if logits_cV.device.type == "cpu" else rows)


class _Reduced:
    """What is found in the logits of a block: log-probabilities of its tokens, entropies, and their derivatives.

    Args:
        logits_bV: They stay as they are.
        ids_b: The tokens.
        temperature: Divides the logits.
    """

    def __init__(self, logits_bV: Tensor, ids_b: Tensor, temperature: float) -> None:
        exact_bV = logits_bV.to(torch.promote_types(logits_bV.dtype, torch.float32), copy=True)
        if temperature != 1:
            exact_bV.div_(temperature)
        self._probs_bV = exact_bV.softmax(1)
        self._ids_b1 = ids_b[:, None]
        # The largest becomes 0, so that its probability, which is not small, tells the sum of all exponentials.
        self._scaled_bV = exact_bV.sub_(exact_bV.amax(1, keepdim=True))
        self._total_b = -self._probs_bV.amax(1).log()
        self.logprob_b = self._scaled_bV.gather(1, self._ids_b1)[:, 0] - self._total_b
        self.entropy_b = self._total_b - torch.linalg.vecdot(self._probs_bV, self._scaled_bV)

    def entropy_rises(self) -> Tensor:
        """Return the derivative of entropies in scaled logits, -p (log p + entropy). Uses the scaled logits up."""
        return self._scaled_bV.add_((self.entropy_b - self._total_b)[:, None]).mul_(self._probs_bV).neg_()

    def rises(self) -> Tensor:
        """Return the derivative of log-probabilities in scaled logits, onehot - p. Uses the probabilities up."""
        rises_bV = self._probs_bV.neg_()
        return rises_bV.scatter_add_(1, self._ids_b1, rises_bV.new_ones(len(self._ids_b1), 1))
