"""Checks the configuration of a LoRA adapter of PEFT, which may come from anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Settings under which B A x scaling is not all that a LoRA adapter changes, or not always.
_BEYOND_LORA = (
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_PLAIN_STARTS = (
    True,
    False,
    "gaussian",
    "orthogonal",
    "eva",
    "mica",
)  # the others change the base weights too


def check_lora_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that factors and scaling are all that an adapter changes, and that the scaling is known.

    Args:
        folder: The adapter, for messages.
        config: Its `adapter_config.json`.

    Raises:
        ValueError: If it changes more, or a setting is of no use.
    """
    settings = [f"{name}={config[name]!r}" for name in _BEYOND_LORA if config.get(name)]
    if config.get("bias", "none") != "none":
        settings.append(f"bias={config['bias']!r}")
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool | str) or start not in _PLAIN_STARTS:
        settings.append(f"init_lora_weights={start!r}")
    if settings:
        raise ValueError(
            f"{folder} was trained with {', '.join(settings)}, so it changes more than LoRA factors say. "
            "Merge it into its base model with quiver export and give the model's folder as the expert."
        )
    file = folder / "adapter_config.json"
    if not _is_number(config.get("lora_alpha")):
        raise ValueError(f"{file} names no lora_alpha. Save the adapter again.")
    checks = {"alpha_pattern": _is_pattern, "use_rslora": _is_flag, "base_model_name_or_path": _is_name}
    for name, is_right in checks.items():
        if not is_right(config.get(name)):
            raise ValueError(f"{file}: {name}={config[name]!r:.80} makes no sense. Save the adapter again.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_pattern(value: Any) -> bool:
    """Whether regular expressions of layers have numbers, as PEFT writes them."""
    if value is None:
        return True
    return isinstance(value, dict) and all(
        _is_number(alpha) and _compiles(key) for key, alpha in value.items()
    )


def _compiles(pattern: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError):
        return False
    return True
