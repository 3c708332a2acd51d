"""Each router against a loop over tokens and experts, written from its formula.

Shapes: B rows, S positions, E experts.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import RelaxedBernoulli

from lightning_modules.library.experts import Experts
from lightning_modules.library.layers import LoraStack
from lightning_modules.library.routers.fixed import TaskRouter, UniformRouter, WeightsRouter
from lightning_modules.library.routers.learned import LinearRouter, PhatgooseGates
from lightning_modules.library.routers.poly import PolyRouter
from lightning_modules.library.routers.token import (
    ArrowRouter,
    CentroidRouter,
    PhatgooseRouter,
    SpectralRouter,
    TokenRouter,
)
from lightning_modules.library.watch import dense_weights

B, S, E, IN, OUT, R = 3, 5, 6, 8, 12, 2
NAMES = tuple("abcdef")


@pytest.fixture
def stack():
    torch.manual_seed(0)
    present = torch.tensor([True, True, False, True, True, True])
    A, B_ = torch.randn(E, R, IN), torch.randn(E, OUT, R)
    A[2] = B_[2] = 0
    return LoraStack(A, B_, torch.full((E,), 2.0), present, [R] * E, trained=False)


@pytest.fixture
def experts(stack):
    return Experts(NAMES, {name: (f"task {name}",) for name in NAMES}, {"layer": stack})


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(B, S, IN)


def ready(router, experts):
    router.prepare(experts)
    return router.for_layer("layer")


def by_hand(scores, top_k, temperature, threshold, x):
    """Scores (B, S, E) as nested loops to weights (B, S, E)."""
    weights = torch.zeros(B, S, E)
    for b in range(B):
        for s in range(S):
            best = sorted(range(E), key=lambda e: -scores[b][s][e])[: top_k or E]
            best = [e for e in best if scores[b][s][e] > -math.inf]
            exponentials = {e: math.exp(scores[b][s][e] / temperature) for e in best}
            if threshold is not None and max(scores[b][s]) / float(x[b, s].norm()) < threshold:
                continue
            for e in best:
                weights[b, s, e] = exponentials[e] / sum(exponentials.values())
    return weights


def check(router, experts, x, score, top_k, temperature, threshold=None):
    own = ready(router, experts)
    scores = [
        [[score(x[b, s], e) if e != 2 else -math.inf for e in range(E)] for s in range(S)] for b in range(B)
    ]
    got = dense_weights(own(x, None), E, (B, S))
    torch.testing.assert_close(got, by_hand(scores, top_k, temperature, threshold, x), rtol=1e-4, atol=1e-5)
    return got


@pytest.mark.parametrize("top_k", [1, 2, 4, 6, None])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_arrow(experts, stack, x, top_k, temperature):
    def score(token, e):
        change = (stack.B[e] @ stack.A[e]).double()
        return abs(float(token.double() @ torch.linalg.svd(change)[2][0]))

    check(ArrowRouter(top_k, temperature), experts, x, score, top_k, temperature)


@pytest.mark.parametrize("threshold", [0.0, 0.6, 2.0])
def test_arrow_abstains(experts, stack, x, threshold):
    def score(token, e):
        return abs(float(token.double() @ torch.linalg.svd((stack.B[e] @ stack.A[e]).double())[2][0]))

    got = check(ArrowRouter(2, threshold=threshold), experts, x, score, 2, 1.0, threshold)
    abstained = got.sum(-1) == 0
    assert bool(abstained.all()) == (threshold == 2.0)
    assert bool(abstained.any()) == (threshold > 0)


def test_spectr(experts, stack, x):
    check(SpectralRouter(3), experts, x, lambda t, e: float((stack.B[e] @ stack.A[e] @ t).norm()), 3, 1.0)


class Found(dict):
    """A library that has arrays of every expert."""

    root = "here"

    def find_arrays(self, name, kind, settings):
        return self.get((name, kind))


def with_centroids(experts, centroids):
    library = Found({(n, "centroid"): {"layer": c} for n, c in zip(NAMES, centroids, strict=True)})
    return Experts(NAMES, experts.tasks, experts.layers, library)


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize(("temperature", "top_k"), [(None, None), (0.5, 2)])
def test_cm(experts, x, temperature, top_k, threshold):
    """The paper's: softmax of cosines, temperature 1, over all experts."""
    torch.manual_seed(2)
    centroids = nn.functional.normalize(torch.randn(E, IN), dim=1)
    own = ready(CentroidRouter(top_k, temperature, threshold), with_centroids(experts, centroids))
    cosines = nn.functional.cosine_similarity(x[:, :, None], centroids, dim=-1)
    cosines[..., 2] = -math.inf
    best = cosines.topk(top_k or E).values
    expected = cosines.masked_fill(cosines < best[..., -1:], -math.inf).div(temperature or 1.0).softmax(-1)
    if threshold is not None:
        expected = expected * (best[..., :1] >= threshold)
        assert 0 < int((expected.sum(-1) == 0).sum()) < B * S
    torch.testing.assert_close(dense_weights(own(x, None), E, (B, S)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_cm_finds_the_centroid_of_a_distinct_input_whatever_its_size(experts, size):
    """Five experts present, of centroids at right angles: e / (e + 4), not 1 / 5."""
    centroids = torch.eye(IN)[:E]
    own = ready(CentroidRouter(), with_centroids(experts, centroids))
    got = dense_weights(own(size * centroids[None, [3]], None), E, (1, 1))[0, 0]
    assert int(got.argmax()) == 3
    assert float(got[3]) == pytest.approx(math.e / (math.e + 4), abs=1e-5)


def test_phatgoose(experts, x):
    torch.manual_seed(3)
    gates = torch.randn(E, IN)
    library = Found({(n, "phatgoose"): {"layer": g} for n, g in zip(NAMES, gates, strict=True)})

    def normal(vector):
        centred = vector - vector.mean()
        return centred / torch.sqrt((centred**2).mean() + 1e-5)

    check(
        PhatgooseRouter(2), Experts(NAMES, experts.tasks, experts.layers, library), x,
        lambda t, e: float(normal(t) @ normal(gates[e])) / math.sqrt(IN), 2, 1.0,
    )  # fmt: skip


@pytest.mark.parametrize("router", [ArrowRouter, SpectralRouter, LinearRouter])
def test_more_than_there_are_is_refused(experts, router):
    with pytest.raises(ValueError, match="top_k=7, but there are only 6 experts"):
        router(top_k=7).prepare(experts)


def test_linear(experts, x):
    torch.manual_seed(4)
    own = ready(LinearRouter(2, init=3.0), experts)
    weights = own.weights.detach()
    scores = [[[float(x[b, s] @ weights[e]) if e != 2 else -math.inf for e in range(E)] for s in range(S)]
              for b in range(B)]  # fmt: skip
    got = dense_weights(own(x, None), E, (B, S))
    torch.testing.assert_close(got, by_hand(scores, 2, 1.0, None, x), rtol=1e-4, atol=1e-5)
    assert own.weights.requires_grad


def test_hard_linear_is_even_forward_and_softmax_backward(experts, x):
    torch.manual_seed(4)
    hard, soft = (
        ready(LinearRouter(2, hard=True, init=3.0), experts),
        ready(LinearRouter(2, init=3.0), experts),
    )
    soft.weights.data.copy_(hard.weights)
    even, plain = hard(x, None), soft(x, None)
    torch.testing.assert_close(even.weight, torch.full((B, S, 2), 0.5))
    seed = torch.randn(B, S, 2)
    torch.testing.assert_close(
        torch.autograd.grad((even.weight * seed).sum(), hard.weights)[0],
        torch.autograd.grad((plain.weight * seed).sum(), soft.weights)[0],
    )


def test_uniform_and_given_weights(experts, x):
    got = dense_weights(ready(UniformRouter(), experts)(x, None), E, (B, S))
    torch.testing.assert_close(got, torch.full((B, S, E), 1 / E))
    got = dense_weights(ready(WeightsRouter({"b": 0.5, "e": -1.0}), experts)(x, None), E, (B, S))
    torch.testing.assert_close(got[2, 3], torch.tensor([0, 0.5, 0, 0, -1.0, 0]))
    with pytest.raises(ValueError, match="no expert 'z'"):
        WeightsRouter({"z": 1.0}).prepare(experts)


def test_task(experts, x):
    router = TaskRouter()
    own = ready(router, experts)
    rows = router.encode(["task d", "task a", "task f"], [""] * 3)
    got = dense_weights(own(x, rows), E, (B, S))
    for b, e in enumerate((3, 0, 5)):
        torch.testing.assert_close(got[b], torch.eye(E)[e].expand(S, E))
    with pytest.raises(ValueError, match=r"does not know the task 'task g'\. Did you mean"):
        router.encode(["task a", "task g"], ["", ""])
    router = TaskRouter(default="b")
    ready(router, experts)
    assert router.encode(["task c", "unheard of"], ["", ""]).tolist() == [2, 1]
    with pytest.raises(ValueError, match="both say that 'same'"):
        TaskRouter().prepare(Experts(("a", "b"), {"a": ("same",), "b": ("same",)}, experts.layers))


def test_phatgoose_gates(experts, x):
    router = PhatgooseGates()
    own = ready(router, experts)
    torch.nn.init.normal_(own.gates)
    rows = router.encode(["task d", "task a", "task f"], [""] * 3)
    got = dense_weights(own(x, rows), E, (B, S))
    for b, e in enumerate((3, 0, 5)):
        for s in range(S):
            expected = torch.zeros(E)
            expected[e] = 1 / (1 + math.exp(-float(own.gates[e] @ x[b, s])))
            torch.testing.assert_close(got[b, s], expected)


@pytest.mark.parametrize("heads", [1, 4])
def test_poly(experts, x, heads):
    router = PolyRouter(["u", "v"], num_heads=heads)
    own = ready(router, experts)
    torch.nn.init.normal_(own.logits)
    rows = router.encode(["v", "u", "v"], [""] * 3)
    routing = own(x, rows)
    weight = routing.weight if heads > 1 else routing.weight[:, None]
    for b, t in enumerate((1, 0, 1)):
        for h in range(heads):
            raw = [1 / (1 + math.exp(-float(own.logits[t, h, e]))) for e in range(E)]
            torch.testing.assert_close(weight[b, h], torch.tensor([one / sum(raw) for one in raw]))
    with pytest.raises(ValueError, match="does not know the task 'w'"):
        router.encode(["w"], [""])


def test_relaxed_poly_draws_from_the_relaxed_bernoulli(experts, x):
    router = PolyRouter(["u"], relaxed=True)
    own = ready(router, experts)
    torch.manual_seed(5)
    got = own(x, torch.tensor([0, 0, 0])).weight
    torch.manual_seed(5)
    raw = RelaxedBernoulli(torch.tensor(1.0), logits=own.logits[[0, 0, 0]].detach()).rsample()[:, 0]
    torch.testing.assert_close(got.detach(), raw / raw.sum(-1, keepdim=True))
    own.eval()
    assert not torch.equal(own(x, torch.tensor([0, 0, 0])).weight, got)


def test_poly_anneals_to_uniform(experts, x):
    own = ready(PolyRouter(["u"], anneal_from=2, anneal_until=6), experts)
    torch.nn.init.normal_(own.logits)
    start = own(x, torch.tensor([0])).weight.detach()
    for step in range(9):
        kept = math.cos(min(max((step - 2) / 4, 0), 1) * math.pi / 2)
        torch.testing.assert_close(own(x, torch.tensor([0])).weight, kept * start + (1 - kept) / E)
        own.advance()


def test_settings_are_checked():
    for bad in ({"top_k": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ArrowRouter(**bad)
    for bad in ({"num_heads": 0}, {"anneal_from": 3}, {"anneal_from": 3, "anneal_until": 2}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PolyRouter(["u"], **bad)


def test_heads_must_divide_widths(experts):
    with pytest.raises(ValueError, match="num_heads=5 does not divide the 8 inputs of layer"):
        PolyRouter(["u"], num_heads=5).prepare(experts)


def test_layers_get_arrays_of_their_own(stack, x):
    """What one layer's router does must not depend on another layer's experts."""
    torch.manual_seed(9)
    other = LoraStack(
        torch.randn(E, R, IN), torch.randn(E, OUT, R), torch.ones(E), torch.ones(E, dtype=torch.bool), [R] * E,
        trained=False,
    )  # fmt: skip
    both = Experts(NAMES, dict.fromkeys(NAMES, ()), {"layer": stack, "other": other})
    alone = Experts(NAMES, dict.fromkeys(NAMES, ()), {"layer": stack})
    first, second = ArrowRouter(2), ArrowRouter(2)
    first.prepare(both)
    second.prepare(alone)
    assert isinstance(first, TokenRouter)
    assert torch.equal(first.for_layer("layer")(x, None).weight, second.for_layer("layer")(x, None).weight)
    assert not torch.equal(first.for_layer("other")(x, None).weight, first.for_layer("layer")(x, None).weight)
