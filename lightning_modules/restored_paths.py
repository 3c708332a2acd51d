"""Paths that a checkpoint brings along: those outside the run's folders are not taken over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn


def drop_foreign_paths(states: Mapping[str, Any], folders: Iterable[str | Path]) -> None:
    """Forget the checkpoints that a state of ModelCheckpoint lists, if one of them lies elsewhere.

    ModelCheckpoint removes what its state lists when it saves the next one: `folder/../../victim` too, which it
    takes for a path in the folder (lightning 2.6.6). A checkpoint from elsewhere could so remove any file or folder.

    Args:
        states: `checkpoint["callbacks"]`, changed in place.
        folders: Where this run's ModelCheckpoints save.
    """
    own = [Path(folder).resolve() for folder in folders]
    for state in states.values():
        if not isinstance(state, dict) or "best_k_models" not in state:
            continue
        listed = [*state["best_k_models"], state.get("kth_best_model_path"), state.get("last_model_path")]
        foreign = [one for one in listed if one and not _is_below(one, own)]
        if foreign:
            rank_zero_warn(
                f"The checkpoint lists {str(foreign[0])!r} among its run's checkpoints, and this run does not save "
                "there: it neither removes nor replaces what the checkpoint lists."
            )
            state |= {"best_k_models": {}, "kth_best_model_path": "", "last_model_path": ""}
            state["best_model_path"] = ""
            state["dirpath"] = None  # so that ModelCheckpoint takes no scores over either


def _is_below(path: Any, folders: Iterable[Path]) -> bool:
    return isinstance(path, str) and any(folder in Path(path).resolve().parents for folder in folders)
