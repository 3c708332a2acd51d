"""Clustering finds planted families of experts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics import adjusted_rand_score

from lightning_modules.cli import main
from lightning_modules.library.clustering import change_similarity, cluster, cosine, embed, flatten_factors
from lightning_modules.library.clusters import read_clusters
from lightning_modules.library.publish import write_expert
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.merging.lora import LoraFactors

FAMILIES = {f"{family}_{i}": family for i in range(5) for family in ("red", "green", "blue")}


def trained_experts(rank: int = 4, steps: int = 60) -> dict[str, dict[str, LoraFactors]]:
    """Train LoRA factors on regression tasks of three families, all from the same start."""
    torch.manual_seed(0)
    W = {"l1": torch.randn(12, 20), "l2": torch.randn(8, 20)}
    centres = {
        family: {layer: torch.randn_like(w) for layer, w in W.items()} for family in set(FAMILIES.values())
    }
    start = {layer: torch.randn(rank, 20) / 20**0.5 for layer in W}
    experts = {}
    for name, family in FAMILIES.items():
        own = {}
        for layer, w in W.items():
            target = centres[family][layer] + 0.5 * torch.randn_like(w)
            A = start[layer].clone().requires_grad_()
            B = torch.zeros(len(w), rank, requires_grad=True)
            optimizer = torch.optim.SGD([A, B], lr=0.1)
            x = torch.randn(64, 20)
            for _ in range(steps):
                optimizer.zero_grad()
                (x @ (B @ A - target).T).square().mean().backward()
                optimizer.step()
            own[layer] = LoraFactors(A.detach(), B.detach(), 2.0)
        experts[name] = own
    return experts


@pytest.fixture(scope="module")
def experts():
    return trained_experts()


def test_planted_families_are_found(experts):
    vectors = [flatten_factors(one) for one in experts.values()]
    for similarity in (cosine(embed(vectors)), change_similarity(list(experts.values()))):
        found = cluster(list(experts), similarity, 3)
        assert adjusted_rand_score(list(FAMILIES.values()), found.labels) == 1.0
        assert found.within > found.between
        assert found.labels[0] == 0  # numbered by first appearance


def test_equals_scikit_learn_by_hand(experts):
    vectors = [flatten_factors(one) for one in experts.values()]
    rows = np.stack([v.numpy() for v in vectors])
    for row in rows:
        row[np.abs(row) <= np.sort(np.abs(row))[int(0.5 * len(row)) - 1]] = 0
    reduced = TruncatedSVD(len(rows), n_iter=5, random_state=42).fit_transform(rows)
    unit = reduced / np.linalg.norm(reduced, axis=1, keepdims=True)
    np.testing.assert_allclose(cosine(embed(vectors)), unit @ unit.T, atol=1e-4)
    labels = KMeans(3, n_init=10, random_state=42).fit_predict(unit @ unit.T)
    assert adjusted_rand_score(labels, cluster(list(experts), cosine(embed(vectors)), 3).labels) == 1.0


def test_change_similarity_is_that_of_dense_changes(experts):
    chosen = list(experts.values())[:4]
    chosen.append(
        {"l1": LoraFactors(torch.randn(7, 20), torch.randn(12, 7), 0.3)}
    )  # another rank, fewer layers
    dense = []
    for one in chosen:
        parts = [(one[k].B @ one[k].A * one[k].scaling).flatten() if k in one else torch.zeros(n)
                 for k, n in (("l1", 240), ("l2", 160))]  # fmt: skip
        dense.append(torch.cat(parts).double())
    D = torch.stack(dense)
    expected = torch.nn.functional.cosine_similarity(D[:, None], D[None], dim=-1)
    np.testing.assert_allclose(change_similarity(chosen), expected.numpy(), atol=1e-5)


def test_order_does_not_matter(experts):
    names = list(experts)
    shuffled = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(1))]
    groups = []
    for order in (names, shuffled):
        found = cluster(order, change_similarity([experts[n] for n in order]), 3)
        groups.append({frozenset(own) for own in found.members().values()})
    assert groups[0] == groups[1]


def test_what_cannot_be_clustered_is_refused(experts):
    one = next(iter(experts.values()))
    with pytest.raises(ValueError, match="num_clusters=4: there are 3 experts"):
        cluster(["a", "b", "c"], np.eye(3), 4)
    with pytest.raises(ValueError, match="num_clusters=0"):
        cluster(["a"], np.eye(1), 0)
    with pytest.raises(ValueError, match="differ in rank or in layers"):
        embed([torch.ones(3), torch.ones(4)])
    with pytest.raises(ValueError, match="expert number 2 changes nothing"):
        embed([torch.ones(3), torch.zeros(3)])
    with pytest.raises(ValueError, match="changes nothing"):
        change_similarity([one, {"l1": LoraFactors(torch.zeros(1, 20), torch.zeros(12, 1))}])
    assert cluster(["a"], np.eye(1), 1).members() == {"cluster_0": ["a"]}


def make_library(root, experts) -> None:
    store = AdapterLibrary(root / "library", create=True)
    for name, own in experts.items():
        folder = root / "made" / name
        folder.mkdir(parents=True)
        write_expert(folder, {layer: (f.A, f.B, f.scaling) for layer, f in own.items()}, "base/model")
        store.add(folder, tasks=[f"task_{name}"])


def test_the_command(experts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_library(tmp_path, experts)
    families: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        families.setdefault(family, []).append(f"task_{name}")
    (tmp_path / "families.json").write_text(json.dumps({"families": families}))
    for by in ("factors", "change"):
        code = main(["library", "cluster", "library", "--num_clusters", "3", "--by", by, "--output", f"{by}.json",
                     "--families", "families.json"])  # fmt: skip
        assert code == 0
        assert "adjusted Rand index against families.json: 1.000" in capsys.readouterr().out
        found = read_clusters(f"{by}.json")
        assert sorted(map(sorted, found.values())) == sorted(map(sorted, families.values()))
        assert (tmp_path / f"{by}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["library", "--num_clusters", "16"], "num_clusters=16: there are 15 experts"),
        (["nowhere"], "is no adapter library"),
        (["library", "--num_clusters", "3", "--families", "bad.json"], "lacks 'task_red_0'"),
    ],
)
def test_the_command_refuses(experts, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    make_library(tmp_path, experts)
    (tmp_path / "bad.json").write_text('{"families": {"a": ["b"]}}')
    assert main(["library", "cluster", *arguments]) == 1
    assert message.replace("'task_red_0'", "'task_") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds no JSON object"),
        ("{}", "names no clusters"),
        ('{"clusters": {"a": []}}', "no list of task names"),
        ('{"clusters": {"a": ["t"], "b": ["t"]}}', "is in 'a' and in 'b'"),
    ],
)
def test_bad_cluster_files(tmp_path, text, message):
    file = tmp_path / "clusters.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_clusters(str(file))
    with pytest.raises(ValueError, match="there is no such file"):
        read_clusters(str(tmp_path / "none.json"))
