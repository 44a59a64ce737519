"""What the rows of either kind of database mean.

Owns the codes of the statuses, the ways from rows to an ``Evaluation`` and to ``Settings``, and the account of what can't be
read. Invariant: a row that no speval has written is an error that names the evaluation, never a wrong value.
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

PAGE_SIZE = 4_000_000  # bytes of text that a page of reading holds besides its last row
_NAMED = 5  # damaged evaluations that a warning names
_KEPT = 1000  # that are kept for whoever wants more

STATUS: dict[int, Status] = {0: "pending", 1: "in_progress", 2: "completed", 3: "failed", 4: "pending"}
CODES: dict[Status | None, str] = {
    None: "[0, 1, 2, 3, 4]", "pending": "[0, 4]", "in_progress": "[1]", "completed": "[2]", "failed": "[3]",
}  # fmt: skip

_SETTINGS = "SELECT key, value FROM meta WHERE key IN ('paused', 'concurrency')"


class Damaged:
    """An account of the evaluations that were left out of what was read.

    Args:
        db: The database, as people read it.
    """

    def __init__(self, db: str) -> None:
        self._db = db
        self.count = 0
        self.first: list[EvaluationDamagedError] = []

    def add(self, error: EvaluationDamagedError) -> None:
        """Note one."""
        self.count += 1
        if len(self.first) < _KEPT:
            self.first.append(error)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Note the evaluation that is found damaged inside, and go on."""
        try:
            yield
        except EvaluationDamagedError as error:
            self.add(error)

    def findings(self, fix: str) -> list[Finding]:
        """Return what was noted as what a doctor has found, instead of a warning."""
        found = [Finding(f"evaluation {error.name!r} is damaged: {error.what}", fix, True) for error in self.first]
        if self.count > len(found):
            found.append(Finding(f"{counted(self.count - len(found))} more are damaged", fix, True))
        self.count, self.first = 0, []
        return found

    def tell(self) -> None:
        """Warn of what was noted since the last time."""
        if self.count:
            named = "; ".join(visible(f"{error.name!r}: {error.what}") for error in self.first[:_NAMED])
            more = f"; and {self.count - _NAMED} more" if self.count > _NAMED else ""
            what = "1 evaluation is" if self.count == 1 else f"{self.count} evaluations are"
            fix = f"`speval doctor {self._db}` names all, `speval salvage {self._db} NEW` saves the others"
            logger.warning("%s: %s damaged and left out (%s%s); %s", self._db, what, named, more, fix)
        self.count = 0
        self.first = []


def fits(pattern: str, name: str) -> bool:
    """Tell whether the whole name fits a pattern, in which ``*`` stands for any text and ``?`` for any one character."""
    return _compiled(pattern).fullmatch(name) is not None


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile("".join(".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern), re.DOTALL)


def worker_label(id: int, host: str, pid: int) -> str:
    """Return how a worker is shown to people."""
    return visible(f"{host}:{pid}:{id:012x}")


def label_of(worker: Sequence[Any]) -> str | None:
    """Return how a worker is shown whose id, host and pid may all be None."""
    return None if worker[0] is None else worker_label(*worker)


def evaluation(db: str, row: Sequence[Any]) -> Evaluation:
    """Return the evaluation that the values of a row stand for.

    Args:
        db: The database, for the error.
        row: Name, code of the status, when it changed, args, attempts, result, outcome, type, message and traceback of its
            error, start, duration, and id, host and pid of the worker.

    Raises:
        EvaluationDamagedError: its args or its result are no JSON, or too deep.
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
    """Return the error of an attempt that brought no result."""
    return {"cause": cause, "type": str(type_ or ""), "message": str(message or ""), "traceback": str(traceback or "")}


def decoded(db: str, name: object, text: str) -> Any:
    """Return what stored JSON stands for.

    Raises:
        EvaluationDamagedError: it is none, or nested deeper than anything that speval writes.
    """
    try:
        return read(text)
    except (TypeError, ValueError) as error:
        raise EvaluationDamagedError(db, str(name), f"what is stored of it is no JSON ({error})") from error


def settings_of(c: sqlite3.Connection) -> Settings:
    """Return what is set for all workers."""
    found = dict(c.execute(_SETTINGS).fetchall())
    concurrency = found.get("concurrency")
    return Settings(bool(found.get("paused")), concurrency_of(concurrency) if concurrency else None)


def concurrency_of(stored: int | float | str) -> int:
    """Return a stored concurrency, as near to it as a worker goes."""
    # No int() of a text or an infinity that may be anything: compared as a float, every number ends up in between.
    return int(min(max(float(stored), 1), MOST_CONCURRENCY))
