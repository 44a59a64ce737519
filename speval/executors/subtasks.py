"""SystemExit and KeyboardInterrupt out of what a coroutine has started: its tasks and callbacks.

Owns whose fault the end of an event loop is. Invariant: what an evaluation has started, in whatever task or callback, is told
apart from all else that ends a loop, and is charged to that evaluation alone.
"""

from __future__ import annotations

import asyncio
import sys
from contextvars import ContextVar
from types import TracebackType
from typing import Protocol

__all__ = ["Struck", "cause_of_death", "culprit", "current", "fail_evaluation"]


class Struck(Protocol):
    """An evaluation."""

    def strike(self, error: BaseException) -> None:
        """End with this error, which something that it has started has raised."""


_RUN = asyncio.Handle._run.__code__

# The evaluation that the running task or callback belongs to. Tasks and callbacks inherit it from what starts them.
current: ContextVar[Struck | None] = ContextVar("speval evaluation", default=None)


def fail_evaluation(error: BaseException) -> bool:
    """Fail the evaluation that an error belongs to which came out of ``run_forever``; False if it is none's.

    A loop can be run on after that: all else that is to be done is in its queues. In whichever task or callback an evaluation
    raises SystemExit or KeyboardInterrupt, it is its failure, and no other's end.
    """
    evaluation = culprit(error)
    if evaluation is None:
        return False
    evaluation.strike(error.with_traceback(_trace_of_callback(error)))
    return True


def culprit(error: BaseException) -> Struck | None:
    """Return the evaluation whose task or callback has raised an error that ended a loop, if it was one's."""
    trace = _trace_of_callback(error)
    handle = trace.tb_frame.f_locals.get("self") if trace is not None else None
    return handle._context.get(current) if handle is not None else None


def _trace_of_callback(error: BaseException) -> TracebackType | None:
    """Return the traceback from where a loop ran the callback, or the step of a task, that an error came out of, if it did."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code is not _RUN:
        trace = trace.tb_next
    return trace


async def cause_of_death() -> BaseException | None:
    """Return what has ended the event loop whose tasks are being cancelled just now; None if that is not so.

    ``asyncio.run`` cancels the tasks that are left while the exception that ended the loop is being handled, which a callback
    sees and a task not always.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[BaseException | None] = loop.create_future()

    def look() -> None:
        error = sys.exception()
        if not answer.done():
            answer.set_result(error if isinstance(error, SystemExit | KeyboardInterrupt) else None)

    loop.call_soon(look)
    return await answer
