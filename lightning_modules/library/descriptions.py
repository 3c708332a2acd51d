"""Describes experts by examples of their tasks, for routers that know experts by what they read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.library.adapter import RoutedAdapter
from lightning_modules.library.routers.base import kept_settings, missing_descriptions


def describe_experts(module: CausalLMModule, adapter: RoutedAdapter, datamodule: Any) -> None:
    """Make what the router's `describe` returns for each expert that lacks it, and keep it in the library.

    Args:
        module: Its model is loaded.
        adapter: Its adapter, with a library.
        datamodule: Where training prompts of the experts' tasks come from.

    Raises:
        ValueError: If the data has no row of an expert's tasks.
    """
    router, library = adapter.router, adapter.stacked.library
    for name in missing_descriptions(router, adapter.stacked):
        tasks = adapter.stacked.tasks[name]
        prompts = [] if datamodule is None else datamodule.examples(tasks, router.num_examples)
        if not prompts:
            raise ValueError(
                f"router={type(router).__name__} knows experts by examples, and the data has no training row of the "
                f"tasks {', '.join(tasks)} of the expert {name!r}. Run once with the data that the experts were "
                "trained on; the library keeps what is found."
            )
        ids = module.encode_prompts(prompts, room=1)
        arrays = router.describe(prompts, partial(mean_inputs, module, adapter, ids))
        assert library is not None
        contiguous = {key: value.detach().cpu().contiguous() for key, value in arrays.items()}
        library.put_arrays(name, router.kind, contiguous, kept_settings(router, adapter.stacked, name))


@torch.no_grad()
def mean_inputs(
    module: CausalLMModule, adapter: RoutedAdapter, prompts: Sequence[list[int]]
) -> dict[str, Tensor]:
    """Run the base model on prompts and average what each routed layer gets at the last token.

    Args:
        module: Its model is loaded.
        adapter: Its adapter.
        prompts: Token ids of each prompt.

    Returns:
        Layer to mean input, float32 (in).
    """
    sums: dict[str, Tensor] = {}
    first = next(iter(adapter.layers.values()))
    device = first.base_layer.weight.device  # that of the module is known later

    def add(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        last = inputs[0].flatten(0, -2)[-1].float()
        sums[name] = sums[name] + last if name in sums else last

    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in adapter.layers.items()]
    try:
        with adapter.disabled():
            for ids in prompts:
                module(torch.tensor([ids], device=device), logits_to_keep=1, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / len(prompts) for name, total in sums.items()}
