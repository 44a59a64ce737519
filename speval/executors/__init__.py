"""Executors: where the user's function runs.

Owns the choice among them. Invariant: an executor is made before anything is claimed, so what can't run is refused first.
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
        OptionError: the function is not callable, or can't run there.
    """
    if not callable(function):
        raise OptionError("func", repr(function)[:60], "a function of one argument, plain or async")
    chosen = options.executor
    if chosen == "auto":
        # A timeout means something only where it can be enforced; and in one process, plain functions wait for each other.
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
    """Tell whether calling it returns a coroutine, seeing through partials and objects with an async ``__call__``."""
    function = unwrapped(function)
    if isinstance(function, functools.partial):  # one in a circle, or an object that says so: inspect would never come back
        return False
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class _Blocking:
    """An async function called from a thread, in a separate event loop."""

    def __init__(self, function: Function) -> None:
        self._function = function

    def __call__(self, args: Any) -> Any:
        return asyncio.run(self._function(args))
