"""Calls reward functions: each on copies of its own, in a thread or an event loop where that is needed.

Shapes: B rows.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, TypeVar

from lightning_modules.grpo.rewards import RewardFunction

# Seconds beyond the time-out for an event loop to report which coroutines are late.
_GRACE = 0.5

_T = TypeVar("_T")


class LateError(Exception):
    """A reward function did not return in time."""


class ExitError(Exception):
    """A reward function tried to end the process, or cancelled itself."""


def is_async(function: RewardFunction) -> bool:
    """Tell whether a function is to be awaited."""
    while isinstance(function, functools.partial):
        function = function.func
    # A callable object carries the `async` on its class's __call__.
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def own_copies(arguments: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """Copy what a reward function gets, so that it can change nothing for others or for training.

    Args:
        arguments: By name.
        columns: Names of those with one entry per row. Rows that share an object each get a copy.
    """
    return {
        name: [_copied(row) for row in value] if name in columns else _copied(value)
        for name, value in arguments.items()
    }


def _copied(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float) or callable(value):
        return value
    if isinstance(value, list) and all(type(one) is int for one in value):  # token ids: many
        return value.copy()
    try:
        return copy.deepcopy(value)
    except Exception:  # a lock, a file, a tensor with a history: nothing that a copy could be made of
        return value


def in_thread(call: Callable[[], _T], timeout: float | None) -> _T:
    """Run a call in a daemon thread and return its result or raise its exception.

    Raises:
        LateError: If it takes longer than `timeout` seconds.
    """
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # handed to the caller, who raises it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    # Not future.result(timeout): its TimeoutError would look like one of the function's own.
    if not wait([future], timeout).done:
        raise LateError
    return future.result()


def run_async(
    calls: Mapping[int, Callable[[], Any]], timeout: float | None
) -> dict[int, asyncio.Task[Any] | None]:
    """Await all calls concurrently; return their finished tasks, None for those that are late."""
    tasks: dict[int, asyncio.Task[Any] | None] = dict.fromkeys(calls)
    is_over = False

    async def awaited(call: Callable[[], Any]) -> Any:
        try:
            return await call()
        except (SystemExit, asyncio.CancelledError) as error:
            if is_over:
                raise
            # An exit would end the loop with all other calls, and a cancellation look like a late call.
            raise ExitError(_described(error)) from error

    async def run() -> None:
        nonlocal is_over
        running = [asyncio.ensure_future(awaited(call)) for call in calls.values()]
        for k, task in zip(calls, running, strict=True):
            task.add_done_callback(functools.partial(tasks.__setitem__, k))
        await asyncio.wait(running, timeout=timeout)
        is_over = True  # what is left over is cancelled by asyncio.run

    if calls:
        # A coroutine that blocks the loop or ignores its cancellation is late too.
        with suppress(LateError):
            in_thread(lambda: asyncio.run(run()), None if timeout is None else timeout + _GRACE)
    return dict(tasks)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
