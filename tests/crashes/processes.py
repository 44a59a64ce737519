"""The processes of a round, told apart by a mark in their environment, and what they have left in a database."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

MARK = "SPEVAL_TESTS_MARK"  # in the environment of every process of a round, so that those left behind are found
FINISH_WITHIN = 90.0  # seconds the copies may take to complete everything once nobody kills them any more


def rows(db: Path, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Return what a query brings, with nothing of speval."""
    with closing(sqlite3.connect(db, timeout=30)) as connection:
        return connection.execute(sql, parameters).fetchall()


def marked(mark: str) -> list[int]:
    """Return the processes that are alive of those started with the mark, and of those that they have started."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in environment.read_bytes():  # that of a dead one is empty
                found.append(int(environment.parent.name))
        except OSError:
            continue  # it has just ended, or is somebody else's
    return found


def left_behind(mark: str) -> list[int]:
    """Return the marked processes that don't end by themselves, though all that they worked for have ended."""
    deadline = time.monotonic() + 10
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def end_marked(mark: str) -> None:
    """End what is left of the marked processes."""
    for pid in marked(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
