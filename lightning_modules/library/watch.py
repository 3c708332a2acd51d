"""Measures what a router does in one layer: load of each expert, entropy, accuracy, abstention.

Shapes: B rows, S positions, E experts, k chosen ones, H heads.
"""

from __future__ import annotations

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


def routing_counts(weight: Tensor, mask: Tensor, own: Tensor) -> Tensor:
    """Sum up what is to be averaged over tokens.

    Args:
        weight: Of each expert (B, S, E).
        mask: 1 on tokens that count (B, S).
        own: The expert of each row's task, -1 for none (B).

    Returns:
        float64 (5 + E): tokens, tokens whose base answers alone, summed entropy in nats of the weights' shares,
        tokens whose task has an expert, those of them that weigh it most, and the summed weight of each expert.

    >>> weight = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
    >>> routing_counts(weight, torch.ones(1, 2), torch.tensor([0])).tolist()[3:]
    [2.0, 2.0, 1.5, 0.5]
    """
    counted = mask.bool()
    total = weight.abs().sum(-1)
    shares = weight.abs() / total.clamp(min=1e-12)[..., None]
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(-1)
    known = counted & (own >= 0)[:, None]
    right = known & (weight.argmax(-1) == own[:, None]) & (total > 0)
    sums = [
        counted.sum(),
        (counted & (total == 0)).sum(),
        (entropy * counted).sum(),
        known.sum(),
        right.sum(),
    ]
    load = (weight * counted[..., None]).sum((0, 1))
    return torch.cat([torch.stack([one.double() for one in sums]), load.double()])
