"""From logits to the distribution that a token is drawn from, and the draw itself.

Pure functions; they need torch alone. Shapes: B rows, V vocabulary, T tokens. A score is a logit, -inf where a token
is left out; scores are not normalised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lightning_modules.sampling.base import Sampling

# About the square root of a vocabulary.
_BLOCK = 256


def sampling_scores(logits_BV: Tensor, sampling: Sampling, seen_BV: Tensor | None = None) -> Tensor:
    """Apply all settings in the order of transformers: penalty, temperature, top-k, top-p, min-p.

    Args:
        logits_BV: The model's, float32.
        sampling: The settings. Temperature 0 divides by nothing; the caller takes the maximum.
        seen_BV: True at tokens that the prompt or the completion holds. Needed with a repetition penalty only.

    Returns:
        Scores (B, V), whose softmax is the distribution.
    """
    scores_BV = logits_BV
    if sampling.repetition_penalty != 1:
        assert seen_BV is not None
        scores_BV = penalise(scores_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature not in (0.0, 1.0):
        scores_BV = scores_BV / sampling.temperature
    if sampling.top_k:
        scores_BV = keep_top_k(scores_BV, sampling.top_k)
    if sampling.top_p < 1:
        scores_BV = keep_top_p(scores_BV, sampling.top_p)
    if sampling.min_p:
        scores_BV = keep_min_p(scores_BV, sampling.min_p)
    return scores_BV


def penalise(scores_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely: CTRL (arXiv 1909.05858, section 4.1).

    Deviation, that of transformers: negative scores are multiplied, for a division would raise them.

    Args:
        scores_BV: Scores.
        seen_BV: True where the penalty applies.
        penalty: Positive; below 1 it rewards.

    Returns:
        Scores (B, V).

    >>> penalise(torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[True, True, False]]), 2.0)
    tensor([[ 1., -4.,  1.]])
    """
    penalised_BV = torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return torch.where(seen_BV, penalised_BV, scores_BV)


def keep_top_k(scores_BV: Tensor, k: int) -> Tensor:
    """Keep the k highest scores, and those equal to the last of them.

    Args:
        scores_BV: Scores.
        k: At least 1; more than V keeps all.

    Returns:
        Scores (B, V).

    >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), 2)
    tensor([[-inf, 3., 2.]])
    """
    lowest_B1 = scores_BV.topk(min(k, scores_BV.shape[-1])).values[:, -1:]
    return scores_BV.masked_fill(scores_BV < lowest_B1, -torch.inf)


def keep_top_p(scores_BV: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens that have the mass together: nucleus sampling (arXiv 1904.09751, eq. 3).

    Args:
        scores_BV: Scores.
        p: The mass.

    Returns:
        Scores (B, V).

    >>> keep_top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.6).exp()
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    ordered_BV, order_BV = scores_BV.sort(-1)
    # The mass of a token and all that are less likely: without them, 1 - p or less would be missing.
    dropped_BV = cumulated(ordered_BV.softmax(-1)) <= 1 - p
    dropped_BV[:, -1] = False
    return scores_BV.masked_fill(dropped_BV.scatter(-1, order_BV, dropped_BV), -torch.inf)


def keep_min_p(scores_BV: Tensor, p: float) -> Tensor:
    """Keep tokens with at least the share p of the highest probability: min-p (arXiv 2407.01082, section 3).

    Args:
        scores_BV: Scores.
        p: The share.

    Returns:
        Scores (B, V).

    >>> keep_min_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.5).exp()
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    probabilities_BV = scores_BV.softmax(-1)
    return scores_BV.masked_fill(probabilities_BV < p * probabilities_BV.amax(-1, keepdim=True), -torch.inf)


def own_uniforms(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """Return each row's own random numbers, the same whichever rows it is drawn with.

    Args:
        seeds: One for each row.
        num_tokens: T.

    Returns:
        Uniform on [0, 1), float64 (T, B).
    """
    draws = [torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws, dim=1).double()


def draw_by(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw by the inverse of the cumulated distribution, in the order of the vocabulary.

    In two steps, a block of the vocabulary and a token of it: cumulating all of it takes several times as long.

    Args:
        probabilities_BV: Probabilities, float32.
        uniform_B: A number in [0, 1) for each row, float64.

    Returns:
        Token ids, int64 (B).

    >>> draw_by(torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([0.6], dtype=torch.float64))
    tensor([1])
    """
    vocabulary = probabilities_BV.shape[1]
    if spare := -vocabulary % _BLOCK:
        probabilities_BV = functional.pad(probabilities_BV, (0, spare))
    blocks_BNW = probabilities_BV.unflatten(1, (-1, _BLOCK))
    block_B1, within_B1 = _invert(blocks_BNW.sum(-1), uniform_B[:, None].to(probabilities_BV.device))
    chosen_BW = blocks_BNW.take_along_dim(block_B1[:, :, None], 1)[:, 0]
    token_B1, _ = _invert(chosen_BW, within_B1)
    # Where probabilities are not numbers, nothing is found; the caller sees that in the log-probabilities.
    return (block_B1 * _BLOCK + token_B1)[:, 0].clamp(max=vocabulary - 1)


def cumulated(values_BN: Tensor) -> Tensor:
    """Add up values along rows.

    As `cumsum` does, which on GPUs has no deterministic form: where one is asked for (`trainer.deterministic: true`),
    by products with a triangle of ones, in blocks.

    Args:
        values_BN: Of any floating type.
    """
    if values_BN.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return values_BN.cumsum(-1)
    count = values_BN.shape[1]
    width = min(count, _BLOCK)
    blocks_BMW = functional.pad(values_BN, (0, -count % width)).unflatten(1, (-1, width))
    within_BMW: Tensor = blocks_BMW @ values_BN.new_ones(width, width).triu()
    sums_BM = within_BMW[..., -1]
    before_BM = cumulated(sums_BM) - sums_BM if sums_BM.shape[1] > 1 else torch.zeros_like(sums_BM)
    return (within_BMW + before_BM[..., None]).flatten(1)[:, :count]


def _invert(masses_BN: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first entry up to which there is more than a share of all mass, and how far into it the share is."""
    cumulated_BN = cumulated(masses_BN.double())
    target_B1 = uniform_B1 * cumulated_BN[:, -1:]
    found_B1 = torch.searchsorted(cumulated_BN, target_B1, right=True).clamp(max=masses_BN.shape[1] - 1)
    mass_B1 = masses_BN.gather(1, found_B1).double()
    before_B1 = cumulated_BN.gather(1, found_B1) - mass_B1
    # Rounding must not make it 1, which no entry is beyond.
    return found_B1, ((target_B1 - before_B1) / mass_B1).clamp(0, 1 - 2**-40)
