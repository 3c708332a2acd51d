"""An adapter of PEFT merged into its base model: what comes out computes what both compute, or it is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn

from lightning_modules.finite import check_finite
from lightning_modules.library.inspect_adapter import check_files
from lightning_modules.merging.reading import open_tensors
from lightning_modules.peft_configs import check_reloadable

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE_COPIES = (
    ".base_layer.weight",
    ".token_adapter.base_layer.weight",
)  # of frozen embeddings, where resized
_PROBED = 64  # tokens


@dataclass(frozen=True)
class Probe:
    """Logits of one row of tokens from all over the vocabulary, to compare models by.

    Attributes:
        ids: Token ids (1, T).
        expected: Logits of base model and adapter (1, T, V).
        base: Logits of the base model (1, T, V).
    """

    ids: Tensor
    expected: Tensor
    base: Tensor

    def check(self, model: nn.Module, what: str) -> None:
        """Check that a model computes what is expected, up to rounding.

        Args:
            model: The merged model.
            what: The adapter, for the message.

        Raises:
            ValueError: If it computes something else.
        """
        found = _logits(model, self.ids)
        gap, change = ((found - other).norm() for other in (self.expected, self.base))
        allowed = 0.05 * (self.expected - self.base).norm() + 1e-3 * self.expected.norm()
        if not bool(gap <= allowed):  # NaN too
            raise ValueError(
                f"{what}: the merged model does not compute what base model and adapter compute: logits differ by "
                f"{float(gap):.3g} in norm, and from the base model's by {float(change):.3g}. Nothing is written. Keep "
                "the adapter apart."
            )


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model.eval()(input_ids=ids).logits.float()
    return logits


def probe_of(model: nn.Module, base: Tensor | None = None) -> Probe:
    """Note what a model computes.

    Args:
        model: A transformers model with its change in its weights.
        base: Logits without it; None where they are not known, so that only rounding is allowed for.
    """
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.linspace(0, rows - 1, min(_PROBED, rows)).long()[None]
    expected = _logits(model, ids)
    return Probe(ids, expected, expected if base is None else base)


def merge_peft(model: Any, folder: Path, config: Mapping[str, Any]) -> tuple[Any, Probe]:
    """Merge an adapter folder into its base model.

    Layers that share a weight of which the adapter changes one, as a head tied to the embedding, are untied. A
    vocabulary that was resized in training is resized here.

    Args:
        model: The base model in float32; it is changed.
        folder: The adapter.
        config: Its `adapter_config.json`.

    Returns:
        The merged model, and what it must compute.

    Raises:
        ValueError: If it is of a kind that cannot be merged or loaded again, values are NaN or infinite, weights are
            missing, or the result computes something else.
    """
    check_files(folder)
    check_reloadable(str(folder), config)
    tensors = open_tensors(folder / _WEIGHTS)
    names = sorted(tensors.keys())
    check_finite(((name, tensors.get_tensor(name)) for name in names), str(folder / _WEIGHTS))
    _resize(model, folder, {name: tensors.get_slice(name).get_shape() for name in names})
    was_tied = _is_tied(model)
    adapted = _load(model, folder, set(names))
    with adapted.disable_adapter():
        base = probe_of(adapted)
    probe = Probe(base.ids, _logits(adapted, base.ids), base.expected)
    _untie(adapted)
    try:
        merged = adapted.merge_and_unload()
    except Exception as error:  # of many kinds, for adapters that are no change of weights
        said = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"{folder} is of the kind {config.get('peft_type')}, and PEFT cannot merge it into this model: {said[0]} "
            "Keep the adapter apart."
        ) from None
    if was_tied:
        _settle_ties(merged)
    check_finite(merged.named_parameters(), f"{folder}, merged")
    probe.check(merged, str(folder))
    return merged, probe


def _load(model: Any, folder: Path, held: set[str]) -> Any:
    """Put an adapter of PEFT into a model, whole; PEFT only warns where weights are missing."""
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except Exception as error:  # of many kinds, for a configuration that makes no sense
        said = str(error).splitlines()
        raise ValueError(
            f"{folder} is no adapter that PEFT can load into this model: {type(error).__name__}: "
            f"{said[0] if said else ''}. Copy it again, or give its own base model with --base."
        ) from None
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if missing := sorted(expected.keys() - held):
        raise ValueError(
            f"{folder / _WEIGHTS} lacks {missing[0]}, which its adapter_config.json promises. Copy the folder again."
        )
    return adapted


def _resize(model: Any, folder: Path, shapes: Mapping[str, list[int]]) -> None:
    """Give a model the vocabulary that an adapter's file has weights for."""
    roles = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    found: dict[str, int] = {}
    shared = False  # whether one copy is that of both
    for role, layer in roles.items():
        for name, module in model.named_modules(remove_duplicate=False):
            if module is layer and layer is not None:
                for ending in (".weight", *_BASE_COPIES):
                    if shape := shapes.get(f"{_PREFIX}{name}{ending}"):
                        found[role] = shape[0]
                        shared |= ending in _BASE_COPIES and _is_tied(model)
    rows = {role: layer.weight.shape[0] for role, layer in roles.items() if layer is not None}
    sizes = set(found.values())
    if not sizes or all(found[role] == rows[role] for role in found):
        return
    if len(sizes) > 1 or (found.keys() != rows.keys() and not shared):
        held = " and ".join(f"{size} rows for the {role} embeddings" for role, size in sorted(found.items()))
        raise ValueError(
            f"{folder / _WEIGHTS} holds {held}, and the base model has {max(rows.values())}: a resized vocabulary "
            "needs both input and output embeddings. Save the adapter with save_embedding_layers=True."
        )
    model.resize_token_embeddings(sizes.pop(), mean_resizing=False)


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _untie(adapted: nn.Module) -> None:
    """Give each adapted layer a weight of its own where another one uses it too."""
    users = Counter(
        id(parameter)
        for module in adapted.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            for name, parameter in layer._parameters.items():
                if parameter is not None and users[id(parameter)] > 1:
                    layer._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)


def _settle_ties(model: Any) -> None:
    """Say in the configuration whether head and embedding are still one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    same = head.weight.shape == embedding.weight.shape and torch.equal(head.weight, embedding.weight)
    if same:
        head.weight = embedding.weight
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = same
