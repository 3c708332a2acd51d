"""Polytropon and Multi-Head Adapter Routing: learned weights of every skill for every task.

Shapes: B rows, T tasks, K skills, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli

from datamodules.batches import Prompt
from lightning_modules.library.experts import Experts
from lightning_modules.library.mixing import Routing
from lightning_modules.library.routers.base import Router
from lightning_modules.library.routers.fixed import unknown_task
from lightning_modules.ranges import check_whole


class PolyRouter(Router):
    """Polytropon (arXiv 2202.13914), and with several heads MHR (arXiv 2211.03831).

    Each layer has logits Z (T, H, K) that start in U(-1e-3, 1e-3). A task's weights are sigmoid(Z) divided by
    their sum over skills. A head weighs one of H equal parts of a layer's inputs (in A) and outputs (in B). Both
    papers mix factors: use it with `mixing: factor_mixing`; another mixing is warned of.

    Args:
        tasks: The tasks that it learns weights for; None takes those of the training data.
        num_heads: H; must divide the widths of all layers.
        relaxed: Draw the weights of a training step from a relaxed Bernoulli distribution of temperature 1, as
            Polytropon's paper does and the published settings of its code do not.
        anneal_from: Step at which the weights start to turn uniform, for use on unknown tasks (MHR-mu without further
            training); what tasks have learned apart is then gone. None, the default, keeps each task's weights.
        anneal_until: Step at which they are uniform. In between they are a alpha + (1 - a) / K with
            a = cos(progress pi / 2), as in the code of MHR. None never.

    Raises:
        ValueError: If an argument is out of range.
    """

    mixes_factors = True

    def __init__(
        self,
        tasks: list[str] | None = None,
        num_heads: int = 1,
        relaxed: bool = False,
        anneal_from: int | None = None,
        anneal_until: int | None = None,
    ) -> None:
        super().__init__()
        check_whole("num_heads", num_heads)
        check_whole("anneal_from", anneal_from, least=0, none=True)
        check_whole("anneal_until", anneal_until, none=True)
        if (anneal_from is None) != (anneal_until is None) or (
            anneal_from is not None and anneal_until is not None and not anneal_from < anneal_until
        ):
            raise ValueError(
                f"anneal_from={anneal_from}, anneal_until={anneal_until}: give both, the first one smaller, or none."
            )
        self.tasks = tasks
        self.num_heads = num_heads
        self.relaxed = relaxed
        self.anneal_from = anneal_from
        self.anneal_until = anneal_until
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def prepare(self, experts: Experts) -> None:
        """Number the tasks.

        Raises:
            ValueError: If there is no task, or a width is no multiple of the number of heads.
        """
        super().prepare(experts)
        of_experts = sorted({task for own in experts.tasks.values() for task in own})
        tasks = self.tasks or list(experts.data_tasks) or of_experts
        if not tasks:
            raise ValueError("PolyRouter learns weights for each task, and knows of no task. Set its tasks.")
        self.numbers = {task: number for number, task in enumerate(tasks)}
        for layer, stack in experts.layers.items():
            for side, width in (("inputs", stack.in_features), ("outputs", stack.out_features)):
                if width % self.num_heads:
                    raise ValueError(
                        f"num_heads={self.num_heads} does not divide the {width} {side} of {layer}. Take a divisor."
                    )

    def for_layer(self, layer: str) -> Router:
        """Return a copy with this layer's logits."""
        own = super().for_layer(layer)
        shape = (len(self.numbers), self.num_heads, len(self.names))
        own.logits = nn.Parameter(torch.empty(shape).uniform_(-1e-3, 1e-3))
        return own

    def encode(self, tasks: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
        """Return the number of each row's task (B).

        Raises:
            ValueError: If a task is unknown.
        """
        for task in tasks:
            if task not in self.numbers:
                raise unknown_task(task, self.numbers)
        return torch.tensor([self.numbers[task] for task in tasks])

    def forward(self, x: Tensor, rows: Tensor) -> Routing:
        """Return the weights of the skills: (B, K), or (B, H, K) with several heads."""
        logits = self.get_parameter("logits")[rows.to(x.device)].float()
        if self.training and self.relaxed:
            raw = RelaxedBernoulli(logits.new_tensor(1.0), logits=logits).rsample()
        else:
            raw = logits.sigmoid()
        weight = raw / (raw.sum(-1, keepdim=True) + 1e-12)
        if self.anneal_from is not None and self.anneal_until is not None:
            progress = (self.get_buffer("step") - self.anneal_from) / (self.anneal_until - self.anneal_from)
            kept = torch.cos(progress.clamp(0, 1) * math.pi / 2)
            weight = kept * weight + (1 - kept) / weight.shape[-1]
        return Routing(weight[:, 0]) if self.num_heads == 1 else Routing(weight, heads=True)

    def advance(self) -> None:
        """Count an optimiser step."""
        self.get_buffer("step").add_(1)
