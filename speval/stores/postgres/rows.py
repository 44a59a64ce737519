"""The rows of a PostgreSQL database.

Owns the columns of an evaluation across the tables, and the conversion of a row to an ``Evaluation``. Invariant: every query
here is one statement with one snapshot, in which each evaluation is in exactly one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...model import Evaluation, Settings, Status
from ..rows import concurrency_of
from ..rows import evaluation as evaluation_of
from .connection import Connection
from .schema import Names, true_name

__all__ = ["COLUMNS", "FINAL", "PAGE_SIZE", "SIZE", "STATES", "evaluation", "in_space", "loading", "page_of", "settings_of"]

PAGE_SIZE = 8_000_000  # bytes of args and results in a page, without its last row

# From evaluations (e), queue (q), running (r), attempts (a) and workers (w); the status codes are those of the SQLite store.
COLUMNS = """
    e.name, CASE WHEN a.seq IS NOT NULL THEN CASE a.outcome WHEN 'completed' THEN 2 ELSE 3 END
        WHEN r.id IS NOT NULL THEN CASE WHEN r.held THEN 4 ELSE 1 END ELSE 0 END,
    coalesce(a.ended_at, r.updated_at, q.updated_at), e.args,
    coalesce(a.attempt - a.released, r.attempt - r.released, q.attempt - q.released),
    a.result, a.outcome, a.error_type, a.error_message, a.error_traceback, a.started_at, a.duration, w.id, w.host, w.pid
"""
_NO_QUEUE = (
    "(SELECT NULL::bigint AS id, NULL::integer AS attempt, NULL::integer AS released, NULL::double precision AS updated_at)"
)
_NO_RUNNING = (
    "(SELECT NULL::bigint AS id, NULL::integer AS attempt, NULL::integer AS released, NULL::boolean AS held,"
    " NULL::bigint AS worker, NULL::double precision AS updated_at)"
)
_WORKER = "LEFT JOIN speval.workers AS w ON w.id = CASE WHEN a.seq IS NOT NULL THEN a.worker WHEN NOT r.held THEN r.worker END"

# Evaluations in every state.
STATES = f"""
speval.evaluations AS e
LEFT JOIN speval.queue AS q ON q.id = e.id
LEFT JOIN speval.running AS r ON r.id = e.id
LEFT JOIN speval.attempts AS a ON a.evaluation = e.id AND a.final
{_WORKER}
"""
# Only completed and failed evaluations.
FINAL = f"""
speval.attempts AS a JOIN speval.evaluations AS e ON e.id = a.evaluation
LEFT JOIN {_NO_QUEUE} AS q ON false LEFT JOIN {_NO_RUNNING} AS r ON false
{_WORKER}
"""
_ENDED = "a.final AND a.outcome {} 'completed'"
_WHERE: dict[Status | None, str] = {
    None: "true",
    "pending": "(q.id IS NOT NULL OR r.held)",
    "in_progress": "NOT r.held",
    "completed": "a.final AND a.outcome = 'completed'",
    "failed": "a.final AND a.outcome <> 'completed'",
}


_SETTINGS = "SELECT key, value FROM speval.meta WHERE key IN ('paused', 'concurrency')"


def settings_of(c: Connection, names: Names) -> Settings:
    """Return the settings for all workers."""
    values = dict(c.execute(names(_SETTINGS)).fetchall())
    concurrency = values.get("concurrency")
    return Settings(values.get("paused", "0") != "0", None if concurrency is None else concurrency_of(concurrency))


# The server knows these sizes without reading the values.
SIZE = "octet_length(e.args) + coalesce(octet_length(a.result), 0) + coalesce(octet_length(a.error_traceback), 0)"


def page_of(query: str) -> str:
    """Return a query for one page: at most ``limit`` rows, and at most ``size`` bytes plus one row.

    Args:
        query: A query whose first column is ``place`` and whose last column is ``size``.
    """
    return f"""
        SELECT * FROM (
            SELECT part.*, sum(size) OVER (ORDER BY place ROWS UNBOUNDED PRECEDING) AS upto
            FROM ({query} ORDER BY place LIMIT %(limit)s) AS part
        ) AS page WHERE upto - size <= %(size)s ORDER BY place
    """


def loading(status: Status | None) -> str:
    """Return the query for evaluations with a status and an id above ``after``; callers may append conditions."""
    return f"SELECT e.id AS place, {COLUMNS}, {SIZE} AS size FROM {STATES} WHERE e.id > %(after)s AND {_WHERE[status]}"


def in_space(column: str) -> str:
    """Return the SQL condition that an id belongs to the eval space."""
    return (
        f"{column} BETWEEN %(first)s AND %(last)s AND (%(space)s::integer IS NULL OR NOT EXISTS ("
        f"SELECT FROM speval.unlisted AS s WHERE s.space = %(space)s::integer AND s.id = {column}))"
    )


def evaluation(db: str, row: Sequence[Any]) -> Evaluation:
    """Return the evaluation of a row with ``COLUMNS``.

    Raises:
        DatabaseError: its args or its result are not JSON.
    """
    name, *numbers, type_, message, traceback, started, duration, id, host, pid = row
    texts = [text if text is None else true_name(text) for text in (type_, message, traceback)]
    return evaluation_of(db, (true_name(name), *numbers, *texts, started, duration, id, host, pid))
