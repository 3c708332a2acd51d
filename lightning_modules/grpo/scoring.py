"""Runs any reward functions on a batch of completions, and names what goes wrong.

Shapes: B rows, K reward functions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from numbers import Rational, Real
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.batches import Prompt
from lightning_modules.grpo.reward_calls import (
    ExitError,
    LateError,
    in_thread,
    is_async,
    own_copies,
    run_async,
)
from lightning_modules.grpo.rewards import Completion, RewardFunction
from lightning_modules.ranges import check_number, check_numbers, check_seconds, check_whole

# TRL keeps these columns of the data from reward functions; the plural forms are the ones they get.
_WITHHELD = ("prompt", "completion", "completion_ids")

# Beyond it the squares that a standard deviation sums up would overflow float32.
LARGEST_REWARD = 1e18


class RewardError(ValueError):
    """A reward function failed, hung, or returned something that is not one usable number per row."""


@dataclass(frozen=True)
class Scoring:
    """How reward functions are run and combined.

    Attributes:
        weights: Weight of each function's reward in the total; None weighs all with 1.
        timeout: Seconds that a function may take for one batch; None for no limit.
        nan: Whether a NaN or infinite reward is an error, or counts as not applicable like None.
        success: Smallest reward of the first function that counts as a success.
        answer: Finds the answer in a completion, by which majority votes of validation are counted; None asks the
            first reward function (its `answer_of`), else takes the whole text.
        patience: Steps in a row without a reward for any completion after which training stops.
    """

    weights: list[float] | None = None
    timeout: float | None = None
    nan: Literal["error", "ignore"] = "error"
    success: float = 1.0
    answer: Callable[[str], Any] | None = None
    patience: int = 10

    def __post_init__(self) -> None:
        check_numbers("scoring.weights", self.weights, none=True)
        check_seconds("scoring.timeout", self.timeout, none=True, hint="null is no limit.")
        check_number("scoring.success", self.success)
        check_whole("scoring.patience", self.patience)
        if self.nan not in ("error", "ignore"):
            raise ValueError(f"nan={self.nan!r} is unknown: use error or ignore")


def reward_name(function: RewardFunction) -> str:
    """Return the name of a reward function: its own, or that of the class of a callable object.

    >>> reward_name(functools.partial(len))
    'len'
    """
    while isinstance(function, functools.partial):
        function = function.func
    # Functions have a __name__, and so have TRL's callable objects; others go by their class.
    return str(getattr(function, "__name__", type(function).__name__))


def reward_names(functions: Sequence[RewardFunction]) -> list[str]:
    """Return a distinct name for each function: the second of one name ends in _2, and so on.

    >>> reward_names([len, len])
    ['len', 'len_2']
    """
    names: list[str] = []
    for name in map(reward_name, functions):
        candidates = (name if count == 1 else f"{name}_{count}" for count in range(1, len(functions) + 1))
        names.append(next(one for one in candidates if one not in names))
    return names


def weighted_total(rewards_BK: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Sum each row's applicable rewards, weighted.

    Args:
        rewards_BK: Rewards, NaN where not applicable (B, K).
        weights: K weights; None weighs all with 1.

    Returns:
        float32 (B), NaN where no function applies.

    Raises:
        ValueError: If there are not K weights, or a sum is too large for float32.

    >>> weighted_total(torch.tensor([[1.0, torch.nan], [1.0, 1.0], [torch.nan, torch.nan]]), [1.0, 0.5])
    tensor([1.0000, 1.5000,    nan])
    """
    _check_weights(weights, rewards_BK.shape[1])
    weights_K = (
        rewards_BK.new_ones(rewards_BK.shape[1]) if weights is None else rewards_BK.new_tensor(weights)
    )
    total_B = (rewards_BK * weights_K).nansum(1).masked_fill(rewards_BK.isnan().all(1), torch.nan)
    if large := (total_B.abs() > LARGEST_REWARD).nonzero()[:, 0].tolist():
        raise ValueError(
            f"The weighted sum of the rewards is {float(total_B[large[0]]):g} at row {large[0]}, too large for "
            f"float32 (beyond {LARGEST_REWARD:g}): lower scoring.weights or the rewards"
        )
    return total_B


def score_completions(
    functions: Sequence[RewardFunction],
    scoring: Scoring,
    *,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    **extra: Any,
) -> Tensor:
    """Run every reward function on every completion.

    Each function gets copies of its own: what it changes in them reaches neither the others nor training.

    Without a time-out plain functions run in the calling thread, one after the other. With one each runs in a
    daemon thread: Python cannot stop a thread, but a hung one does not keep the interpreter from exiting.
    Async functions then run concurrently in an event loop in a thread of its own, so that this also works
    where a loop runs already, as in Jupyter; their time-out is common to all.

    Args:
        functions: K reward functions.
        scoring: Weights (only counted here), time-out, treatment of NaN.
        prompts: B.
        completions: B, in the form of their prompts.
        completion_ids: Token ids of each completion (B).
        columns: Data columns by name (B each).
        **extra: More keyword arguments, such as `trainer_state`, `log_extra` and `log_metric`.

    Returns:
        Rewards, float32 (B, K) on the CPU, NaN where a function does not apply.

    Raises:
        RewardError: If a function raises, hangs, or does not return one number or None per row.
        ValueError: If there is no function, or the weights do not fit the functions.
    """
    if not functions:
        raise ValueError("rewards is empty: give at least one reward function")
    _check_weights(scoring.weights, len(functions))
    rows = list(zip(prompts, completions, strict=True))
    arguments = {name: column for name, column in columns.items() if name not in _WITHHELD}
    arguments |= extra | {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    per_row = [*columns, "prompts", "completions", "completion_ids"]
    calls = [functools.partial(function, **own_copies(arguments, per_row)) for function in functions]
    names = reward_names(functions)

    rewards_KB: dict[int, list[float]] = {}
    for k, call in enumerate(calls):
        if not is_async(functions[k]):
            with _blame(names[k], scoring, rows):
                returned = call() if scoring.timeout is None else in_thread(call, scoring.timeout)
            rewards_KB[k] = _numbers(returned, names[k], scoring, rows)
    tasks = run_async({k: call for k, call in enumerate(calls) if k not in rewards_KB}, scoring.timeout)
    for k, task in tasks.items():
        with _blame(names[k], scoring, rows):
            if task is None or task.cancelled():
                raise LateError
            returned = task.result()
        rewards_KB[k] = _numbers(returned, names[k], scoring, rows)
    return torch.tensor([rewards_KB[k] for k in range(len(calls))], dtype=torch.float32).T.contiguous()


@contextmanager
def _blame(name: str, scoring: Scoring, rows: list[tuple[Prompt, Completion]]) -> Iterator[None]:
    """Turn what goes wrong inside a reward function into an error that names it."""
    try:
        yield
    except LateError:
        raise RewardError(
            f"reward function {name!r} did not return within scoring.timeout={scoring.timeout} s for "
            f"{len(rows)} rows: raise the timeout, or look for the call that hangs"
        ) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit(0) would end the run as if it had succeeded
        first = f"; first row: {_shown(rows[0])}" if rows else ""
        what = str(error) if isinstance(error, ExitError) else f"{type(error).__name__}: {error}"
        raise RewardError(f"reward function {name!r} raised {what}{first}") from error


def _numbers(
    returned: Any, name: str, scoring: Scoring, rows: list[tuple[Prompt, Completion]]
) -> list[float]:
    """Check what a reward function returned; None becomes NaN."""
    if isinstance(returned, Tensor):
        returned = returned.tolist()
    if isinstance(returned, (str, bytes, Mapping, Set)) or not isinstance(returned, Collection):
        raise RewardError(
            f"reward function {name!r} returned {_short(returned)} of type {type(returned).__name__}: "
            "expected a list with one number or None per completion"
        )
    if len(returned) != len(rows):
        raise RewardError(
            f"reward function {name!r} returned {len(returned)} rewards for {len(rows)} completions; "
            "expected one number or None for each that it is given"
        )
    numbers = []
    for i, value in enumerate(returned):
        number = math.nan if value is None else as_number(value)
        if number is None:
            raise RewardError(
                f"reward function {name!r} returned {_short(value)} of type {type(value).__name__} for row "
                f"{i}: expected a number, or None for 'not applicable'"
            )
        if abs(number) > LARGEST_REWARD and (math.isfinite(number) or isinstance(value, Rational)):
            raise RewardError(
                f"reward function {name!r} returned {_short(value)} for row {i} ({_shown(rows[i])}): rewards beyond "
                f"{LARGEST_REWARD:g} are too large for float32; scale them down"
            )
        if value is not None and not math.isfinite(number):
            if scoring.nan == "error":
                raise RewardError(
                    f"reward function {name!r} returned {number} for row {i} ({_shown(rows[i])}): return "
                    "None for 'not applicable', or set scoring.nan='ignore' to treat such rewards so"
                )
            number = math.nan
        numbers.append(number)
    return numbers


def as_number(value: Any) -> float | None:
    """Return a number of Python, numpy or torch as a float, booleans as 0 or 1; None for anything else.

    A whole number beyond float64 becomes infinite.

    >>> as_number(True), as_number(torch.tensor(2)), as_number("3")
    (1.0, 2.0, None)
    """
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        value = value.item()
    if not isinstance(value, Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, 1 if value > 0 else -1)  # type: ignore[operator]
    except ValueError:  # a signalling NaN
        return math.nan


def _check_weights(weights: Sequence[float] | None, num_functions: int) -> None:
    if weights is not None and len(weights) != num_functions:
        raise ValueError(
            f"scoring.weights has {len(weights)} weights for {num_functions} reward functions: give one each"
        )


def _shown(row: tuple[Prompt, Completion]) -> str:
    return f"prompt {_short(row[0])}, completion {_short(row[1])}"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number with more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:70]}...{text[-27:]}"
