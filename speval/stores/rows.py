"""The meaning of rows, for both kinds of database.

Owns the status codes, the conversion of rows to ``Evaluation`` and ``Settings``, and the list of damaged evaluations.
Invariant: a damaged row is an error that names the evaluation, never a wrong value.
"""

from __future__ import annotations

import logging
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from ..codec import read
from ..errors import EvaluationDamagedError
from ..escape import visible
from ..model import MOST_CONCURRENCY, Error, Evaluation, Finding, Settings, Status, counted

__all__ = [
    "CODES",
    "PAGE_SIZE",
    "STATUS",
    "Damaged",
    "concurrency_of",
    "decoded",
    "error_of",
    "evaluation",
    "fits",
    "label_of",
    "settings_of",
    "worker_label",
]

logger = logging.getLogger("speval.store")

PAGE_SIZE = 4_000_000  # bytes of text in a page of rows without its last row
_NAMED = 5  # the maximum number of damaged evaluations that a warning names
_KEPT = 1000  # the maximum number that ``Damaged.first`` contains

STATUS: dict[int, Status] = {0: "pending", 1: "in_progress", 2: "completed", 3: "failed", 4: "pending"}
CODES: dict[Status | None, str] = {
    None: "[0, 1, 2, 3, 4]", "pending": "[0, 4]", "in_progress": "[1]", "completed": "[2]", "failed": "[3]",
}  # fmt: skip

_SETTINGS = "SELECT key, value FROM meta WHERE key IN ('paused', 'concurrency')"


class Damaged:
    """The damaged evaluations that reading has skipped.

    Args:
        db: The display name of the database.
    """

    def __init__(self, db: str) -> None:
        self._db = db
        self.count = 0
        self.first: list[EvaluationDamagedError] = []

    def add(self, error: EvaluationDamagedError) -> None:
        """Add one damaged evaluation."""
        self.count += 1
        if len(self.first) < _KEPT:
            self.first.append(error)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Add the evaluation if the body raises ``EvaluationDamagedError``, and continue."""
        try:
            yield
        except EvaluationDamagedError as error:
            self.add(error)

    def findings(self, fix: str) -> list[Finding]:
        """Return the damaged evaluations as findings and clear the list, so that no warning follows."""
        found = [Finding(f"evaluation {error.name!r} is damaged: {error.what}", fix, True) for error in self.first]
        if self.count > len(found):
            found.append(Finding(f"{counted(self.count - len(found))} more are damaged", fix, True))
        self.count, self.first = 0, []
        return found

    def tell(self) -> None:
        """Log a warning about the damaged evaluations since the last call."""
        if self.count:
            named = "; ".join(visible(f"{error.name!r}: {error.what}") for error in self.first[:_NAMED])
            more = f"; and {self.count - _NAMED} more" if self.count > _NAMED else ""
            what = "1 evaluation is" if self.count == 1 else f"{self.count} evaluations are"
            fix = f"`speval doctor {self._db}` names all of them, `speval salvage {self._db} NEW` saves all others"
            logger.warning("%s: skipped: %s damaged (%s%s); %s", self._db, what, named, more, fix)
        self.count = 0
        self.first = []


def fits(pattern: str, name: str) -> bool:
    """Tell whether the whole name matches a pattern: ``*`` matches any text, ``?`` any single character."""
    return _compiled(pattern).fullmatch(name) is not None


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile("".join(".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern), re.DOTALL)


def worker_label(id: int, host: str, pid: int) -> str:
    """Return the display name of a worker: host:pid:id."""
    return visible(f"{host}:{pid}:{id:012x}")


def label_of(worker: Sequence[Any]) -> str | None:
    """Return the display name of a worker from its id, host and pid, which are None for an unknown worker."""
    return None if worker[0] is None else worker_label(*worker)


def evaluation(db: str, row: Sequence[Any]) -> Evaluation:
    """Return the evaluation of a row.

    Args:
        db: The display name of the database, for the error.
        row: Name, status code, time of the last change, args, attempts, result, outcome, type, message and traceback of its
            error, start, duration, and id, host and pid of the worker.

    Raises:
        EvaluationDamagedError: its args or its result are not JSON, or nested too deeply.
    """
    name, code, updated, args, attempts, result, outcome, type_, message, traceback, started, duration, *worker = row
    status = STATUS[code]
    return {
        "name": str(name),
        "status": status,
        "updated": updated,
        "result": decoded(db, name, result) if status == "completed" else None,
        "args": decoded(db, name, args),
        "attempts": attempts,
        "error": error_of(outcome, type_, message, traceback) if status == "failed" else None,
        "started": updated if status == "in_progress" else started,
        "duration": duration,
        "worker": label_of(worker),
    }


def error_of(cause: Any, type_: str | None, message: str | None, traceback: str | None) -> Error:
    """Return the error of a failed attempt."""
    return {"cause": cause, "type": str(type_ or ""), "message": str(message or ""), "traceback": str(traceback or "")}


def decoded(db: str, name: object, text: str) -> Any:
    """Return the value of stored JSON.

    Raises:
        EvaluationDamagedError: the text is not JSON, or is nested deeper than speval writes.
    """
    try:
        return read(text)
    except (TypeError, ValueError) as error:
        raise EvaluationDamagedError(db, str(name), f"its stored args or result are not JSON ({error})") from error


def settings_of(c: sqlite3.Connection) -> Settings:
    """Return the settings for all workers."""
    found = dict(c.execute(_SETTINGS).fetchall())
    concurrency = found.get("concurrency")
    return Settings(bool(found.get("paused")), concurrency_of(concurrency) if concurrency else None)


def concurrency_of(stored: int | float | str) -> int:
    """Return a stored concurrency, limited to the allowed range."""
    # Compare as float before int(): the stored value may be text or infinity.
    return int(min(max(float(stored), 1), MOST_CONCURRENCY))
