"""What a trainer saved for vLLM: a LoRA adapter, all weights, or something that vLLM cannot serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lightning_modules.merging.reading import open_tensors
from lightning_modules.sparse.storage import read_json

# The ranks for which vLLM reserves room.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Settings of PEFT's LoRA that change what an adapter computes, and that vLLM does not implement.
_UNSERVED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
    "use_bdlora",
    "use_qalora",
    "trainable_token_indices",
)


@dataclass(frozen=True)
class SavedPolicy:
    """A folder that vLLM can load.

    Attributes:
        name: What vLLM calls it.
        folder: Where it is.
        rank: Of the LoRA adapter; None where the folder holds all weights of the model.
    """

    name: str
    folder: Path
    rank: int | None

    @property
    def room(self) -> int | None:
        """The smallest `--max-lora-rank` that holds it; None where there is no adapter."""
        return None if self.rank is None else next(room for room in _RANKS if room >= self.rank)


def tied_layers(model: nn.Module) -> list[str]:
    """Name head and embedding where they are one weight.

    Args:
        model: A transformers model, perhaps with an adapter of PEFT.
    """
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    weights = [getattr(getattr(layer, "base_layer", layer), "weight", None) for layer in layers]
    if weights[0] is None or weights[0] is not weights[1]:
        return []
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]


def saved_policy(name: str, folder: Path, tied: Sequence[str] = ()) -> SavedPolicy:
    """Find out what a folder holds.

    Args:
        name: What vLLM will call it.
        folder: Written by `Adapter.save`.
        tied: What `tied_layers` returns for the trained model.

    Raises:
        ValueError: If vLLM cannot serve it, with the reason.
    """
    remedy = "Use NativeSampler, or train with peft.LoraConfig or adapter: null."
    if (folder / "index.json").is_file():
        raise ValueError(
            f"VLLMSampler cannot serve a routed library: vLLM applies one adapter to a whole request. {remedy}"
        )
    config = folder / "adapter_config.json"
    if not config.is_file():
        return SavedPolicy(name, folder, None)
    facts = read_json(config)
    kind = str(facts.get("peft_type"))
    if kind != "LORA":
        raise ValueError(
            f"VLLMSampler cannot serve an adapter of the kind {kind}: vLLM loads LoRA alone. {remedy}"
        )
    if used := [option for option in _UNSERVED if facts.get(option)]:
        raise ValueError(
            f"VLLMSampler cannot serve a LoRA adapter with {', '.join(used)}: vLLM does not implement that. {remedy}"
        )
    if facts.get("bias", "none") != "none":
        raise ValueError(
            f"VLLMSampler cannot serve a LoRA adapter with bias={facts['bias']!r}: vLLM loads its matrices alone. Set "
            "bias: none."
        )
    keys = open_tensors(folder / "adapter_model.safetensors").keys() if tied else ()
    if changed := [layer for layer in tied if any(key.startswith(f"{layer}.") for key in keys)]:
        raise ValueError(
            f"VLLMSampler cannot serve a LoRA adapter of {changed[0]}, which shares its weight with another one: vLLM "
            "has one layer for both. Leave it out of target_modules, or use NativeSampler."
        )
    rank = max([facts["r"], *(facts.get("rank_pattern") or {}).values()])
    if rank > _RANKS[-1]:
        raise ValueError(
            f"VLLMSampler cannot serve a LoRA adapter of rank {rank}: vLLM takes at most {_RANKS[-1]}."
        )
    return SavedPolicy(name, folder, rank)
