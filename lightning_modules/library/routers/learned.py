"""Routers that are trained: gates of single experts, and a linear token router.

Shapes: B rows, S positions, E experts, k chosen ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_modules.library.experts import Experts
from lightning_modules.library.mixing import Routing
from lightning_modules.library.routers.base import Router, without_autocast
from lightning_modules.library.routers.fixed import TaskRouter
from lightning_modules.library.routers.token import TokenRouter
from lightning_modules.ranges import check_number


class PhatgooseGates(TaskRouter):
    """Trains the gates of Phatgoose (arXiv 2402.05859): the row's own expert, weighted by sigmoid(v . x).

    Experts stay as they are; each gate v starts at 0, where its expert counts half. `PhatgooseRouter` routes by
    them.
    """

    kind = "phatgoose"

    def prepare(self, experts: Experts) -> None:
        """Assign tasks, and note how wide the layers are."""
        super().prepare(experts)
        self._widths = {layer: (len(stack), stack.in_features) for layer, stack in experts.layers.items()}

    def for_layer(self, layer: str) -> Router:
        """Return a copy with this layer's gates (E, in)."""
        own = super().for_layer(layer)
        own.gates = nn.Parameter(torch.zeros(self._widths[layer]))
        return own

    def per_expert_parameters(self) -> list[nn.Parameter]:
        """Return the gates."""
        return [self.gates]  # type: ignore[list-item]

    def forward(self, x: Tensor, rows: Tensor) -> Routing:
        """Return the row's expert and its gate for each token (B, S, 1)."""
        rows = rows.to(x.device)
        gates = self.get_parameter("gates")[rows].float()  # (B, in)
        with without_autocast(x.device):
            weight = torch.einsum("bsi,bi->bs", x.float(), gates).sigmoid()
        return Routing(weight[..., None], rows[:, None, None].expand(*x.shape[:2], 1))


class LinearRouter(TokenRouter):
    """A learned linear map from the input to the scores of the experts, trained by supervision (MoLE-like).

    Args:
        top_k: Experts per token; None keeps all.
        temperature: Divides the scores before the softmax.
        hard: Weigh the chosen experts equally in the forward pass, while gradients flow as through the softmax
            (straight-through; with top_k 1 the expert's change keeps its size).
        init: Scale of the initial weights, drawn from N(0, init^2 / in).
    """

    def __init__(
        self, top_k: int | None = None, temperature: float = 1.0, hard: bool = False, init: float = 0.02
    ) -> None:
        super().__init__(top_k, temperature)
        check_number("init", init, least=0)
        self.hard = hard
        self.init = init

    def tables(self, experts: Experts) -> dict[str, Tensor]:
        """Return the initial weights (E, in)."""
        return {
            layer: torch.randn(len(stack), stack.in_features) * self.init / stack.in_features**0.5
            for layer, stack in experts.layers.items()
        }

    def for_layer(self, layer: str) -> Router:
        """Return a copy with trainable weights."""
        own = super().for_layer(layer)
        weights = own.get_buffer("table").clone()
        del own.table
        own.weights = nn.Parameter(weights)
        return own

    def scores(self, x: Tensor) -> Tensor:
        """Return W x (B, S, E)."""
        return x @ self.get_parameter("weights").float().T

    def forward(self, x: Tensor, rows: None) -> Routing:
        """Return the best experts of each token (B, S, k)."""
        routing = super().forward(x, rows)
        if self.hard:
            even = torch.full_like(routing.weight, 1 / routing.weight.shape[-1])
            routing = replace(routing, weight=even + routing.weight - routing.weight.detach())
        return routing
