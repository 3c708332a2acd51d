"""What an optimiser step means for each of several experts.

Shapes: E experts; each tensor's first dimension counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.sharding import local, local_rows, sum_of_shards


def expert_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the norm of each expert's gradient over all tensors, float32 (E).

    Args:
        parameters: Each (E, ...), sharded by experts or plain. Without gradient they count as zero.
    """
    squares_E = torch.zeros(len(parameters[0]), device=local(parameters[0]).device)
    for parameter in parameters:
        if parameter.grad is not None:
            first, end = local_rows(parameter)
            own = local(parameter.grad).flatten(1).float()
            squares_E[first:end] += torch.linalg.vector_norm(own, dim=1).square()
    return sum_of_shards(squares_E, like=parameters[0]).sqrt()


def clip_expert_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale down the gradient of each expert whose norm exceeds a limit, as training it alone would.

    Args:
        parameters: Each (E, ...).
        limit: The largest norm of an expert's gradient.

    Returns:
        The norms before (E).
    """
    norms = expert_norms(parameters)
    factors = (limit / (norms + 1e-6)).clamp(max=1.0)  # torch.nn.utils.clip_grad_norm_ has the same 1e-6
    for parameter in parameters:
        if parameter.grad is not None:
            first, end = local_rows(parameter)
            gradient = local(parameter.grad)
            gradient.mul_(factors[first:end].view(-1, *[1] * (parameter.dim() - 1)).to(gradient.dtype))
    return norms


class KeepAbsent:
    """Keeps an expert and its optimiser state as they are in steps that bring no gradient for it.

    In a stack the optimiser sees one tensor: momentum and weight decay would move experts whose tasks are not in
    the batch. The count of steps inside the optimiser is shared, so Adam's correction of its start, counted in
    steps of the run, is too weak for an expert that was absent in early ones.

    Args:
        parameters: Each (E, ...).
        optimizer: What trains them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: Optimizer) -> None:
        self._parameters = list(parameters)
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._absent: list[Tensor] = []
        if self._parameters:
            optimizer.register_step_pre_hook(self._before)
            optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        is_absent = expert_norms(self._parameters) == 0
        # Once for all layers, which have the same experts: how many are absent is what a GPU's host has to wait for.
        spans = {local_rows(parameter) for parameter in self._parameters}
        rows = {span: is_absent[slice(*span)].nonzero()[:, 0] for span in spans}
        self._absent = [rows[local_rows(parameter)] for parameter in self._parameters]
        self._kept = [(tensor, rows, tensor[rows].clone()) for tensor, rows in self._tensors(optimizer)]

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        known = {tensor.data_ptr() for tensor, _, _ in self._kept}
        for tensor, rows, values in self._kept:
            tensor[rows] = values
        for tensor, rows in self._tensors(optimizer):  # state that this step made
            if tensor.data_ptr() not in known:
                tensor[rows] = 0
        self._kept = []

    def _tensors(self, optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
        """Parameters, and their optimiser state of the same shape, with the rows of absent experts."""
        found: list[tuple[Tensor, Tensor]] = []
        for parameter, rows in zip(self._parameters, self._absent, strict=True):
            if len(rows):
                found.append((local(parameter.detach()), rows))
                state = optimizer.state.get(parameter, {})
                found += [
                    (local(v), rows)
                    for v in state.values()
                    if isinstance(v, Tensor) and v.shape == parameter.shape
                ]
        return found
