"""Linear layers with a stack of experts and a router.

Shapes: T tokens, B rows, S positions, E experts, k chosen ones, r rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_modules.library.mixing import Mixing, Routing, output_mixing
from lightning_modules.library.prototypes import arrow_prototypes, spectra
from lightning_modules.library.rows import RoutingState


def routed_lora(x: Tensor, A: Tensor, B: Tensor, expert_index: Tensor, expert_weight: Tensor) -> Tensor:
    """Return what the chosen experts of each token add: sum_k w_k B_k A_k x (output mixing).

    Pairs of token and expert are sorted by expert and multiplied group by group. The largest intermediates are
    copies of the pairs' inputs and outputs; neither (T, E, out) nor matrices per token are made.

    Args:
        x: Inputs (T, in).
        A: (E, r, in).
        B: (E, out, r), alpha / r folded in. Lower ranks are filled up with zeros.
        expert_index: The experts of each token, int64 (T, k).
        expert_weight: Their weights (T, k).

    Returns:
        (T, out).

    >>> x, A, B = torch.ones(1, 2), torch.ones(3, 1, 2), torch.arange(3.0).reshape(3, 1, 1)
    >>> routed_lora(x, A, B, torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.5]]))
    tensor([[3.]])
    """
    return output_mixing(x[None], A, B, Routing(expert_weight[None], expert_index[None]))[0]


class ExpertStack(nn.Module, ABC):
    """The experts of one layer.

    Args:
        present: Which experts change this layer, bool (E).
        in_features: Width of the layer's inputs.
        out_features: Width of its outputs.
    """

    def __init__(self, present: Tensor, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("present_E", present, persistent=False)
        self.in_features = in_features
        self.out_features = out_features

    @property
    def present(self) -> Tensor:
        """Which experts change this layer, bool (E)."""
        return self.get_buffer("present_E")

    def __len__(self) -> int:
        return len(self.present)

    @abstractmethod
    def prototypes(self) -> Tensor:
        """Return the direction of inputs that each expert changes most, of unit norm, float32 (E, in)."""

    @abstractmethod
    def spectra(self) -> Tensor:
        """Return Sigma V^T of each expert's change, float32 (E, r, in)."""

    @abstractmethod
    def forward(self, x: Tensor, routing: Routing, mixing: Mixing) -> Tensor:
        """Return what the experts add (B, S, out) to a layer whose inputs are x (B, S, in)."""


class LoraStack(ExpertStack):
    """LoRA experts, stacked.

    Experts of a lower rank are filled up with zeros, which stay zeros in training: their gradients are zero.

    Args:
        A: (E, r, in).
        B: (E, out, r).
        scale: Each expert's alpha / r (E).
        present: Which experts change this layer, bool (E); the factors of the others are zero.
        ranks: Each expert's own rank (E).
        trained: Whether factors are trained. Then they are float32 and their scale is kept apart, as in PEFT;
            else the scale is folded into B.
    """

    def __init__(
        self, A: Tensor, B: Tensor, scale: Tensor, present: Tensor, ranks: Sequence[int], *, trained: bool
    ) -> None:
        super().__init__(present.to(A.device), A.shape[2], B.shape[1])
        self.ranks = tuple(ranks)
        self.trained = trained
        self.register_buffer("scale", scale.to(A.device, torch.float32), persistent=False)
        if trained:
            self.A, self.B = nn.Parameter(A.float()), nn.Parameter(B.float())
        else:
            folded = B.float() * self.get_buffer("scale")[:, None, None]
            self.register_buffer("A", A, persistent=False)
            self.register_buffer("B", folded.to(A.dtype), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (E, r, in) and B (E, out, r) with each expert's scale folded in."""
        if not self.trained:
            return self.get_buffer("A"), self.get_buffer("B")
        return self.A, self.B * self.get_buffer("scale")[:, None, None]

    def prototypes(self) -> Tensor:
        """See `ExpertStack.prototypes`."""
        with torch.no_grad():
            return arrow_prototypes(*self.factors())

    def spectra(self) -> Tensor:
        """See `ExpertStack.spectra`."""
        with torch.no_grad():
            return spectra(*self.factors())

    def forward(self, x: Tensor, routing: Routing, mixing: Mixing) -> Tensor:
        """Mix the experts."""
        A, B = self.factors()
        return mixing(x, A.to(x.dtype), B.to(x.dtype), routing)


class RoutedLinear(nn.Module):
    """A frozen linear layer, the experts that add to it, and the router that chooses among them.

    Args:
        base_layer: The layer of the base model.
        experts: The experts of this layer.
        router: Takes inputs (B, S, in) and the rows of `state`, returns a `Routing`.
        mixing: `output_mixing`, `factor_mixing`, or another function like these.
        state: Shared by the layers of a model.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        experts: ExpertStack,
        router: nn.Module,
        mixing: Mixing,
        state: RoutingState,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.experts = experts
        self.router = router
        self.mixing = mixing
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        """Add what the experts say.

        Args:
            x: (B, S, in).

        Returns:
            (B, S, out).

        Raises:
            ValueError: If the router reads rows, and `state` has heard of none or of another number.
        """
        result: Tensor = self.base_layer(x)
        if not self.state.enabled:
            return result
        rows = x if x.dim() == 3 else x[None]
        routing = self.router(rows, self.state.rows_of(self.router, len(rows)))
        added: Tensor = self.experts(rows, routing, self.mixing)
        return result + added.view_as(result).to(result.dtype)
