"""Routers that choose for every token by its input at the layer.

Shapes: B rows, S positions, E experts, k chosen ones, r rank.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller

import torch
from torch import Tensor
from torch.nn import functional

from datamodules.batches import Prompt
from lightning_modules.library.experts import Experts, stacked
from lightning_modules.library.mixing import Routing
from lightning_modules.library.routers.base import Router
from lightning_modules.ranges import check_number, check_whole


class TokenRouter(Router):
    """Scores every expert for every token, keeps the best k, and weighs them by softmax.

    Args:
        top_k: Experts per token; None keeps all. 1 is hard routing.
        temperature: Divides the scores before the softmax.
        threshold: Where the best score, divided by the norm of the input, is below this, the base answers alone.
            For prototypes of unit norm that is a cosine. None never abstains.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, top_k: int | None = 4, temperature: float = 1.0, threshold: float | None = None
    ) -> None:
        super().__init__()
        check_whole("top_k", top_k, none=True, hint="null keeps all experts.")
        check_number("temperature", temperature, above=0)
        check_number("threshold", threshold, none=True, hint="null never abstains.")
        self.top_k = top_k
        self.temperature = temperature
        self.threshold = threshold
        self._some_absent = True

    def prepare(self, experts: Experts) -> None:
        """Make the arrays that experts are scored by.

        Raises:
            ValueError: If `top_k` is larger than the number of experts.
        """
        super().prepare(experts)
        if self.top_k is not None and self.top_k > len(experts.names):
            raise ValueError(
                f"top_k={self.top_k}, but there are only {len(experts.names)} experts. Lower it, or null for all."
            )
        self._tables = self.tables(experts)
        self._present = {layer: stack.present for layer, stack in experts.layers.items()}

    def for_layer(self, layer: str) -> Router:
        """Return a copy that has this layer's arrays alone."""
        tables, present = self._tables, self._present
        del self._tables, self._present
        try:
            own = super().for_layer(layer)
        finally:
            self._tables, self._present = tables, present
        assert isinstance(own, TokenRouter)
        own.register_buffer("table", tables[layer].to(present[layer].device).contiguous(), persistent=False)
        own.register_buffer("present", present[layer], persistent=False)
        own._some_absent = not bool(present[layer].all())  # known here, so that no forward pass has to ask
        return own

    @abstractmethod
    def tables(self, experts: Experts) -> dict[str, Tensor]:
        """Return what `scores` needs of each layer's experts, by layer (E, ...)."""

    @abstractmethod
    def scores(self, x: Tensor) -> Tensor:
        """Score each expert for each token.

        Args:
            x: Inputs of the layer (B, S, in).

        Returns:
            (B, S, E).
        """

    def forward(self, x: Tensor, rows: None) -> Routing:
        """Return the best experts of each token (B, S, k), their weights summing to 1 or, abstaining, to 0."""
        # An expert that leaves this layer alone has no say in it.
        scores = self.scores(x).float()
        if self._some_absent:
            scores = scores.masked_fill(~self.get_buffer("present"), -torch.inf)
        index = None
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            scores, index = scores.topk(self.top_k, dim=-1)
        weight = (scores / self.temperature).softmax(-1)
        if self.threshold is not None:
            best = scores.amax(-1, keepdim=True) / x.float().norm(dim=-1, keepdim=True)
            weight = weight * (best >= self.threshold)
        return Routing(weight, index)

    @property
    def own(self) -> Tensor:
        """This layer's arrays."""
        return self.get_buffer("table")


class ArrowRouter(TokenRouter):
    """Arrow (arXiv 2405.11157, Alg. 2): |x . v|, v the direction in which an expert changes its input most.

    Deviation: the paper mixes factors, PEFT mixes outputs; here `mixing` of the module says which.

    Args:
        top_k: Experts per token.
        temperature: Divides the scores before the softmax.
        threshold: Below this |cosine| of input and prototype the base answers alone.
    """

    needs_library = True

    def tables(self, experts: Experts) -> dict[str, Tensor]:
        """Return unit prototypes (E, in)."""
        return experts.described("arrow", {}, methodcaller("prototypes"))

    def scores(self, x: Tensor) -> Tensor:
        """Return |x . v| (B, S, E)."""
        return (x @ self.own.to(x.dtype).T).abs()


class SpectralRouter(TokenRouter):
    """SpectR (arXiv 2504.03454): ||dW x||, by the whole spectrum of each expert.

    The paper's formula was not at hand; this is our reading of its abstract.

    Args:
        top_k: Experts per token.
        temperature: Divides the scores before the softmax.
        threshold: Below this ratio ||dW x|| / ||x|| the base answers alone.
    """

    needs_library = True

    def tables(self, experts: Experts) -> dict[str, Tensor]:
        """Return Sigma V^T of each expert's change (E, r, in)."""
        return experts.described("spectrum", {}, methodcaller("spectra"))

    def scores(self, x: Tensor) -> Tensor:
        """Return ||dW x|| (B, S, E)."""
        table = self.own.to(x.dtype)
        codes: Tensor = (x @ table.flatten(0, 1).T).unflatten(-1, table.shape[:2])
        lengths: Tensor = codes.float().norm(dim=-1)
        return lengths


class CentroidRouter(TokenRouter):
    """CM, average activation (arXiv 2405.11157, section 4): x . c, c the mean input of an expert's examples.

    As in the paper's code, c is the mean over examples at the last prompt token, of unit norm, and the temperature
    is the square root of the layer's width.

    Args:
        top_k: Experts per token; None keeps all, as the paper does.
        temperature: Divides the scores before the softmax; None is the square root of the layer's width.
        threshold: Below this cosine of input and centroid the base answers alone.
        num_examples: Training prompts per expert.
    """

    kind = "centroid"

    def __init__(
        self,
        top_k: int | None = None,
        temperature: float | None = None,
        threshold: float | None = None,
        num_examples: int = 10,
    ) -> None:
        super().__init__(top_k, 1.0 if temperature is None else temperature, threshold)
        check_whole("num_examples", num_examples)
        self.temperature = temperature  # type: ignore[assignment]
        self.num_examples = num_examples

    def describe(
        self, prompts: Sequence[Prompt], mean_inputs: Callable[[], dict[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Return the unit centroid of each layer (in)."""
        return {layer: functional.normalize(mean, dim=0) for layer, mean in mean_inputs().items()}

    def tables(self, experts: Experts) -> dict[str, Tensor]:
        """Return centroids (E, in)."""
        return layer_arrays(self, experts)

    def for_layer(self, layer: str) -> Router:
        """Return a copy with this layer's temperature."""
        own = super().for_layer(layer)
        assert isinstance(own, CentroidRouter)
        if self.temperature is None:
            own.temperature = math.sqrt(own.own.shape[-1])
        return own

    def scores(self, x: Tensor) -> Tensor:
        """Return x . c (B, S, E)."""
        return x @ self.own.to(x.dtype).T


class PhatgooseRouter(TokenRouter):
    """Phatgoose (arXiv 2402.05859): normalised input times normalised gate, gates trained by `PhatgooseGates`.

    Both are normalised over features to mean 0 and variance 1, and the score is divided by the square root of the
    layer's width; each token goes to its best two experts.

    Args:
        top_k: Experts per token.
    """

    kind = "phatgoose"

    def __init__(self, top_k: int | None = 2) -> None:
        super().__init__(top_k)

    def tables(self, experts: Experts) -> dict[str, Tensor]:
        """Return the gates (E, in).

        Raises:
            ValueError: If an expert has no gate.
        """
        return layer_arrays(self, experts)

    def scores(self, x: Tensor) -> Tensor:
        """Return LN(x) . LN(v) / sqrt(in) (B, S, E)."""
        width = (x.shape[-1],)
        gates = functional.layer_norm(self.own.float(), width)
        return functional.layer_norm(x.float(), width) @ gates.T / math.sqrt(width[0])


def arrays_of_experts(router: Router, experts: Experts) -> dict[str, Tensor]:
    """Return the arrays of the router's kind that were made earlier, experts stacked (E, ...).

    Raises:
        ValueError: If there is no library, or an expert has none there.
    """
    if experts.library is None:
        raise ValueError(f"router={type(router).__name__} needs a library. Set library.")
    found = []
    for name in experts.names:
        arrays = experts.library.find_arrays(name, router.kind, router.description_settings())
        if arrays is None:
            raise ValueError(
                f"router={type(router).__name__}: the library {experts.library.root} has no {router.kind} arrays of "
                f"the expert {name!r}. docs/library.md tells which run makes them."
            )
        found.append(arrays)
    return stacked(found)


def layer_arrays(router: Router, experts: Experts) -> dict[str, Tensor]:
    """Return `arrays_of_experts` of the experts' layers (E, in).

    Raises:
        ValueError: If arrays of a layer are missing.
    """
    arrays = arrays_of_experts(router, experts)
    if missing := sorted(experts.layers.keys() - arrays.keys()):
        raise ValueError(
            f"router={type(router).__name__}: the {router.kind} arrays in the library lack the layer {missing[0]}. "
            "They were made with other experts; make them again."
        )
    return {layer: arrays[layer] for layer in experts.layers}
