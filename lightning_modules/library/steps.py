"""What an optimiser step means for each of several experts.

Shapes: E experts; each tensor's first dimension counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def expert_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the norm of each expert's gradient over all tensors, float32 (E).

    Args:
        parameters: Each (E, ...). Without gradient they count as zero.
    """
    squares = [
        torch.linalg.vector_norm(p.grad.flatten(1).float(), dim=1).square()
        if p.grad is not None
        else p.new_zeros(len(p), dtype=torch.float32)
        for p in parameters
    ]
    return torch.stack(squares).sum(0).sqrt()


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
            parameter.grad.mul_(factors.view(-1, *[1] * (parameter.dim() - 1)).to(parameter.grad.dtype))
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
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._absent = torch.zeros(0, dtype=torch.int64)
        if self._parameters:
            optimizer.register_step_pre_hook(self._before)
            optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        self._absent = (expert_norms(self._parameters) == 0).nonzero()[:, 0]
        if len(self._absent):
            self._kept = [(tensor, tensor[self._absent].clone()) for tensor in self._tensors(optimizer)]

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if len(self._absent):
            known = {tensor.data_ptr() for tensor, _ in self._kept}
            for tensor, values in self._kept:
                tensor[self._absent] = values
            for tensor in self._tensors(optimizer):  # state that this step made
                if tensor.data_ptr() not in known:
                    tensor[self._absent] = 0
        self._kept = []

    def _tensors(self, optimizer: Optimizer) -> list[Tensor]:
        """Parameters, and their optimiser state of the same shape."""
        found: list[Tensor] = []
        for parameter in self._parameters:
            found.append(parameter.detach())
            state = optimizer.state.get(parameter, {})
            found += [v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]
        return found
