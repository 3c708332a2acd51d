"""The precisions that runs are made in, and why not others."""

from __future__ import annotations

from typing import Any

_PLAIN, _MIXED = "32-true", "bf16-mixed"
_NAMES = {"None": _PLAIN, "32": _PLAIN, "bf16": _MIXED, "16": "16-mixed", "64": "64-true"}
_INSTEAD = f"Set trainer.precision: {_PLAIN} or {_MIXED}"
_HALF = {"bf16-true": "bfloat16", "16-true": "float16"}


def check_precision(precision: Any) -> bool:
    """Check that a run can be made in a precision.

    Refused are those of Lightning that convert the whole module and torch's default type, `bf16-true`, `16-true` and
    `64-true`: they round what is learned, rewards, counts and random numbers too. `model.dtype` chooses the type of
    the base weights alone. `16-mixed` needs loss scaling, which an update does not undo before it clips.

    Args:
        precision: As in `trainer.precision`; None is `32-true`.

    Returns:
        Whether it is mixed: computed in bfloat16 whatever the type of the weights.

    Raises:
        ValueError: If it cannot.

    >>> check_precision("32"), check_precision("bf16-mixed")
    (False, True)
    """
    name = _NAMES.get(str(precision), str(precision))
    if name in (_PLAIN, _MIXED):
        return name == _MIXED
    why, instead = "", _INSTEAD
    if name.endswith("-true"):
        why = " It would also convert what is learned, rewards, counts and random numbers."
    if name in _HALF:
        instead = (
            f"Set trainer.precision: {_PLAIN} and model.dtype: {_HALF[name]}, or trainer.precision: {_MIXED}"
        )
    raise ValueError(f"trainer.precision={precision} is not supported.{why} {instead}.")
