"""Routers that choose for every token by its input at the layer.

Scores are float32 whatever the model computes in: in bfloat16 every twentieth token would go to other experts.

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
from lightning_modules.library.experts import Experts
from lightning_modules.library.mixing import Routing
from lightning_modules.library.routers.base import Router, kept_arrays, without_autocast
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
        """Return what `scores` needs of each layer's experts, by layer, float32 (E, ...)."""

    @abstractmethod
    def scores(self, x: Tensor) -> Tensor:
        """Score each expert for each token.

        Args:
            x: Inputs of the layer, float32 (B, S, in).

        Returns:
            float32 (B, S, E).
        """

    def confidence(self, best: Tensor, x: Tensor) -> Tensor:
        """Return what is compared with `threshold`: the best score, divided by the norm of the input.

        Args:
            best: The best score of each token (B, S, 1).
            x: Inputs of the layer, float32 (B, S, in).
        """
        relative: Tensor = best / x.norm(dim=-1, keepdim=True)
        return relative

    def forward(self, x: Tensor, rows: None) -> Routing:
        """Return the best experts of each token (B, S, k), their weights summing to 1 or, abstaining, to 0."""
        x = x.float()
        with without_autocast(x.device):
            scores = self.scores(x)
        # An expert that leaves this layer alone has no say in it.
        if self._some_absent:
            scores = scores.masked_fill(~self.get_buffer("present"), -torch.inf)
        index = None
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            scores, index = scores.topk(self.top_k, dim=-1)
        weight = (scores / self.temperature).softmax(-1)
        if self.threshold is not None:
            weight = weight * (self.confidence(scores.amax(-1, keepdim=True), x) >= self.threshold)
        return Routing(weight, index)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenRouter:
        """Move to another device, but keep the arrays in float32 when the model turns to another type."""
        before = self._buffers.get("table")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and (after := self.own).dtype != before.dtype:
            self._buffers["table"] = before.to(after.device)
        return self

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
        return (x @ self.own.T).abs()


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
        codes: Tensor = (x @ self.own.flatten(0, 1).T).unflatten(-1, self.own.shape[:2])
        lengths: Tensor = codes.norm(dim=-1)
        return lengths


class CentroidRouter(TokenRouter):
    """CM, average activation (arXiv 2405.11157, section 4): cos(x, c), c the mean input of an expert's examples.

    As in the paper's code, c is the mean over examples at the last prompt token. The paper's softmax over the cosines
    of all experts is soft: of six experts, one whose cosine is 1 where all others have 0 weighs 0.35. A lower
    temperature or `top_k` makes it sharper.

    Args:
        top_k: Experts per token; None keeps all, as the paper does.
        temperature: Divides the cosines before the softmax; None is the paper's, 1.
        threshold: Below this cosine of input and centroid the base answers alone.
        num_examples: Training prompts per expert.
    """

    kind = "centroid"
    describes_inputs = True

    def __init__(
        self,
        top_k: int | None = None,
        temperature: float | None = None,
        threshold: float | None = None,
        num_examples: int = 10,
    ) -> None:
        super().__init__(top_k, 1.0 if temperature is None else temperature, threshold)
        check_whole("num_examples", num_examples)
        self.num_examples = num_examples

    def describe(
        self, prompts: Sequence[Prompt], mean_inputs: Callable[[], dict[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Return the unit centroid of each layer (in)."""
        return {layer: functional.normalize(mean, dim=0) for layer, mean in mean_inputs().items()}

    def covers(self, arrays: Mapping[str, Tensor], widths: Mapping[str, int]) -> bool:
        """Return whether there is a centroid for each layer."""
        return has_layers(arrays, widths)

    def tables(self, experts: Experts) -> dict[str, Tensor]:
        """Return centroids (E, in)."""
        return layer_arrays(self, experts)

    def scores(self, x: Tensor) -> Tensor:
        """Return the cosine of x and c (B, S, E)."""
        cosines: Tensor = (x @ self.own.T) / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return cosines

    def confidence(self, best: Tensor, x: Tensor) -> Tensor:
        """Return the best cosine."""
        return best


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

    def covers(self, arrays: Mapping[str, Tensor], widths: Mapping[str, int]) -> bool:
        """Return whether there is a gate for each layer."""
        return has_layers(arrays, widths)

    def tables(self, experts: Experts) -> dict[str, Tensor]:
        """Return the gates (E, in).

        Raises:
            ValueError: If an expert has no gate.
        """
        return layer_arrays(self, experts)

    def scores(self, x: Tensor) -> Tensor:
        """Return LN(x) . LN(v) / sqrt(in) (B, S, E)."""
        width = (x.shape[-1],)
        gates = functional.layer_norm(self.own, width)
        return functional.layer_norm(x, width) @ gates.T / math.sqrt(width[0])


def arrays_of_experts(router: Router, experts: Experts) -> list[dict[str, Tensor]]:
    """Return the arrays of the router's kind that were made earlier, of each expert (E).

    Raises:
        ValueError: If there is no library, or an expert has none there that fit its layers.
    """
    if experts.library is None:
        raise ValueError(f"router={type(router).__name__} needs a library. Set library.")
    found = []
    for name in experts.names:
        arrays = kept_arrays(router, experts, name)
        if arrays is None:
            raise ValueError(
                f"router={type(router).__name__}: the library {experts.library.root} has no {router.kind} arrays of "
                f"the expert {name!r} and its layers. docs/library.md tells which run makes them."
            )
        found.append(arrays)
    return found


def layer_arrays(router: Router, experts: Experts) -> dict[str, Tensor]:
    """Return `arrays_of_experts` by layer (E, in), zeros where an expert leaves a layer alone.

    Raises:
        ValueError: As `arrays_of_experts`.
    """
    found = arrays_of_experts(router, experts)
    return {
        layer: torch.stack(
            [arrays.get(layer, torch.zeros(stack.in_features, device="cpu")) for arrays in found]
        )
        for layer, stack in experts.layers.items()
    }


def has_layers(arrays: Mapping[str, Tensor], widths: Mapping[str, int]) -> bool:
    """Return whether there is a vector for each layer (in)."""
    return all(layer in arrays and arrays[layer].shape == (width,) for layer, width in widths.items())
