"""Writes one expert as a LoRA folder of PEFT."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lightning_modules.finite import check_finite


def write_expert(
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor, float]],
    source: str | None,
    revision: str | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into an existing folder.

    Args:
        folder: Where to.
        factors: By layer: A (r, in), B (out, r) and alpha / r.
        source: The base model, as the user named it.
        revision: Its version on the hub, where one was chosen.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    ranks = {layer: len(A) for layer, (A, _, _) in factors.items()}
    alphas = {layer: scale * ranks[layer] for layer, (_, _, scale) in factors.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "revision": revision,
        "target_modules": sorted(factors),
        "r": rank,
        "lora_alpha": alpha,
        # PEFT matches the ends of names; whole names match themselves alone.
        "rank_pattern": {layer: own for layer, own in ranks.items() if own != rank},
        "alpha_pattern": {layer: own for layer, own in alphas.items() if own != alpha},
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    if bad := [layer for layer, (_, _, scale) in factors.items() if not math.isfinite(scale)]:
        raise ValueError(f"{folder}: alpha / r of {bad[0]} is NaN or infinite.")
    for layer, (A, B, _) in factors.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = A.float().cpu().contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = B.float().cpu().contiguous()
    check_finite(tensors.items(), f"{folder} is not written")
    (folder / "adapter_config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True), encoding="utf-8"
    )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
