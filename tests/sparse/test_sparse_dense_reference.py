"""Training in place equals a slow twin: y = (W + dW * M) x with dense dW, mask and moments, step for step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_sparse_masks import slow_across, slow_replace, slow_select
from torch import nn

from lightning_modules.sparse import scores
from lightning_modules.sparse.adapter import SparseAdapter
from lightning_modules.sparse.schedules import FirstEpochs, GrowAndDrop, OneShot, Schedule, Static

STEPS, EPOCH, BLOCK, DENSITY = 20, 7, 3, 0.3
STRUCTURES = ["element", "row", "column", "block"]
LR, BETAS, EPS = 0.01, (0.9, 0.999), 1e-8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(6, 10), nn.LayerNorm(10)
        self.second, self.third = nn.Linear(10, 8, bias=False), nn.Linear(8, 5)

    def forward(self, x):
        return self.third(torch.tanh(self.second(self.norm(torch.tanh(self.first(x))))))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(12, 6, generator=generator), torch.randint(0, 5, (12,), generator=generator)


def epoch_of(step) -> int:
    """Of a step that counts from 1."""
    return (step - 1) // EPOCH


class Twin:
    """The slow way. dW keeps values outside of the mask only where the schedule says so."""

    def __init__(self, net, schedule, score, structure, budget, decay) -> None:
        self.net, self.schedule, self.score = net, schedule, score
        self.structure, self.budget, self.decay = structure, budget, decay
        self.names = ["first.weight", "second.weight"]
        self.W = {name: net.get_parameter(name).detach().clone() for name in self.names}
        self.dW, self.m, self.v = ({n: torch.zeros_like(w) for n, w in self.W.items()} for _ in range(3))
        self.step, self.t = 0, 0
        self.sums: dict = {}
        self.trains = not isinstance(schedule, Static)
        self.is_dense = isinstance(schedule, OneShot | FirstEpochs)
        self.M = {n: torch.full_like(w, float(self.is_dense)) for n, w in self.W.items()}
        if isinstance(schedule, GrowAndDrop):
            self.choose({n: schedule.first_score(w, self.dW[n], w * 0) for n, w in self.W.items()})
        if isinstance(schedule, Static) and schedule.batches == 0:
            self.choose({n: score(w, self.dW[n], w * 0) for n, w in self.W.items()})
            self.trains = True

    def forward(self, x):
        self.effective = {n: (self.W[n] + self.dW[n] * self.M[n]).requires_grad_() for n in self.names}
        return torch.func.functional_call(self.net, self.effective, (x,))

    def choice_after(self, step) -> bool:
        """Whether a choice comes after this step, as the docstrings of the schedules say it."""
        s = self.schedule
        if isinstance(s, Static):
            return step == s.batches
        if isinstance(s, OneShot):
            return step == s.steps
        if isinstance(s, FirstEpochs):
            return step == s.every or (step % s.every == 0 and epoch_of(step) < s.epochs)
        return step % s.every == 0 and step < s.steps

    def update(self) -> None:
        self.step += 1
        gradients = {name: weight.grad for name, weight in self.effective.items()}
        if any(self.choice_after(later) for later in range(self.step, self.step + self.schedule.batches)):
            for name, gradient in gradients.items():
                new = self.score(self.effective[name].detach(), self.dW[name], gradient)
                self.sums[name] = self.sums.get(name, 0) + new
        if self.trains:
            self.adam(gradients)
        if self.choice_after(self.step):
            self.choose(self.sums)
            self.sums = {}
            self.trains = True

    def adam(self, gradients) -> None:
        self.t += 1
        for name, M in self.M.items():
            g, m, v, dW = gradients[name] * M, self.m[name], self.v[name], self.dW[name]
            m.copy_(BETAS[0] * m + (1 - BETAS[0]) * g)
            v.copy_(BETAS[1] * v + (1 - BETAS[1]) * g * g)
            m_hat, v_hat = m / (1 - BETAS[0] ** self.t), v / (1 - BETAS[1] ** self.t)
            change = -LR * self.decay * dW - LR * m_hat / (v_hat.sqrt() + EPS)
            dW += change * M

    def choose(self, sums) -> None:
        if isinstance(self.schedule, GrowAndDrop) and self.step > 0:
            share = self.schedule.fraction * (1 - self.step / self.schedule.steps)
            chosen = {
                n: slow_replace(positions(self.M[n]), self.dW[n].abs(), s, share, self.structure, BLOCK)
                for n, s in sums.items()
            }
        elif self.budget == "global":
            chosen = slow_across(sums, DENSITY, self.structure, BLOCK)
        else:
            chosen = {n: slow_select(s, DENSITY, self.structure, BLOCK) for n, s in sums.items()}
        keeps = isinstance(self.schedule, FirstEpochs) and self.schedule.keeps
        for name, where in chosen.items():
            old, self.M[name] = self.M[name], torch.zeros_like(self.M[name])
            self.M[name].view(-1)[where] = 1
            stayed = old * self.M[name]
            self.m[name] *= stayed
            self.v[name] *= stayed
            if not keeps:
                self.dW[name] *= self.M[name]
        self.is_dense = False


def positions(M) -> torch.Tensor:
    return M.flatten().nonzero().flatten()


def squared_mean(weight, delta, gradient) -> torch.Tensor:
    """A score that is not linear in the gradient of the batch."""
    return gradient.square()


SCHEDULES = {
    "static0": (Static(0), scores.weight_magnitude),
    "static1": (Static(1), scores.snip),
    "static2": (Static(2), squared_mean),
    "one_shot": (OneShot(6), scores.delta_magnitude),
    "one_shot_batches": (OneShot(6, batches=3), scores.sensitivity),
    "first_epochs": (FirstEpochs(3), scores.signed_sensitivity),
    "first_epochs_forgets": (FirstEpochs(3, keeps=False), scores.gradient_magnitude),
    "first_epochs_several": (FirstEpochs(4, epochs=2, batches=2), scores.sensitivity),
    "first_epochs_several_forgets": (FirstEpochs(2, epochs=2, batches=2, keeps=False), scores.snip),
    "first_epochs_long": (FirstEpochs(9), scores.sensitivity),
    "grow_and_drop": (
        GrowAndDrop(4, 15, fraction=0.7, first_score=scores.weight_magnitude),
        scores.gradient_magnitude,
    ),
    "grow_and_drop_batches": (
        GrowAndDrop(3, 100, fraction=1.0, batches=2, first_score=scores.weight_magnitude),
        scores.snip,
    ),
}
# Steps after which the choice is another one; where the schedule chooses anew.
CHANGES = {
    "static0": [],
    "static1": [1],
    "static2": [2],
    "one_shot": [6],
    "one_shot_batches": [6],
    "first_epochs": [3, 6],
    "first_epochs_forgets": [3, 6],
    "first_epochs_several": [4, 8, 12],
    "first_epochs_several_forgets": [2, 4, 6, 8, 10, 12, 14],
    "first_epochs_long": [9],
    "grow_and_drop": [4, 8, 12],
    "grow_and_drop_batches": [3, 6, 9, 12, 15, 18],
}


def run(
    schedule: Schedule, score, structure, budget="layer", optimizer="AdamW"
) -> tuple[list[int], list[int]]:
    """Train both ways, compare after each step; return the steps that changed the choice, and sizes."""
    decay = 0.1 if optimizer == "AdamW" else 0.0
    net = Net()
    adapter = SparseAdapter("first|second", DENSITY, score, structure, BLOCK, budget, schedule)
    adapter.attach(net)
    twin = Twin(Net(), schedule, score, structure, budget, decay)
    trained = [p for p in net.parameters() if p.requires_grad]
    assert len(trained) == 2
    optim = getattr(torch.optim, optimizer)(trained, lr=LR, betas=BETAS, eps=EPS, weight_decay=decay)
    step = 0
    adapter.watch(optim, lambda: epoch_of(step))
    changed, before = [], None
    for step in range(1, STEPS + 1):
        x, y = batch(step)
        ours, theirs = net(x), twin.forward(x)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        losses = [F.cross_entropy(logits, y) for logits in (ours, theirs)]
        torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
        optim.zero_grad()
        for loss in losses:
            loss.backward()
        optim.step()
        twin.update()
        for weight in adapter.weights:
            if not twin.trains:
                assert not weight.values.any()
                continue
            M = twin.M[weight.name]
            assert (weight.indices is None) == twin.is_dense
            if not twin.is_dense:
                assert weight.indices.dtype == torch.int32
                assert weight.indices.tolist() == positions(M).tolist(), step
            expected = twin.dW[weight.name].flatten()[positions(M)]
            torch.testing.assert_close(weight.values.detach(), expected, atol=1e-5, rtol=0)
        now = {weight.name: weight.delta.indices.tolist() for weight in adapter.weights}
        if before is not None and now != before:
            changed.append(step)
        before = now
    assert sum(float(weight.values.detach().abs().sum()) for weight in adapter.weights) > 0.1
    sizes = [len(weight.values) for weight in adapter.weights]
    adapter.remove()
    for name, tensor in Net().state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name
    return changed, sizes


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_equals_the_dense_twin(name, structure):
    changed, _ = run(*SCHEDULES[name], structure)
    # The first step has none before it to differ from; and few units may happen to stay the same.
    expected = [step for step in CHANGES[name] if step > 1]
    assert set(changed) <= set(expected)
    if structure == "element":
        assert changed == expected


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["static0", "static1", "one_shot", "first_epochs", "grow_and_drop"])
def test_every_step_equals_the_dense_twin_where_weights_compete(name, structure):
    run(*SCHEDULES[name], structure, budget="global")


@pytest.mark.parametrize("name", ["static2", "first_epochs", "grow_and_drop"])
def test_every_step_equals_the_dense_twin_under_adam(name):
    run(*SCHEDULES[name], "element", optimizer="Adam")


def test_where_weights_compete_one_may_get_nothing():
    """And is trained all the same, as far as that goes."""

    def position(weight, delta, gradient):
        return (weight * gradient).abs() + 10 * (len(weight) == 8)

    assert run(Static(1), position, "element", budget="global") == ([], [0, 42])
