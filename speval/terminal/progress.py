"""The progress bar.

Owns when a bar is drawn and its text. Invariant: it only reads the database, at most 2 % of the time, and never waits for the
terminal.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from ..engine.worker import Worker
from ..errors import SpevalError
from ..escape import rate, span
from ..model import Outputs, Summary

if TYPE_CHECKING:
    from .screen import Screen

__all__ = ["Progress", "progress"]

logger = logging.getLogger("speval.progress")

_EVERY = 0.3  # seconds between two updates
_SHARE = 0.02  # the fraction of the time spent reading; counting a million evaluations is slow
_WINDOW = 60.0  # seconds; the rate is an average over this time


class Progress:
    """The progress display of one call.

    Args:
        wanted: True, False, or None: draw a bar on a terminal or in a notebook.
        screen: The terminal, or None.
    """

    def __init__(self, wanted: bool | None, screen: Screen | None) -> None:
        self._is_drawn = wanted or (wanted is None and (screen is not None or _is_notebook()))
        self._screen = screen

    @property
    def outputs(self) -> Outputs:
        """Return the outputs for worker processes, which keep their output off the line of the bar."""
        return (None, None) if self._screen is None else self._screen.outputs

    @asynccontextmanager
    async def shown(self, worker: Worker) -> AsyncIterator[None]:
        """Draw a bar while the body runs, if one is wanted.

        Args:
            worker: The worker whose eval space the bar describes.
        """
        if not self._is_drawn:
            yield
            return
        task = asyncio.create_task(self._show(worker), name="speval progress")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})  # a cancellation of the caller stays apart from the task's own
            if not task.cancelled() and not isinstance(task.exception(), SpevalError | None):
                logger.warning("the progress bar failed: %r", task.exception())

    async def _show(self, worker: Worker) -> None:
        summary = await worker.summary()
        with _bar(self._screen or sys.stderr, total=summary.total, dynamic_ncols=True) as bar:
            pace = _Pace(summary)
            try:
                while True:
                    started = time.monotonic()
                    _draw(bar, summary, [*pace.running(summary, worker), *pace.rate(summary)])
                    await asyncio.sleep(max(_EVERY, (time.monotonic() - started) / _SHARE))
                    summary = await worker.summary()
            finally:
                summary = await worker.summary()
                _draw(bar, summary, [*pace.overall(summary), f"in {span(summary.seconds)}"])


class _Pace:
    """Computes rates from counts at different times; evaluations that ended before the first count are excluded."""

    def __init__(self, summary: Summary) -> None:
        self._first = _ended(summary)
        self._seen: deque[tuple[float, int]] = deque([(time.monotonic(), self._first)])

    def rate(self, summary: Summary) -> list[str]:
        """Return the rate of the last minute, and the time left at this rate."""
        now, ended = time.monotonic(), _ended(summary)
        self._seen.append((now, ended))
        while len(self._seen) > 2 and self._seen[1][0] < now - _WINDOW:
            self._seen.popleft()
        since, before = self._seen[0]
        if ended <= before or now <= since:
            return []
        pace = (ended - before) / (now - since)
        return [rate(pace), f"{span((summary.total - ended) / pace)} left"]

    def overall(self, summary: Summary) -> list[str]:
        """Return the average rate of the whole call."""
        ended = _ended(summary) - self._first
        return [rate(ended / summary.seconds)] if ended > 0 and summary.seconds > 0 else []

    def running(self, summary: Summary, worker: Worker) -> list[str]:
        """Return how many evaluations run in this call, and how many other workers hold."""
        running, held = worker.busy
        elsewhere = max(0, summary.in_progress - held)
        if not elsewhere:
            return [f"{running} running"] if running else []
        return [f"{running} running here", f"{elsewhere} elsewhere"]


def _ended(summary: Summary) -> int:
    return summary.completed + summary.failed


def _draw(bar: Any, summary: Summary, parts: list[str]) -> None:
    bar.total, bar.n = summary.total, _ended(summary)  # the total of a lazy space grows
    bar.desc = f"{bar.n * 100 // bar.total:3d}%" if bar.total else ""  # rounded down: 100 means everything
    bar.bar_format = "{desc}|{bar}| {n_fmt}/{total_fmt}{postfix}" if bar.total else "{n_fmt} evaluations{postfix}"
    if summary.failed:
        parts.insert(0, f"{summary.failed} failed")
    bar.set_postfix_str(", ".join(parts), refresh=False)
    bar.refresh()


def _bar(file: Any, **options: Any) -> Any:
    """Return tqdm's bar for a notebook or for a terminal."""
    if _is_notebook() and importlib.util.find_spec("ipywidgets"):
        from tqdm.notebook import tqdm as notebook

        return notebook(**options)
    from tqdm import tqdm

    return tqdm(file=file, **options)


@contextmanager
def progress(wanted: bool | None) -> Iterator[Progress]:
    """Yield the progress display of a call; it controls the terminal, if there is one, while the body runs.

    Args:
        wanted: True, False, or None: draw a bar on a terminal or in a notebook.
    """
    if wanted is False or _is_notebook() or sys.stderr is None:
        yield Progress(wanted, None)
        return
    from .screen import opened

    with opened() as screen:
        yield Progress(wanted, screen)


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ == "ZMQInteractiveShell"
