"""A lazy eval space, read from an iterator during the run.

Owns the conversion of an async iterator, or of a function that reads the ended evaluations (an adaptive space), to rows of
(name, args as JSON text). Invariant: the space is only advanced when the caller polls it; a plain generator runs in a separate
thread, so it may block.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from ..codec import encode
from ..errors import OptionError, SpaceError
from ..model import EvalSpace, Evaluation
from ..threads import WorkThread
from .eager import Key, checked_name

__all__ = ["Ended", "Source", "is_source"]

T = TypeVar("T")

Ended = Callable[[], Awaitable[list[Evaluation]]]  # returns the evaluations that ended since the last call

_OVER = object()


def is_source(eval_space: EvalSpace) -> bool:
    """Tell whether an eval space is lazy."""
    if isinstance(eval_space, Mapping) or hasattr(type(eval_space), "__iter__"):
        return False
    return isinstance(eval_space, AsyncIterable) or callable(eval_space)


class Source:
    """Reads evaluations from an async iterator of args, or from an adaptive space.

    Args:
        eval_space: An async iterable of args, named by their positions; or a function, see ``speval``.

    Attributes:
        count: None: the size is unknown.
        looks_back: Whether the space is adaptive. Adaptive spaces are polled one item at a time, as late as possible, so
            that more evaluations have ended by then.
    """

    count: None = None

    def __init__(self, eval_space: AsyncIterable[Any] | Callable[..., Any]) -> None:
        self._eval_space = eval_space
        self.looks_back = not isinstance(eval_space, AsyncIterable)

    def __repr__(self) -> str:
        return f"<Source {self._eval_space!r}>"

    async def rows(self, ended: Ended) -> AsyncGenerator[tuple[Key, str] | None, None]:
        """Yield (name, args as JSON text) of each evaluation, or None when there is nothing to evaluate at the moment.

        Args:
            ended: Passed to the function of an adaptive space.

        Raises:
            OptionError: the function does not return an iterator.
            SpaceError: an item is not a pair of a name and args.
            UnserializableError: some args can't be written as JSON.
            Exception: an exception that the iterator raised.
        """
        async with aclosing(_items(self._eval_space, ended)) as items:
            async for item in items:
                yield None if item is None else _row(item)

    def close(self) -> None:
        """Do nothing: closing ``rows`` releases everything."""


def _items(eval_space: AsyncIterable[Any] | Callable[..., Any], ended: Ended) -> AsyncGenerator[Any, None]:
    if isinstance(eval_space, AsyncIterable):
        return _numbered(eval_space)
    if inspect.isasyncgenfunction(eval_space) or inspect.isasyncgenfunction(type(eval_space).__call__):
        items: AsyncGenerator[Any, None] = eval_space(ended)
        return items
    return _in_thread(eval_space, ended)


async def _numbered(args: AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
    position = 0
    try:
        async for item in args:
            yield str(position), item
            position += 1
    finally:
        if isinstance(args, AsyncGenerator):
            await args.aclose()  # leaving the loop does not close it, and it may hold a connection


async def _in_thread(function: Callable[..., Any], ended: Ended) -> AsyncGenerator[Any, None]:
    """Iterate over the items of the function in a separate thread."""
    loop = asyncio.get_running_loop()

    async def fetched() -> list[Evaluation]:
        return await ended()

    def started() -> Iterator[Any]:
        items = function(lambda: asyncio.run_coroutine_threadsafe(fetched(), loop).result())
        if not hasattr(type(items), "__iter__"):
            expected = "a function used as an eval space must be a generator function or return an iterator"
            raise OptionError("eval_space", repr(function)[:60], expected)
        return iter(items)

    thread = WorkThread("speval eval space")
    try:
        items = await thread.run(partial(_contained, started))
        while (item := await thread.run(partial(_contained, next, items, _OVER))) is not _OVER:
            yield item
    finally:
        thread.end()


def _contained(function: Callable[..., T], *args: Any) -> T:
    """Call the function; turn SystemExit and the like into a RuntimeError, which does not end the program."""
    try:
        return function(*args)
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"the eval space raised {error!r}") from error


def _row(item: Any) -> tuple[Key, str]:
    if not isinstance(item, tuple) or len(item) != 2:
        raise SpaceError(repr(item)[:60], "a function used as an eval space must yield pairs of a name and args, or None")
    name, args = item
    key = checked_name(name)
    return key, encode(args, f"the args of evaluation {str(key)!r}")
