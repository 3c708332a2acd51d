"""The tokenizer of a merged model: an adapter's own, with its chat template and end token, or the base's."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from lightning_modules.checksums import check_checksums
from lightning_modules.sources import TOKENIZERS

_TEMPLATE = "chat_template.jinja"
_FILES = (*TOKENIZERS, _TEMPLATE, "merges.txt", "added_tokens.json", "special_tokens_map.json")
_GENERATION = "generation_config.json"


def own_tokenizer(folder: Path, base: Any) -> Any | None:
    """Load the tokenizer that lies beside an adapter's weights.

    Args:
        folder: The adapter.
        base: The base model's tokenizer; it takes a chat template that lies there alone.

    Returns:
        None where there is none.

    Raises:
        ValueError: If there is one that cannot be loaded.
    """
    present = [name for name in _FILES if (folder / name).is_file()]
    check_checksums(folder, present)
    if present == [_TEMPLATE]:
        own = copy.deepcopy(base)
        own.chat_template = (folder / _TEMPLATE).read_text(encoding="utf-8")
        return own
    if not set(present) & set(TOKENIZERS):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds, for a file that is broken or alone
        said = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"{folder} holds {', '.join(present)}, of which transformers makes no tokenizer: {said[0]} Save it there "
            "again, or remove these files to take the base model's."
        ) from None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy an adapter's own tokenizer, if it has one, into the folder of another form of it."""
    for name in (*_FILES, _GENERATION):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def choose_tokenizer(folders: Sequence[Path], base: Any) -> tuple[Any, str]:
    """Choose the tokenizer of what several experts are merged into.

    Args:
        folders: The experts.
        base: The base model's tokenizer.

    Returns:
        The experts' one if those that have one agree, else the base model's; and what there is to say about it.
    """
    found = [(folder, own) for folder in folders if (own := own_tokenizer(folder, base)) is not None]
    for folder, own in found[1:]:
        if _facts(own) != _facts(found[0][1]):
            return base, (
                f"The tokenizers of {found[0][0]} and {folder} differ; the base model's is written. Check its chat "
                "template and end token."
            )
    return (found[0][1] if found else base), ""


def _facts(tokenizer: Any) -> tuple[Any, ...]:
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return tokenizer.get_vocab(), tokenizer.chat_template, special


def check_vocabulary(model: Any, own: Any, base: Any, folder: Path) -> None:
    """Check that a model has an embedding for each token that an adapter's tokenizer adds.

    Raises:
        ValueError: If it lacks one.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(own) > max(rows, len(base)):
        raise ValueError(
            f"{folder}: its tokenizer has {len(own)} tokens and the model {rows} embeddings, so the weights of "
            "the new tokens are missing. Save the adapter with its embeddings (save_embedding_layers=True)."
        )


def set_ends(model: Any, own: Any, base: Any, folder: Path | None = None) -> None:
    """Let a model end where its tokenizer does: what was the base tokenizer's end token becomes the own one's.

    Args:
        model: A transformers model; its generation settings and configuration are changed.
        own: Its tokenizer.
        base: The base model's tokenizer.
        folder: An adapter that may bring generation settings.
    """
    if folder is not None and (folder / _GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    for settings in (model.generation_config, model.config, model.config.get_text_config()):
        if settings is None:
            continue
        ends = getattr(settings, "eos_token_id", None)
        ends = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
        if own.eos_token_id is not None and own.eos_token_id not in ends:
            ends = [own.eos_token_id if end == base.eos_token_id else end for end in ends]
            if own.eos_token_id not in ends:
                ends.append(own.eos_token_id)
            settings.eos_token_id = ends if len(ends) > 1 else ends[0]
        for name in ("bos_token_id", "pad_token_id"):
            if getattr(own, name) != getattr(base, name):
                setattr(settings, name, getattr(own, name))
