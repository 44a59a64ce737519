"""Executors: where the user's function runs.

Owns the choice among them. Invariant: the executor is created before anything is claimed, so a function that can't run is
refused first.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from typing import Any

from ..clock import Clock
from ..errors import OptionError
from ..model import Function, Outputs
from ..options import Options
from .base import Executor
from .unwrap import unwrapped

__all__ = ["make_executor"]


def make_executor(function: Function, options: Options, clock: Clock, outputs: Outputs = (None, None)) -> Executor:
    """Return the executor that the options ask for.

    Raises:
        OptionError: the function is not callable.
    """
    if not callable(function):
        raise OptionError("func", repr(function)[:60], "a function of one argument, plain or async")
    chosen = options.executor
    if chosen == "auto":
        # Only processes can enforce a timeout, and in one process plain functions block each other.
        is_alone = options.concurrency == 1 and options.timeout is None
        chosen = "coroutine" if _is_async(function) else "thread" if is_alone else "process"
    if chosen == "coroutine":
        from .coroutine import CoroutineExecutor

        return CoroutineExecutor(function, options.retry_on, clock)
    blocking = _Blocking(function) if _is_async(function) else function
    if chosen == "thread":
        from .thread import ThreadExecutor

        return ThreadExecutor(blocking, options.retry_on, clock)
    if chosen == "process":
        from .process.executor import ProcessExecutor

        return ProcessExecutor(blocking, options.retry_on, clock, outputs, options.concurrency)
    assert not isinstance(chosen, str)
    from .foreign.executor import ForeignExecutor

    return ForeignExecutor(blocking, chosen, options.retry_on, clock)


def _is_async(function: Any) -> bool:
    """Tell whether calling it returns a coroutine, also for partials and objects with an async ``__call__``."""
    function = unwrapped(function)
    if isinstance(function, functools.partial):  # circular, or an object that imitates one: inspect would never return
        return False
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class _Blocking:
    """An async function called from a thread, in a new event loop."""

    def __init__(self, function: Function) -> None:
        self._function = function

    def __call__(self, args: Any) -> Any:
        return asyncio.run(self._function(args))
