"""`quiver library route`: shows which experts of a library a router chooses for prompts."""

from __future__ import annotations

from typing import Any

import torch

from lightning_modules.base_names import base_choice
from lightning_modules.library.adapter import RoutedAdapter
from lightning_modules.library.mixing import Routing
from lightning_modules.library.routers.base import Router
from lightning_modules.library.routers.token import ArrowRouter
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.library.watch import dense_weights
from lightning_modules.ranges import check_whole
from lightning_modules.sources import load_model, load_tokenizer


def route_prompts(
    library: str,
    prompts: list[str],
    router: Router = ArrowRouter(),  # noqa: B008  a setting; the model's layers get copies
    experts: list[str] | None = None,
    base: str | None = None,
    max_experts: int = 8,
    model_kwargs: dict[str, Any] | None = None,
) -> None:
    """Print the mean weight of each expert over layers and tokens, for each prompt.

    Args:
        library: The library.
        prompts: Texts, read as they are, without a chat template.
        router: Who chooses, for example `ArrowRouter` or `SpectralRouter`, with its settings.
        experts: Names of experts to choose among; by default all.
        base: The base model, as in `model:` of a configuration; by default what the experts name.
        max_experts: How many to print for a prompt, the heaviest first.
        model_kwargs: Which version of the base model, and how it is read, as in a configuration; `revision` by default
            what the experts name.

    Raises:
        ValueError: If the library is empty, the base model unknown, or the router does not suit the experts.
    """
    check_whole("max_experts", max_experts)
    source, choice = base_of(AdapterLibrary(library), base)
    kwargs = {**choice, **(model_kwargs or {})}
    tokenizer = load_tokenizer(source, kwargs)
    adapter = RoutedAdapter(router, library, experts)
    model = adapter.attach(load_model(source, kwargs)).eval()
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        weights = _mean_weights(adapter, model, ids, prompt)
        print(repr(prompt if len(prompt) <= 70 else prompt[:67] + "..."))  # noqa: T201
        heaviest = sorted(weights.items(), key=lambda pair: -pair[1])[:max_experts]
        for name, weight in heaviest:
            print(f"  {weight:6.3f}  {name}")  # noqa: T201


def base_of(library: AdapterLibrary, base: str | None) -> tuple[str, dict[str, str]]:
    """Return the base model of a library's experts, and which version of it they name.

    Args:
        library: The library.
        base: What the user says; None takes what the experts name.

    Raises:
        ValueError: If nobody names it.
    """
    if base:
        return base, {}
    entry = next((entry for entry in library.values() if entry.base), None)
    if entry is None or entry.base is None:
        raise ValueError(
            f"library: the experts of {library.root} do not name a base model. Give it with --base."
        )
    return entry.base, base_choice(entry.folder)


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
