"""Filters equal those of transformers, and draws follow the distribution that they leave."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_modules.sampling import Sampling
from lightning_modules.sampling.filters import (
    draw_by,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    own_uniforms,
    penalise,
    sampling_scores,
)

VOCABULARY = 9


@st.composite
def logits(draw):
    """Random scores (3, V), many of them equal, or widely spread."""
    seed, spread, levels = (
        draw(st.integers(0, 10**6)),
        draw(st.sampled_from([0.1, 1.0, 10.0])),
        draw(st.integers(0, 3)),
    )
    scores = spread * torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return scores if levels == 0 else (scores * levels).round() / levels


shares = st.sampled_from([1e-6, 0.05, 0.3, 0.5, 0.9, 0.999])
penalties = st.sampled_from([0.5, 1.1, 2.0, 10.0])
ids = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=4, max_size=4), min_size=3, max_size=3)


def holds(rows) -> torch.Tensor:
    seen = torch.zeros(len(rows), VOCABULARY, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        seen[row, tokens] = True
    return seen


@given(logits(), st.integers(1, VOCABULARY + 2))
def test_top_k_equals_transformers(scores, k):
    assert torch.equal(keep_top_k(scores, k), TopKLogitsWarper(k)(None, scores))


@given(logits(), shares)
def test_top_p_equals_transformers(scores, p):
    assert torch.equal(keep_top_p(scores, p), TopPLogitsWarper(p)(None, scores))


@given(logits(), shares)
def test_min_p_equals_transformers(scores, p):
    assert torch.equal(keep_min_p(scores, p), MinPLogitsWarper(p)(None, scores))


@given(logits(), ids, penalties)
def test_repetition_penalty_equals_transformers(scores, rows, penalty):
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(rows), scores)
    assert torch.equal(penalise(scores, holds(rows), penalty), expected)


@settings(max_examples=200)
@given(
    logits(), ids, penalties | st.just(1.0), st.sampled_from([0.0, 0.3, 1.0, 2.5]), st.integers(0, VOCABULARY),
    shares | st.just(1.0), shares | st.just(0.0),
)  # fmt: skip
def test_all_together_equal_transformers_in_its_order(scores, rows, penalty, temperature, k, top_p, min_p):
    sampling = Sampling(
        temperature=temperature, top_k=k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    expected = scores
    if penalty != 1:
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(rows), expected)
    if temperature:
        expected = TemperatureLogitsWarper(temperature)(None, expected)
    if k:
        expected = TopKLogitsWarper(k)(None, expected)
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    expected = MinPLogitsWarper(min_p)(None, expected) if min_p else expected
    assert torch.equal(sampling_scores(scores, sampling, holds(rows)), expected)
    assert expected.isfinite().any(-1).all()  # there is always something to draw


@given(logits())
def test_neutral_settings_change_nothing(scores):
    assert torch.equal(sampling_scores(scores, Sampling()), scores)


# ---------------------------------------------------------------------- chi-square

PROBABILITIES = [0.3, 0.2, 0.15, 0.12, 0.1, 0.06, 0.04, 0.02, 0.01]
SEEN = holds([[0, 3]])
# 99.9th percentile of chi-square by degrees of freedom.
LIMITS = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12}


def by_hand(**options) -> list[float]:
    """Return the probabilities that the settings mean, token by token."""
    p = PROBABILITIES
    if "temperature" in options:
        p = [x ** (1 / options["temperature"]) for x in p]
    if "repetition_penalty" in options:  # log-probabilities are negative
        p = [x ** options["repetition_penalty"] if SEEN[0, i] else x for i, x in enumerate(p)]
    p = [x / sum(p) for x in p]
    order = sorted(range(len(p)), key=lambda i: -p[i])  # a penalty changes it
    if "top_k" in options:
        order = order[: options["top_k"]]
    if "top_p" in options:
        total = sum(p[i] for i in order)
        starts = [order[:n] for n in range(1, len(order) + 1)]
        order = next(start for start in starts if sum(p[i] for i in start) / total >= options["top_p"] - 1e-9)
    if "min_p" in options:
        order = [i for i in order if p[i] >= options["min_p"] * p[order[0]]]
    total = sum(p[i] for i in order)
    return [x / total if i in order else 0.0 for i, x in enumerate(p)]


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 9), ({"temperature": 0.6}, 9), ({"temperature": 3.0}, 9), ({"top_k": 4}, 4), ({"top_p": 0.72}, 4),
        ({"min_p": 0.25}, 5), ({"repetition_penalty": 1.5}, 9),
        ({"temperature": 2.0, "top_k": 7, "top_p": 0.9, "min_p": 0.4}, 6),
        ({"temperature": 2.0, "repetition_penalty": 1.8, "top_k": 7, "top_p": 0.9, "min_p": 0.6}, 4),
    ],
)  # fmt: skip
def test_draws_follow_the_filtered_distribution(options, kept, seeded):
    number = 20_000
    scores = sampling_scores(torch.tensor([PROBABILITIES]).log(), Sampling(**options), SEEN)
    if seeded:  # a row for each seed: its first number, as if each were a row of its own
        uniform = own_uniforms(range(number), 1)[0]
    else:
        uniform = torch.rand(number, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = draw_by(scores.softmax(-1).expand(number, -1), uniform)
    counts = torch.bincount(drawn, minlength=VOCABULARY).double()
    expected = torch.tensor(by_hand(**options), dtype=torch.float64)
    assert (expected > 0).sum() == kept
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], number * expected[expected > 0]
    assert ((counts - expected) ** 2 / expected).sum() < LIMITS[kept - 1]


@given(st.integers(0, 10**6), st.sampled_from([2, 255, 256, 257, 700, 1024]), st.booleans())
def test_draws_equal_a_search_in_the_whole_cumulated_distribution(seed, vocabulary, sparse):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (3 * torch.randn(4, vocabulary, generator=generator)).softmax(-1)
    if sparse:  # as a filter leaves it, with whole blocks of nothing
        left_out = torch.rand(4, vocabulary, generator=generator) < 0.99
        left_out[torch.arange(4), torch.randint(vocabulary, (4,), generator=generator)] = False
        probabilities = probabilities.masked_fill(left_out, 0.0)
    uniform = torch.rand(4, generator=generator, dtype=torch.float64)
    drawn = draw_by(probabilities, uniform)
    for row, token, share in zip(probabilities.double(), drawn.tolist(), uniform.tolist(), strict=True):
        before, end = row[:token].sum() / row.sum(), row[: token + 1].sum() / row.sum()
        assert row[token] > 0
        assert before - 1e-6 <= share < end + 1e-6


def test_draws_take_the_extremes_and_never_a_token_that_is_left_out():
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    almost = 1 - 2**-24  # the largest that torch.rand returns
    for uniform, token in ((0.0, 1), (0.4999, 1), (0.5, 3), (almost, 3)):
        assert draw_by(scores.softmax(-1), torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_own_numbers_do_not_depend_on_other_rows():
    together = own_uniforms([4, 5, 6], 3)
    assert together.shape == (3, 3)
    assert torch.equal(together[:, 1:2], own_uniforms([5], 3))
    assert together.unique().numel() == 9
