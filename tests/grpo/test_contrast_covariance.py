"""The covariance of successful and failed completions, against its definition, all permutations and closed forms."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import pytest
import torch

from lightning_modules.grpo.contrast import contrast_covariance


def pool(Q, seed, C=16, d=5):
    generator = torch.Generator().manual_seed(seed)
    success = (torch.rand(Q, C, generator=generator) < 0.4).float()
    gradients = torch.randn(Q, C, d, generator=generator) + torch.randn(Q, 1, d, generator=generator)
    return gradients, success


def slow_parts(gradients, success):
    plus, minus = [], []
    for g, s in zip(gradients.double(), success, strict=True):
        if (s == 1).any() and (s == 0).any():
            plus.append(g[s == 1].mean(0))
            minus.append(g[s == 0].mean(0))
    plus, minus = torch.stack(plus), torch.stack(minus)
    return plus - plus.mean(0), minus - minus.mean(0)


def test_equals_the_definitions_and_all_permutations():
    gradients, success = pool(Q=6, seed=3)
    success[1], success[2, 5] = 0.0, torch.nan  # one outcome only; unknown
    plus, minus = slow_parts(gradients, success)
    n = len(plus)
    assert n == 5
    found = contrast_covariance(gradients, success, permutations=20_000)
    covariance = float((plus * minus).sum() / (n - 1))
    spread = [float(part.square().sum() / (n - 1)) for part in (plus, minus)]
    rho = covariance / math.sqrt(spread[0] * spread[1])
    assert found.prompts == n
    assert found.covariance == pytest.approx(covariance)
    assert found.correlation == pytest.approx(rho)
    assert found.remaining == pytest.approx(1 - rho**2)
    assert found.coefficient == pytest.approx(covariance / spread[1])
    every = torch.tensor(
        [float((plus * minus[list(order)]).sum() / (n - 1)) for order in itertools.permutations(range(n))]
    ).double()
    assert every.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.permuted.value == pytest.approx(0, abs=5 * float(every.std()) / math.sqrt(20_000))
    assert found.p_value == pytest.approx(float((every >= covariance - 1e-9).double().mean()), abs=0.02)
    for end, outside in (
        (found.permuted.low, every < found.permuted.low),
        (found.permuted.high, every > found.permuted.high),
    ):
        assert outside.double().mean() < 0.05
        assert (every - end).abs().min() < 0.05 * every.std()


def test_the_coefficient_leaves_the_least_variance():
    plus, minus = slow_parts(*pool(Q=8, seed=5))
    found = contrast_covariance(*pool(Q=8, seed=5))

    def left(c):
        return float((plus - c * minus).square().sum() / plus.square().sum())

    assert left(found.coefficient) == pytest.approx(found.remaining)
    assert left(found.coefficient) < min(left(found.coefficient + 0.01), left(found.coefficient - 0.01))
    assert left(2 * found.coefficient) == pytest.approx(1)


def synthetic(shared, seed=0, Q=60, C=8, d=4, noise=0.5):
    """g = a_q u + noise on both sides if shared, else a_q u and b_q u of independent a, b."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, Q, 1, 1, generator=generator)
    success = torch.tensor([1.0, 0.0]).repeat(Q, C // 2)
    u = torch.full((d,), 1.0)
    gradients = torch.where(success[..., None] == 1, a, a if shared else b) * u
    return gradients + noise * torch.randn(Q, C, d, generator=generator), success


def test_a_part_that_prompts_share_is_found_and_permutations_lose_it():
    """Cov = Var(a) |u|^2 = 4, Var = 4 + d noise^2 / 4 = 4.25, and almost nothing is left."""
    found = [contrast_covariance(*synthetic(True, seed)) for seed in range(100)]
    mean = torch.tensor([one.covariance for one in found]).mean()
    assert mean == pytest.approx(4, abs=0.3)
    assert torch.tensor([one.correlation for one in found]).mean() == pytest.approx(4 / 4.25, abs=0.02)
    assert torch.tensor([one.remaining for one in found]).mean() == pytest.approx(
        1 - (4 / 4.25) ** 2, abs=0.03
    )
    for one in found:
        assert abs(one.permuted.value) < 0.02 * one.covariance + 0.1
        assert one.permuted.high < one.covariance
        assert one.p_value == pytest.approx(1 / 1001)


def test_independent_parts_have_no_covariance():
    found = [contrast_covariance(*synthetic(False, seed), permutations=200) for seed in range(200)]
    values = torch.tensor([one.covariance for one in found])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))
    below = sum(one.p_value <= 0.2 for one in found) / len(found)  # p-values are uniform
    assert below == pytest.approx(0.2, abs=NormalDist().inv_cdf(0.9999) * math.sqrt(0.16 / len(found)))


@pytest.mark.parametrize("success", [torch.ones(3, 4), torch.zeros(3, 4), torch.full((3, 4), torch.nan)])
def test_prompts_without_both_outcomes_have_no_contrast(success):
    found = contrast_covariance(torch.randn(3, 4, 2), success)
    assert found.prompts == 0
    numbers = [
        *found.permuted,
        found.covariance,
        found.p_value,
        found.correlation,
        found.coefficient,
        found.remaining,
    ]
    assert all(map(math.isnan, numbers))


def test_one_mixed_prompt_is_not_enough():
    success = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    found = contrast_covariance(torch.randn(2, 2, 3), success)
    assert found.prompts == 1
    assert math.isnan(found.covariance)


def test_a_seed_repeats_the_permutations():
    gradients, success = synthetic(True)
    first, again, other = (contrast_covariance(gradients, success, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.permuted != other.permuted
