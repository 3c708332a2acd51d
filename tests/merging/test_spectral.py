"""Iso-C, TSV-M and LoRA factors, against NumPy and PEFT."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from lightning_modules.merging import LoraFactors, as_lora, average_factors, iso_c, lora_delta, tsv_m
from lightning_modules.sparse.delta import SparseDelta


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(m, n, rank, seed=0):
    return random(m, rank, seed=seed) @ random(rank, n, seed=seed + 50)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_iso_c_gives_all_directions_the_mean_strength(shape):
    experts = [{"w": random(*shape, seed=seed)} for seed in range(3)]
    total = sum(expert["w"] for expert in experts)
    merged = iso_c(experts, scale=0.5)["w"]
    mean = torch.linalg.svdvals(total).mean()
    torch.testing.assert_close(torch.linalg.svdvals(merged), (0.5 * mean).expand(5))
    U, S, Vt = np.linalg.svd(total.double().numpy(), full_matrices=False)
    expected = torch.from_numpy(0.5 * S.mean() * (U @ Vt)).float()
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-4)


def test_iso_c_invents_no_directions():
    experts = [{"w": low_rank(8, 6, 1, seed)} for seed in range(2)]
    merged = iso_c(experts)["w"]
    values = torch.linalg.svdvals(experts[0]["w"] + experts[1]["w"])[:2]
    torch.testing.assert_close(torch.linalg.svdvals(merged)[:2], values.mean().expand(2))
    assert torch.linalg.svdvals(merged)[2:].max() < 1e-5


def authors_iso_c(matrices):
    """Formula of the authors' code: all min(out, in) directions get the mean of all singular values."""
    U, S, Vt = np.linalg.svd(sum(matrices), full_matrices=False)
    return sum(S.sum() / len(S) * np.outer(U[:, i], Vt[i]) for i in range(len(S)))


@pytest.mark.parametrize(("rank", "count"), [(2, 1), (2, 3), (3, 4)])
def test_iso_c_is_longer_than_the_authors_for_experts_of_low_rank(rank, count):
    """By sqrt(min(out, in) / r), as its docstring says; equal where the sum has full rank."""
    m, n = 12, 15
    changes = [low_rank(m, n, rank, seed) for seed in range(count)]
    theirs = np.linalg.norm(authors_iso_c([change.double().numpy() for change in changes]))
    r = min(rank * count, m)
    ours = iso_c([{"w": change} for change in changes])["w"]
    assert float(ours.norm()) == pytest.approx(theirs * (m / r) ** 0.5, rel=1e-4)
    scaled = iso_c([{"w": change} for change in changes], scale=(r / m) ** 0.5)["w"]
    assert float(scaled.norm()) == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 9])
def test_tsv_m_of_low_rank_has_the_authors_norm(rank):
    matrices = [low_rank(12, 9, rank, seed).double().numpy() for seed in range(3)]
    merged = tsv_m([{"w": torch.from_numpy(matrix).float()} for matrix in matrices])["w"]
    kept = [np.linalg.svd(matrix, compute_uv=False)[: 9 // 3] for matrix in matrices]
    assert float(merged.norm()) == pytest.approx(np.sqrt(np.square(kept).sum()), rel=1e-4)


def numpy_tsv_m(matrices):
    k = min(matrices[0].shape) // len(matrices)
    parts = [np.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    left = np.concatenate([U[:, :k] for U, _, _ in parts], axis=1)
    right = np.concatenate([Vt[:k].T for _, _, Vt in parts], axis=1)
    strengths = np.diag(np.concatenate([S[:k] for _, S, _ in parts]))

    def orthogonal(matrix):  # M (M^T M)^(-1/2), not by SVD
        values, vectors = np.linalg.eigh(matrix.T @ matrix)
        return matrix @ vectors @ np.diag(values**-0.5) @ vectors.T

    return orthogonal(left) @ strengths @ orthogonal(right).T


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_tsv_m_equals_numpy(shape, count):
    matrices = [random(*shape, seed=seed) for seed in range(count)]
    merged = tsv_m([{"w": matrix} for matrix in matrices])["w"]
    expected = numpy_tsv_m([matrix.double().numpy() for matrix in matrices])
    torch.testing.assert_close(merged.double(), torch.from_numpy(expected), atol=1e-4, rtol=1e-3)


def test_tsv_m_of_one_expert_of_low_rank_is_that_expert():
    matrix = low_rank(10, 7, 2)
    torch.testing.assert_close(tsv_m([{"w": matrix}])["w"], matrix, atol=1e-5, rtol=1e-4)


def test_tsv_m_of_orthogonal_experts_is_their_sum():
    first, second = torch.zeros(2, 6, 6)
    first[:2, :2], second[3:5, 3:5] = low_rank(2, 2, 2), low_rank(2, 2, 2, seed=1)
    torch.testing.assert_close(
        tsv_m([{"w": first}, {"w": second}])["w"], first + second, atol=1e-5, rtol=1e-4
    )


def test_more_experts_than_directions():
    experts = [{"w": random(3, 2, seed=seed)} for seed in range(7)]
    assert tsv_m(experts)["w"].isfinite().all()


@pytest.mark.parametrize("method", [iso_c, tsv_m])
def test_what_is_no_matrix_is_averaged(method):
    experts = [{"norm": torch.tensor([1.0, 3.0])}, {"norm": torch.tensor([3.0, 3.0])}, {}]
    assert method(experts)["norm"].tolist() == pytest.approx([4 / 3, 2])


@pytest.mark.parametrize("method", [iso_c, tsv_m])
def test_sparse_experts_equal_dense_ones(method):
    matrices = [torch.where(random(6, 5, seed=s) > 0.5, random(6, 5, seed=s + 9), 0.0) for s in range(3)]
    deltas = [
        SparseDelta(at := matrix.flatten().nonzero().flatten(), matrix.flatten()[at], (6, 5))
        for matrix in matrices
    ]
    merged = method([{"w": delta} for delta in deltas])["w"]
    assert merged.equal(method([{"w": matrix} for matrix in matrices])["w"])
    with pytest.raises(ValueError, match="w: this method needs the shape"):
        method([{"w": (deltas[0].indices, deltas[0].values)}])


@pytest.mark.parametrize("method", [iso_c, tsv_m])
def test_zeros_stay_zeros(method):
    assert method([{"w": torch.zeros(3, 4)}])["w"].equal(torch.zeros(3, 4))


# ---------------------------------------------------------------- LoRA


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_delta_equals_pefts(use_rslora):
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    config = LoraConfig(
        r=3, lora_alpha=12, target_modules=["0"], use_rslora=use_rslora, init_lora_weights=False
    )
    layer = get_peft_model(model, config).base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    delta = lora_delta(A, B, alpha=12, r=3, use_rslora=use_rslora)
    torch.testing.assert_close(delta, layer.get_delta_weight("default"))
    factor = 12 / 3**0.5 if use_rslora else 4
    torch.testing.assert_close(delta, factor * B @ A)


@given(rank=st.integers(1, 7), true=st.integers(1, 5), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_as_lora_is_the_best_approximation(rank, true, seed):
    delta = low_rank(7, 5, true, seed)
    A, B = as_lora(delta, rank)
    assert A.shape == (rank, 5)
    assert B.shape == (7, rank)
    lost = torch.linalg.svdvals(delta)[rank:].square().sum().sqrt()
    torch.testing.assert_close((delta - B @ A).norm(), lost, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), atol=1e-3, rtol=1e-3)


def test_averaged_factors_have_cross_terms():
    experts = [LoraFactors(random(2, 5, seed=s), random(4, 2, seed=s + 5), 2.0) for s in range(2)]
    A, B = average_factors(experts)
    torch.testing.assert_close(A, (experts[0].A + experts[1].A) / 2)
    torch.testing.assert_close(B, experts[0].B + experts[1].B)
    cross = sum(2.0 * one.B @ other.A for one in experts for other in experts) / 4
    torch.testing.assert_close(B @ A, cross)
    with pytest.raises(ValueError, match="Factors of different shapes"):
        average_factors([experts[0], LoraFactors(random(3, 5), random(4, 3))])
    with pytest.raises(ValueError, match="experts is empty"):
        average_factors([])


def test_bad_input_of_as_lora():
    with pytest.raises(ValueError, match="rank=0"):
        as_lora(torch.ones(2, 2), 0)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        as_lora(torch.ones(2), 1)
