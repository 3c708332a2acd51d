"""`quiver library route`: shows which experts of a library a router chooses for prompts."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules.library.adapter import RoutedAdapter
from lightning_modules.library.mixing import Routing
from lightning_modules.library.routers.base import Router
from lightning_modules.library.routers.token import ArrowRouter
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.library.watch import dense_weights
from lightning_modules.ranges import check_whole
from lightning_modules.sources import resolve_model


def route_prompts(
    library: str,
    prompts: list[str],
    router: Router = ArrowRouter(),  # noqa: B008  a setting; the model's layers get copies
    experts: list[str] | None = None,
    base: str | None = None,
    max_experts: int = 8,
) -> None:
    """Print the mean weight of each expert over layers and tokens, for each prompt.

    Args:
        library: The library.
        prompts: Texts, read as they are, without a chat template.
        router: Who chooses, for example `ArrowRouter` or `SpectralRouter`, with its settings.
        experts: Names of experts to choose among; by default all.
        base: The base model, as in `model:` of a configuration; by default what the experts name.
        max_experts: How many to print for a prompt, the heaviest first.

    Raises:
        ValueError: If the library is empty, the base model unknown, or the router does not suit the experts.
    """
    check_whole("max_experts", max_experts)
    place = resolve_model(base_of(AdapterLibrary(library), base))
    tokenizer = AutoTokenizer.from_pretrained(place)
    adapter = RoutedAdapter(router, library, experts)
    model = adapter.attach(AutoModelForCausalLM.from_pretrained(place)).eval()
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        weights = _mean_weights(adapter, model, ids, prompt)
        print(repr(prompt if len(prompt) <= 70 else prompt[:67] + "..."))  # noqa: T201
        heaviest = sorted(weights.items(), key=lambda pair: -pair[1])[:max_experts]
        for name, weight in heaviest:
            print(f"  {weight:6.3f}  {name}")  # noqa: T201


def base_of(library: AdapterLibrary, base: str | None) -> str:
    """Return the base model of a library's experts.

    Args:
        library: The library.
        base: What the user says; None takes what the experts name.

    Raises:
        ValueError: If nobody names it.
    """
    source = base or next((entry.base for entry in library.values() if entry.base), None)
    if source is None:
        raise ValueError(
            f"library: the experts of {library.root} do not name a base model. Give it with --base."
        )
    return source


@torch.no_grad()
def _mean_weights(
    adapter: RoutedAdapter, model: torch.nn.Module, ids: torch.Tensor, prompt: str
) -> dict[str, float]:
    """Run one prompt and average what the layers' routers say."""
    names = adapter.stacked.names
    total = torch.zeros(len(names))

    def see(_: torch.nn.Module, inputs: tuple[torch.Tensor], routing: Routing) -> None:
        total.add_(dense_weights(routing, len(names), (1, inputs[0].shape[1])).mean((0, 1)).cpu())

    hooks = [layer.router.register_forward_hook(see) for layer in adapter.layers.values()]
    try:
        adapter.route([""], [prompt])
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    mean = total / len(adapter.layers)
    return dict(zip(names, mean.tolist(), strict=True))
