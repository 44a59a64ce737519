"""An eval space that does not exist yet: evaluations are drawn from it while the run goes on.

Owns the way from an async iterator, or from a function that looks at what has ended so far, to rows of (name, args as JSON
text). Invariant: whoever draws decides when it is asked for more; and what a plain generator does, it does in a thread of
its own, so it may take its time.
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

Ended = Callable[[], Awaitable[list[Evaluation]]]  # what has ended since it was last called

_OVER = object()


def is_source(eval_space: EvalSpace) -> bool:
    """Tell whether an eval space is to be drawn from bit by bit."""
    if isinstance(eval_space, Mapping) or hasattr(type(eval_space), "__iter__"):
        return False
    return isinstance(eval_space, AsyncIterable) or callable(eval_space)


class Source:
    """Draws evaluations from an async iterator of args, or from what a function yields.

    Args:
        eval_space: An async iterable of args, named by their positions; or a function, see ``aio.speval``.

    Attributes:
        count: None, since nobody knows how many there will be.
        looks_back: It looks at what has ended, so it should be asked as late as can be: by then, more has.
    """

    count: None = None

    def __init__(self, eval_space: AsyncIterable[Any] | Callable[..., Any]) -> None:
        self._eval_space = eval_space
        self.looks_back = not isinstance(eval_space, AsyncIterable)

    def __repr__(self) -> str:
        return f"<Source {self._eval_space!r}>"

    async def rows(self, ended: Ended) -> AsyncGenerator[tuple[Key, str] | None, None]:
        """Yield (name, args as JSON text) of each evaluation, and None where there is none for the time being.

        Args:
            ended: For a function that wants to know.

        Raises:
            OptionError: the function returns nothing that can be iterated over.
            SpaceError: what comes is no pair of a name and args.
            UnserializableError: some args can't be written as JSON.
            Exception: whatever the iterator raises.
        """
        async with aclosing(_items(self._eval_space, ended)) as items:
            async for item in items:
                yield None if item is None else _row(item)

    def close(self) -> None:
        """Do nothing: what there is to give back is given back when ``rows`` is closed."""


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
            await args.aclose()  # a loop that is left does not do that, and it may hold a connection


async def _in_thread(function: Callable[..., Any], ended: Ended) -> AsyncGenerator[Any, None]:
    """Iterate in a thread over what the function returns."""
    loop = asyncio.get_running_loop()

    async def fetched() -> list[Evaluation]:
        return await ended()

    def started() -> Iterator[Any]:
        items = function(lambda: asyncio.run_coroutine_threadsafe(fetched(), loop).result())
        if not hasattr(type(items), "__iter__"):
            expected = "a function that is to serve as an eval space has to be a generator, or to return an iterator"
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
    """Call the function; what would end the program where it comes out is an error like any other."""
    try:
        return function(*args)
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"the eval space raised {error!r}") from error


def _row(item: Any) -> tuple[Key, str]:
    if not isinstance(item, tuple) or len(item) != 2:
        raise SpaceError(repr(item)[:60], "a function that serves as an eval space yields pairs of a name and args, or None")
    name, args = item
    key = checked_name(name)
    return key, encode(args, f"the args of evaluation {str(key)!r}")
