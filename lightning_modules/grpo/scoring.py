"""Runs any reward functions on a batch of completions, and names what goes wrong.

Shapes: B rows, K reward functions.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from datamodules.batches import Prompt
from lightning_modules.grpo.rewards import Completion, RewardFunction
from lightning_modules.ranges import check_number, check_numbers, check_seconds

# TRL keeps these columns of the data from reward functions; the plural forms are the ones they get.
_WITHHELD = ("prompt", "completion", "completion_ids")

# Seconds beyond the time-out for an event loop to report which coroutines are late.
_GRACE = 0.5

_T = TypeVar("_T")


class RewardError(ValueError):
    """A reward function failed, hung, or returned something that is not one number per row."""


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
    """

    weights: list[float] | None = None
    timeout: float | None = None
    nan: Literal["error", "ignore"] = "error"
    success: float = 1.0
    answer: Callable[[str], Any] | None = None

    def __post_init__(self) -> None:
        check_numbers("scoring.weights", self.weights, none=True)
        check_seconds("scoring.timeout", self.timeout, none=True, hint="null is no limit.")
        check_number("scoring.success", self.success)
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
        ValueError: If there are not K weights.

    >>> weighted_total(torch.tensor([[1.0, torch.nan], [1.0, 1.0], [torch.nan, torch.nan]]), [1.0, 0.5])
    tensor([1.0000, 1.5000,    nan])
    """
    _check_weights(weights, rewards_BK.shape[1])
    weights_K = (
        rewards_BK.new_ones(rewards_BK.shape[1]) if weights is None else rewards_BK.new_tensor(weights)
    )
    return (rewards_BK * weights_K).nansum(1).masked_fill(rewards_BK.isnan().all(1), torch.nan)


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
    calls = [functools.partial(function, **arguments) for function in functions]
    names = reward_names(functions)

    rewards_KB: dict[int, list[float]] = {}
    for k, call in enumerate(calls):
        if not _is_async(functions[k]):
            with _blame(names[k], scoring, rows):
                returned = call() if scoring.timeout is None else _in_thread(call, scoring.timeout)
            rewards_KB[k] = _numbers(returned, names[k], scoring, rows)
    tasks = _run_async({k: call for k, call in enumerate(calls) if k not in rewards_KB}, scoring.timeout)
    for k, task in tasks.items():
        with _blame(names[k], scoring, rows):
            if task is None or task.cancelled():
                raise _LateError
            returned = task.result()
        rewards_KB[k] = _numbers(returned, names[k], scoring, rows)
    return torch.tensor([rewards_KB[k] for k in range(len(calls))], dtype=torch.float32).T.contiguous()


class _LateError(Exception):
    """A reward function did not return in time."""


@contextmanager
def _blame(name: str, scoring: Scoring, rows: list[tuple[Prompt, Completion]]) -> Iterator[None]:
    """Turn what goes wrong inside a reward function into an error that names it."""
    try:
        yield
    except _LateError:
        raise RewardError(
            f"reward function {name!r} did not return within scoring.timeout={scoring.timeout} s for "
            f"{len(rows)} rows: raise the timeout, or look for the call that hangs"
        ) from None
    except Exception as error:
        first = f"; first row: {_shown(rows[0])}" if rows else ""
        raise RewardError(
            f"reward function {name!r} raised {type(error).__name__}: {error}{first}"
        ) from error


def _in_thread(call: Callable[[], _T], timeout: float | None) -> _T:
    """Run a call in a daemon thread and return its result or raise its exception; late: `_LateError`."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # handed to the caller, who raises it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    # Not future.result(timeout): its TimeoutError would look like one of the function's own.
    if not wait([future], timeout).done:
        raise _LateError
    return future.result()


def _run_async(
    calls: Mapping[int, Callable[[], Any]], timeout: float | None
) -> dict[int, asyncio.Task[Any] | None]:
    """Await all calls concurrently; return their finished tasks, None for those that are late."""
    tasks: dict[int, asyncio.Task[Any] | None] = dict.fromkeys(calls)

    async def awaited(call: Callable[[], Any]) -> Any:
        return await call()

    async def run() -> None:
        running = [asyncio.ensure_future(awaited(call)) for call in calls.values()]
        for k, task in zip(calls, running, strict=True):
            task.add_done_callback(functools.partial(tasks.__setitem__, k))
        # What is left over is cancelled by asyncio.run.
        await asyncio.wait(running, timeout=timeout)

    if calls:
        # A coroutine that blocks the loop or ignores its cancellation is late too.
        with suppress(_LateError):
            _in_thread(lambda: asyncio.run(run()), None if timeout is None else timeout + _GRACE)
    return dict(tasks)


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
        if isinstance(value, Tensor) and value.ndim == 0:
            value = value.item()
        if value is not None and not isinstance(value, Real):
            raise RewardError(
                f"reward function {name!r} returned {_short(value)} of type {type(value).__name__} for row "
                f"{i}: expected a number, or None for 'not applicable'"
            )
        number = math.nan if value is None else float(value)
        if value is not None and not math.isfinite(number):
            if scoring.nan == "error":
                raise RewardError(
                    f"reward function {name!r} returned {number} for row {i} ({_shown(rows[i])}): return "
                    "None for 'not applicable', or set scoring.nan='ignore' to treat such rewards so"
                )
            number = math.nan
        numbers.append(number)
    return numbers


def _check_weights(weights: Sequence[float] | None, num_functions: int) -> None:
    if weights is not None and len(weights) != num_functions:
        raise ValueError(
            f"scoring.weights has {len(weights)} weights for {num_functions} reward functions: give one each"
        )


def _is_async(function: RewardFunction) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    # A callable object carries the `async` on its class's __call__.
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _shown(row: tuple[Prompt, Completion]) -> str:
    return f"prompt {_short(row[0])}, completion {_short(row[1])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:70]}...{text[-27:]}"
