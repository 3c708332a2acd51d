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
from lightning_modules.library.mixing import Routing
from lightning_modules.library.routers.base import Router
from lightning_modules.library.routers.token import arrays_of_experts


class RetrievalRouter(Router):
    """Retrieves experts for a row by its prompt, as LoRAuter does (arXiv 2601.21795).

    An expert is the mean vector of some prompts of its tasks; the row's k nearest experts by cosine share it by
    softmax. Deviation: LoRAuter embeds small validation sets of tasks and picks an adapter for each; here each
    expert's own training prompts are embedded.

    Args:
        encoder: Takes B texts, returns unit vectors (B, D).
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
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k}: must be at least 1, or null for all experts.")
        if temperature <= 0 or num_examples < 1:
            raise ValueError(f"temperature={temperature}, num_examples={num_examples}: must be positive.")
        self.encoder = encoder
        self.top_k = top_k
        self.temperature = temperature
        self.threshold = threshold
        self.num_examples = num_examples

    def description_settings(self) -> dict[str, object]:
        """Name the encoder too: vectors of different ones cannot be compared."""
        return {**super().description_settings(), "encoder": repr_of(self.encoder)}

    def describe(
        self, prompts: Sequence[Prompt], mean_inputs: Callable[[], dict[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Return the unit mean vector of the prompts."""
        return {"text": functional.normalize(self.encoder([as_text(p) for p in prompts]).mean(0), dim=0)}

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
        self._table = arrays_of_experts(self, experts)["text"]

    def encode(self, tasks: Sequence[str], prompts: Sequence[Prompt]) -> Routing:
        """Retrieve the experts of each row (B, k)."""
        scores = self.encoder([as_text(prompt) for prompt in prompts]) @ self._table.T
        index = torch.arange(scores.shape[1]).expand_as(scores)
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


def as_text(prompt: Prompt) -> str:
    """Return a prompt as one text: a conversation's contents, a line each."""
    return (
        prompt if isinstance(prompt, str) else "\n".join(message.get("content") or "" for message in prompt)
    )


def repr_of(encoder: Callable[..., Tensor]) -> str:
    """Name an encoder by its class and its arguments."""
    arguments = (
        {k: v for k, v in vars(encoder).items() if not k.startswith("_")}
        if hasattr(encoder, "__dict__")
        else {}
    )
    return f"{type(encoder).__qualname__}{sorted(arguments.items())}"
