"""A router that compares the prompt with the prompts of each expert's tasks.

Shapes: B rows, E experts, k chosen ones, D width of a text's vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from datamodules.batches import Prompt
from lightning_modules.library.encoders import HashingEncoder
from lightning_modules.library.experts import Experts
from lightning_modules.library.identity import identity_of
from lightning_modules.library.mixing import Routing
from lightning_modules.library.routers.base import Router, without_autocast
from lightning_modules.library.routers.token import arrays_of_experts
from lightning_modules.ranges import check_number, check_whole


class RetrievalRouter(Router):
    """Retrieves experts for a row by its prompt, as LoRAuter does (arXiv 2601.21795).

    An expert is the mean vector of some prompts of its tasks; the row's k nearest experts by cosine share it by
    softmax. Deviation: LoRAuter embeds small validation sets of tasks and picks an adapter for each; here each
    expert's own training prompts are embedded.

    Args:
        encoder: Takes B texts, returns unit vectors (B, D). Vectors that the library keeps are told apart by its
            `identity()`, if it has that method, else by its code and its arguments.
        top_k: Experts per row; None keeps all.
        temperature: Divides the cosines before the softmax.
        threshold: Where the best cosine is below this, the base answers alone.
        num_examples: Training prompts per expert.

    Raises:
        ValueError: If an argument is out of range.
    """

    kind = "retrieval"

    def __init__(
        self,
        encoder: Callable[[Sequence[str]], Tensor] = HashingEncoder(),  # noqa: B008  has no state
        top_k: int | None = 1,
        temperature: float = 0.1,
        threshold: float | None = None,
        num_examples: int = 20,
    ) -> None:
        super().__init__()
        check_whole("top_k", top_k, none=True, hint="null keeps all experts.")
        check_number("temperature", temperature, above=0)
        check_number("threshold", threshold, least=-1, most=1, none=True, hint="It is a cosine.")
        check_whole("num_examples", num_examples)
        self.encoder = encoder
        self.top_k = top_k
        self.temperature = temperature
        self.threshold = threshold
        self.num_examples = num_examples

    def description_settings(self) -> dict[str, object]:
        """Name the encoder too: vectors of different ones cannot be compared."""
        return {**super().description_settings(), "encoder": identity_of(self.encoder)}

    def describe(
        self, prompts: Sequence[Prompt], mean_inputs: Callable[[], dict[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Return the unit mean vector of the prompts."""
        return {"text": functional.normalize(self._encoded(prompts).mean(0), dim=0)}

    def covers(self, arrays: Mapping[str, Tensor], widths: Mapping[str, int]) -> bool:
        """Return whether there is a vector."""
        return arrays.keys() == {"text"} and arrays["text"].dim() == 1

    def prepare(self, experts: Experts) -> None:
        """Look the experts' vectors up.

        Raises:
            ValueError: If `top_k` is larger than the number of experts, or an expert has no vector.
        """
        super().prepare(experts)
        if self.top_k is not None and self.top_k > len(experts.names):
            raise ValueError(
                f"top_k={self.top_k}, but there are only {len(experts.names)} experts. Lower it, or null for all."
            )
        self._table = torch.stack([arrays["text"] for arrays in arrays_of_experts(self, experts)]).float()

    def encode(self, tasks: Sequence[str], prompts: Sequence[Prompt]) -> Routing:
        """Retrieve the experts of each row (B, k)."""
        vectors = self._encoded(prompts)
        with without_autocast(vectors.device):
            scores = vectors @ self._table.to(vectors.device).T
        index = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        if self.top_k is not None:
            scores, index = scores.topk(self.top_k, dim=1)
        weight = (scores / self.temperature).softmax(1)
        if self.threshold is not None:
            weight = weight * (scores.amax(1, keepdim=True) >= self.threshold)
        return Routing(weight, index)

    def forward(self, x: Tensor, rows: Routing) -> Routing:
        """Return what was retrieved."""
        assert rows.index is not None
        return Routing(rows.weight.to(x.device), rows.index.to(x.device))

    def _encoded(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return the prompts' vectors, float32 (B, D)."""
        return self.encoder([as_text(prompt) for prompt in prompts]).float()


def as_text(prompt: Prompt) -> str:
    """Return a prompt as one text: a conversation's contents, a line each."""
    return (
        prompt if isinstance(prompt, str) else "\n".join(message.get("content") or "" for message in prompt)
    )
