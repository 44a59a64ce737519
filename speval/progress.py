"""The progress bar.

Owns when one is shown and what it says. Invariant: it only reads, seldom enough to cost next to nothing.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from .errors import SpevalError
from .worker import Worker

__all__ = ["shown"]

logger = logging.getLogger("speval.progress")

_EVERY = 0.3  # seconds between two looks
_SHARE = 0.02  # of the time may go into looking; counting a million evaluations takes a while


@asynccontextmanager
async def shown(worker: Worker, progress: bool | None) -> AsyncIterator[None]:
    """Show a bar while the body runs, if one is wanted.

    Args:
        worker: Whose eval space to show.
        progress: True, False, or None for when somebody can see it.
    """
    if not (_is_seen() if progress is None else progress):
        yield
        return
    task = asyncio.create_task(_show(worker), name="speval progress")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})  # which does not take a cancellation of the caller for the task's
        if not task.cancelled() and not isinstance(task.exception(), SpevalError | None):
            logger.warning("the progress bar ended early: %r", task.exception())


async def _show(worker: Worker) -> None:
    summary = await worker.summary()
    # What is done already says nothing about the rate.
    done = summary.completed + summary.failed
    with _bar(total=summary.total, initial=done, unit=" evaluations", dynamic_ncols=True) as bar:
        try:
            while True:
                started = time.monotonic()
                await _update(bar, worker)
                await asyncio.sleep(max(_EVERY, (time.monotonic() - started) / _SHARE))
        finally:
            await _update(bar, worker)


async def _update(bar: Any, worker: Worker) -> None:
    summary = await worker.summary()
    bar.total = summary.total  # which grows where the space is drawn bit by bit
    if summary.failed:
        bar.set_postfix(failed=summary.failed, refresh=False)
    bar.update(summary.completed + summary.failed - bar.n)


def _bar(**options: Any) -> Any:
    """Return tqdm's bar for where we are."""
    if _is_notebook() and importlib.util.find_spec("ipywidgets"):
        from tqdm.notebook import tqdm as notebook

        return notebook(**options)
    from tqdm import tqdm

    return tqdm(**options)


def _is_seen() -> bool:
    """Tell whether somebody looks: at a notebook, or at the terminal of a program in its foreground."""
    if _is_notebook():
        return True
    try:
        # Twenty copies in the background of one terminal would draw over each other.
        return sys.stderr.isatty() and os.tcgetpgrp(sys.stderr.fileno()) == os.getpgrp()
    except (AttributeError, OSError, ValueError):
        return False


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ == "ZMQInteractiveShell"
