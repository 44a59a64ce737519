"""Drawing from a lazy eval space.

Owns the task that asks the space for evaluations. Invariant: it never asks for more than the slots would take, so what a
space yields last it yields knowing nearly all that has ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing

from ..model import Evaluation
from ..spaces.eager import Key
from ..spaces.lazy import Source
from ..stores.base import Store

__all__ = ["Feeder"]

logger = logging.getLogger("speval.worker")

_PAGE = 1000  # evaluations read at once
_END_WITHIN = 1.0  # seconds a cancelled eval space has to clean up
_OVER = object()


class Feeder:
    """Draws evaluations, as many as it is asked for.

    Args:
        source: Where to draw from.
        store: What tells the space of what has ended.
        on_drawn: Called when something was drawn, and when nothing more will be.
        on_failure: Given what the space has raised.
    """

    def __init__(
        self, source: Source, store: Store, on_drawn: Callable[[], None], on_failure: Callable[[Exception], None]
    ) -> None:
        self._source = source
        self._store = store
        self._on_drawn = on_drawn
        self._on_failure = on_failure
        self._drawn: list[tuple[Key, str]] = []
        self._wanted = 0
        self._asked = asyncio.Event()
        self._cursor = 0
        self._task = asyncio.create_task(self._run(), name="speval eval space")

    def __repr__(self) -> str:
        return f"<Feeder of {self._source!r}{' over' if self.is_over else ''}>"

    @property
    def is_over(self) -> bool:
        """Return whether all has been taken that will ever be drawn."""
        return not self._drawn and self._task.done()

    def ask(self, idle: int, ahead: int) -> None:
        """Say how many evaluations the slots would take at once, and how many besides."""
        # Adaptive spaces are polled as late as possible, for one evaluation at a time.
        self._wanted = min(idle, 1) if self._source.looks_back else idle + ahead
        self._asked.set()

    def take(self) -> list[tuple[Key, str]]:
        """Return what was drawn since the last call."""
        drawn, self._drawn = self._drawn, []
        return drawn

    async def stop(self) -> None:
        """End drawing; a space that refuses to be cancelled is left behind."""
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=_END_WITHIN)
            if not self._task.done():
                logger.warning("the eval space refuses to be cancelled: it is left behind")

    async def _run(self) -> None:
        try:
            async with aclosing(self._source.rows(self._ended)) as rows:
                while True:
                    while self._wanted <= 0:
                        self._asked.clear()
                        await self._asked.wait()
                    row = await anext(rows, _OVER)
                    if isinstance(row, tuple):
                        self._wanted -= 1
                        self._drawn.append(row)
                        self._on_drawn()
                    elif row is None:
                        self._wanted = 0  # it is asked again when something has ended, and now and then
                    else:
                        return
        except Exception as error:
            self._on_failure(error)
        except SystemExit as error:  # else it would end the loop, or the space would pass for one that is over
            failure = RuntimeError(f"the eval space raised {error!r}")
            failure.__cause__ = error
            self._on_failure(failure)
        finally:
            asyncio.get_running_loop().call_soon(self._on_drawn)  # when the task is done

    async def _ended(self) -> list[Evaluation]:
        """Return what has ended since the last call, whichever worker recorded it."""
        found: list[Evaluation] = []
        while True:
            self._cursor, page = await self._store.ended_since(self._cursor, _PAGE)
            found += [evaluation for _, evaluation in page]
            if not page:
                return found
