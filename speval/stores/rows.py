"""What the rows of either kind of database mean.

Owns the codes of the statuses, and the ways from rows to an ``Evaluation`` and to ``Settings``. Invariant: a row that no
speval has written is an error that names the evaluation, never a wrong value.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from ..codec import decode
from ..errors import DatabaseError
from ..model import MOST_CONCURRENCY, Error, Evaluation, Settings, Status
from ..text import visible

__all__ = ["CODES", "COLUMNS", "STATUS", "concurrency_of", "decoded", "error_of", "evaluation", "settings_of", "worker_label"]

STATUS: dict[int, Status] = {0: "pending", 1: "in_progress", 2: "completed", 3: "failed", 4: "pending"}
CODES: dict[Status | None, str] = {
    None: "[0, 1, 2, 3, 4]", "pending": "[0, 4]", "in_progress": "[1]", "completed": "[2]", "failed": "[3]",
}  # fmt: skip

# Of evaluations (e), states (s), attempts (a) and workers (w).
COLUMNS = """
    e.name, s.status, s.updated_at, e.args, s.attempt - s.released, a.result, a.outcome,
    a.error_type, a.error_message, a.error_traceback, a.started_at, a.duration, w.id, w.host, w.pid
"""

_SETTINGS = "SELECT key, value FROM meta WHERE key IN ('paused', 'concurrency')"


def worker_label(id: int, host: str, pid: int) -> str:
    """Return how a worker is shown to people."""
    return visible(f"{host}:{pid}:{id:012x}")


def evaluation(db: str, row: Sequence[Any]) -> Evaluation:
    """Return the evaluation that a row of ``COLUMNS`` stands for.

    Raises:
        DatabaseError: its args or its result are no JSON.
    """
    name, code, updated, args, attempts, result, outcome, type_, message, traceback, started, duration, *worker = row
    status = STATUS[code]
    return {
        "name": str(name),
        "status": status,
        "updated": updated,
        "result": None if result is None else decoded(db, name, result),
        "args": decoded(db, name, args),
        "attempts": attempts,
        "error": error_of(outcome, type_, message, traceback) if status == "failed" else None,
        "started": updated if status == "in_progress" else started,
        "duration": duration,
        "worker": None if worker[0] is None else worker_label(*worker),
    }


def error_of(cause: Any, type_: str | None, message: str | None, traceback: str | None) -> Error:
    """Return the error of an attempt that brought no result."""
    return {"cause": cause, "type": str(type_ or ""), "message": str(message or ""), "traceback": str(traceback or "")}


def decoded(db: str, name: object, text: str) -> Any:
    """Return what stored JSON stands for.

    Raises:
        DatabaseError: it is none.
    """
    try:
        return decode(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DatabaseError(db, f"what is stored of evaluation {str(name)!r} is no JSON ({error})") from error


def settings_of(c: sqlite3.Connection) -> Settings:
    """Return what is set for all workers."""
    found = dict(c.execute(_SETTINGS).fetchall())
    concurrency = found.get("concurrency")
    return Settings(bool(found.get("paused")), concurrency_of(concurrency) if concurrency else None)


def concurrency_of(stored: int | float | str) -> int:
    """Return a stored concurrency, as near to it as a worker goes."""
    # No int() of a text or an infinity that may be anything: compared as a float, every number ends up in between.
    return int(min(max(float(stored), 1), MOST_CONCURRENCY))
