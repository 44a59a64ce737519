"""The progress bar.

Owns when one is shown and what it says. Invariant: it only reads, seldom enough to cost next to nothing, and waits for no
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

_EVERY = 0.3  # seconds between two looks
_SHARE = 0.02  # of the time may go into looking; counting a million evaluations takes a while
_WINDOW = 60.0  # seconds over which the rate is taken


class Progress:
    """What a call shows of its progress.

    Args:
        wanted: True, False, or None for when somebody can see it.
        screen: The terminal to show it in, or None.
    """

    def __init__(self, wanted: bool | None, screen: Screen | None) -> None:
        self._is_shown = wanted or (wanted is None and (screen is not None or _is_notebook()))
        self._screen = screen

    @property
    def outputs(self) -> Outputs:
        """Return what worker processes are to print to, so that it does not run into the bar."""
        return (None, None) if self._screen is None else self._screen.outputs

    @asynccontextmanager
    async def shown(self, worker: Worker) -> AsyncIterator[None]:
        """Show a bar while the body runs, if one is wanted.

        Args:
            worker: Whose eval space to show.
        """
        if not self._is_shown:
            yield
            return
        task = asyncio.create_task(self._show(worker), name="speval progress")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})  # which does not take a cancellation of the caller for the task's
            if not task.cancelled() and not isinstance(task.exception(), SpevalError | None):
                logger.warning("the progress bar ended early: %r", task.exception())

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
    """How quick it goes, from what was seen at different times; what had ended before the first look says nothing about it."""

    def __init__(self, summary: Summary) -> None:
        self._first = _ended(summary)
        self._seen: deque[tuple[float, int]] = deque([(time.monotonic(), self._first)])

    def rate(self, summary: Summary) -> list[str]:
        """Return the rate of the last minute, and how long it takes if it goes on like this."""
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
        """Return the rate of all that ended while we looked."""
        ended = _ended(summary) - self._first
        return [rate(ended / summary.seconds)] if ended > 0 and summary.seconds > 0 else []

    def running(self, summary: Summary, worker: Worker) -> list[str]:
        """Return how many evaluations run here, and how many other copies hold."""
        running, held = worker.busy
        elsewhere = max(0, summary.in_progress - held)
        if not elsewhere:
            return [f"{running} running"] if running else []
        return [f"{running} running here", f"{elsewhere} elsewhere"]


def _ended(summary: Summary) -> int:
    return summary.completed + summary.failed


def _draw(bar: Any, summary: Summary, parts: list[str]) -> None:
    bar.total, bar.n = summary.total, _ended(summary)  # the total grows where the space is drawn bit by bit
    bar.desc = f"{bar.n * 100 // bar.total:3d}%" if bar.total else ""  # 100 only when it is everything
    bar.bar_format = "{desc}|{bar}| {n_fmt}/{total_fmt}{postfix}" if bar.total else "{n_fmt} evaluations{postfix}"
    if summary.failed:
        parts.insert(0, f"{summary.failed} failed")
    bar.set_postfix_str(", ".join(parts), refresh=False)
    bar.refresh()


def _bar(file: Any, **options: Any) -> Any:
    """Return tqdm's bar for where we are."""
    if _is_notebook() and importlib.util.find_spec("ipywidgets"):
        from tqdm.notebook import tqdm as notebook

        return notebook(**options)
    from tqdm import tqdm

    return tqdm(file=file, **options)


@contextmanager
def progress(wanted: bool | None) -> Iterator[Progress]:
    """Return what shows the progress of a call, and take the terminal for it while the body runs, if there is one.

    Args:
        wanted: True, False, or None for when somebody can see it.
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
