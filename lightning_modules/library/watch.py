"""Measures what a router does in one layer: load of each expert, entropy, accuracy, abstention.

Shapes: B rows, S positions, E experts, T tasks that one expert has for itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_modules.library.mixing import Routing


def dense_weights(routing: Routing, num_experts: int, shape: tuple[int, int]) -> Tensor:
    """Spread a routing decision over all experts and tokens.

    Args:
        routing: The decision.
        num_experts: E.
        shape: (B, S).

    Returns:
        The weight of each expert, float32 (B, S, E); with heads their mean.
    """
    weight = routing.weight.detach().float()
    if routing.heads:
        weight = weight.mean(1)
    if routing.index is not None:
        zeros = weight.new_zeros(*weight.shape[:-1], num_experts)
        weight = zeros.scatter_add(-1, routing.index, weight)
    if weight.dim() == 1:
        weight = weight[None]
    if weight.dim() == 2:
        weight = weight[:, None]
    return weight.expand(*shape, num_experts)


def token_sums(weight: Tensor, mask: Tensor, row_task: Tensor, owners: Tensor) -> Tensor:
    """Sum up over tokens what is to be averaged.

    Args:
        weight: Of each expert (B, S, E).
        mask: 1 on tokens that count (B, S).
        row_task: The number of each row's task, -1 for none that one expert has for itself (B).
        owners: The expert of each task (T).

    Returns:
        float32 (3 + E + 2T): tokens; those that abstain; the entropy of the shares in nats; the weight of each
        expert; by task the tokens whose heaviest expert is the task's, and all its tokens.

    >>> weight = torch.tensor([[[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]])
    >>> token_sums(weight, torch.ones(1, 3), torch.tensor([0]), torch.tensor([1])).tolist()[3:]
    [1.5, 0.5, 0.5, 3.0]
    """
    counted = mask.to(weight)
    size = weight.abs()
    total = size.sum(-1)
    shares = size / total.clamp(min=1e-12)[..., None]
    entropy = torch.special.entr(shares).sum(-1)
    answers = counted * (total > 0)
    sums = [torch.stack([counted.sum(), counted.sum() - answers.sum(), (entropy * counted).sum()])]
    sums.append(torch.einsum("bse,bs->e", weight, counted))
    if not len(owners):
        return torch.cat(sums)
    heaviest = (weight == weight.amax(-1, keepdim=True)).to(weight)
    own = owners[row_task.clamp(min=0)][:, None, None].expand(*weight.shape[:2], 1)
    right = (heaviest / heaviest.sum(-1, keepdim=True)).gather(-1, own)[..., 0]
    known = row_task >= 0
    for values in (right * answers, counted):
        zeros = values.new_zeros(len(owners))
        sums.append(zeros.index_add(0, row_task.clamp(min=0), values.sum(1) * known))
    return torch.cat(sums)


def own_tasks(experts: Sequence[str], tasks: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Number the expert of each task that no other expert has too.

    >>> own_tasks(["a", "b"], {"a": ["sums", "all"], "b": ["all", "logic"]})
    {'sums': 0, 'logic': 1}
    """
    claims = Counter(task for name in experts for task in set(tasks[name]))
    return {task: number for number, name in enumerate(experts) for task in tasks[name] if claims[task] == 1}
