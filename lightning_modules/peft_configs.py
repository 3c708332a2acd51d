"""Which adapters of PEFT work in our training loop and from their files; the others are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig

# By peft_type: why our loop does not train it as its paper does.
_KINDS = {
    "ADALORA": "it moves rank between layers in a call after each update, and adds a loss of its own",
    "POLY": "it needs the task of each row in each forward pass, which RoutedAdapter with PolyRouter gives",
    "XLORA": "it mixes other adapters that must be loaded beside it, which RoutedAdapter does for a library",
    "SHADOW": "it runs a second network beside the layers, with a loss of its own",
    "LILY": "it mixes by a mean over all tokens of a batch, so that a row would depend on the other rows",
}
# By option, where it is set: likewise.
_OPTIONS = {
    "use_asa": "it moves rank between subspaces in a call after each update",
    "alora_invocation_tokens": "it looks for these tokens in the whole row, which is passed in pieces",
    "arrow_config": "it mixes other adapters that must be loaded beside it, which RoutedAdapter with ArrowRouter does",
    "kasa_config": "it takes small directions out of the base weights, and needs losses of its own",
    "layer_replication": "it makes another base model, of more layers",
    "monteclora_config": "it needs a loss of its own",
    "sample_at_inference": "it draws other weights at each forward pass, so that no log-probability holds",
    "save_only_topk_weights": "it leaves out what training goes on with",
}
# By init_lora_weights: likewise.
_STARTS = {
    "corda": "it starts from covariances of your data, which PEFT gathers in a call of its own",
    "eva": "it starts from activations of your data, which PEFT gathers in a call of its own, and is plain LoRA else",
    "loftq": "it quantises the base weights",
    "lora_ga": "it starts from gradients on your data, which PEFT gathers in a call of its own, and is plain LoRA else",
}
# What PEFT cannot load again, or loads as something else, by peft_type, by option, and by beginnings of
# init_lora_weights.
_LOST_KINDS = {
    "LILY": "it mixes by what it reads",
    "POLY": "it computes something else for each task",
    "SHADOW": "it runs a second network beside the layers",
    "XLORA": "it mixes adapters by what it reads",
}
_LOST_OPTIONS = {
    "alora_invocation_tokens": "it applies only after these tokens",
    "layer_replication": "it has more layers than the base model's configuration says",
    "sample_at_inference": "it draws other weights at each forward pass",
}
_LOST_STARTS = {
    "corda": "its start was taken out of the base weights, and the files do not hold it",
    "loftq": "its base weights are quantised ones, which the files do not hold",
    "lora_ga": "its start was taken out of the base weights, and the files do not hold it",
    "pissa_niter": "its start was taken out of the base weights at random, and the files do not hold it",
}


def check_trainable(config: PeftConfig) -> None:
    """Check that our loop trains an adapter as its paper does, and that checkpoints and exports hold all of it.

    Args:
        config: Its configuration.

    Raises:
        ValueError: If it does not, naming the class, the option and the reason.
    """
    name = type(config).__name__
    if config.is_prompt_learning:
        raise ValueError(
            f"adapter={name} learns virtual tokens, which padded batches would move. "
            "Use an adapter that lives in the layers, such as peft.LoraConfig or peft.IA3Config."
        )
    facts = vars(config)
    velora = facts.get("velora_config")
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if found := _find(kind, facts, _KINDS, _OPTIONS, _STARTS):
        option, reason = found
    elif velora is not None and getattr(velora, "init_type", None) == "batch_average_once":
        option = "velora_config.init_type='batch_average_once'"
        reason = "a resumed run would start from another batch; random and batch_average go on as they were"
    else:
        return
    raise ValueError(
        f"adapter={name}{f' with {option}' if option else ''} cannot be trained here: {reason}. "
        f"Use {'another setting of it, or ' if option else ''}peft.LoraConfig."
    )


def check_reloadable(folder: str, config: Mapping[str, Any]) -> None:
    """Check that PEFT makes of an adapter's files what was trained, as one change of the weights.

    Args:
        folder: The adapter, for messages.
        config: Its `adapter_config.json`.

    Raises:
        ValueError: If it does not, naming the kind or the option and the reason.
    """
    if found := _find(str(config.get("peft_type")), config, _LOST_KINDS, _LOST_OPTIONS, _LOST_STARTS):
        option, reason = found
        raise ValueError(
            f"{folder} is of the kind {config.get('peft_type')}{f' with {option}' if option else ''}, and cannot be "
            f"merged: {reason}. Where PEFT trained it, save it as plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion) or save the merged model."
        )


def _find(
    kind: str,
    facts: Mapping[str, Any],
    kinds: Mapping[str, str],
    options: Mapping[str, str],
    starts: Mapping[str, str],
) -> tuple[str, str] | None:
    """The first option (empty for a kind as a whole) that one of the tables knows, and its reason."""
    if kind in kinds:
        return "", kinds[kind]
    for option, reason in options.items():
        if facts.get(option):
            return f"{option}={facts[option]!r:.60}", reason
    start = str(facts.get("init_lora_weights")).lower()
    for beginning, reason in starts.items():
        if start.startswith(beginning):
            return f"init_lora_weights={start!r}", reason
    return None
