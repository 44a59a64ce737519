"""A namespace of a PostgreSQL database, read or filled as a whole.

Owns the SQL of copying. Invariant: claims are not copied; an evaluation in progress is pending in the copy, and no attempt is
charged for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from ...errors import DatabaseNotEmptyError
from ...url import PostgresUrl
from ..archive import Archive, Content, Counts, StoredAttempt, StoredEvaluation, StoredWorker, pieces
from ..base import StoreMode
from ..rows import Damaged
from .connection import Connection
from .rows import PAGE_SIZE, page_of, settings_of
from .schema import READY, Names, opened, stored_name, true_name

__all__ = ["PostgresArchive"]

T = TypeVar("T")

_FOR_LONG = 7 * 86_400.0  # the time limit of copying, seconds
_AT_ONCE = 1000  # the maximum number of rows in a page

_WORKERS = """
SELECT id, host, pid, machine, start, lease, started_at, last_seen, coalesce(ended_at, last_seen) FROM speval.workers
"""
_ATTEMPTS = page_of("""
SELECT a.seq AS place, a.evaluation, a.attempt, a.worker, a.started_at, a.duration, a.ended_at, a.outcome, a.result,
    a.error_type, a.error_message, a.error_traceback,
    coalesce(octet_length(a.result), 0) + coalesce(octet_length(a.error_traceback), 0) AS size
FROM speval.attempts AS a WHERE a.seq > %(after)s
""")
_EVALUATIONS = page_of("""
SELECT e.id AS place, e.name, e.args, CASE WHEN a.seq IS NULL THEN 0 WHEN a.outcome = 'completed' THEN 2 ELSE 3 END,
    coalesce(a.attempt, r.attempt, q.attempt), coalesce(a.released, r.released + (NOT r.held)::integer, q.released),
    coalesce(r.forgiven, q.forgiven, 0), coalesce(a.suspect, r.suspect, q.suspect),
    (SELECT max(l.seq) FROM speval.attempts AS l WHERE l.evaluation = e.id),
    coalesce(a.ended_at, r.updated_at, q.updated_at), octet_length(e.args) AS size
FROM speval.evaluations AS e LEFT JOIN speval.queue AS q ON q.id = e.id LEFT JOIN speval.running AS r ON r.id = e.id
LEFT JOIN speval.attempts AS a ON a.evaluation = e.id AND a.final
WHERE e.id > %(after)s
""")
# A page is a few rows of large tables; without statistics the planner would choose other plans.
_PAGES = (
    "SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; SET LOCAL enable_seqscan = off; SET LOCAL jit = off"
)
_LOCK = "SELECT pg_advisory_xact_lock(1936745846, 'speval.evaluations'::regclass::oid::integer)"
_IS_EMPTY = "SELECT NOT EXISTS (SELECT FROM speval.evaluations) AND NOT EXISTS (SELECT FROM speval.attempts)"
_SETTING = "INSERT INTO speval.meta VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
_KEPT = """
CREATE TEMPORARY TABLE kept (LIKE speval.workers) ON COMMIT DROP;
CREATE TEMPORARY TABLE standing (id bigint, name text COLLATE "C", args text, status integer, attempt integer, released integer,
    forgiven integer, suspect boolean, last bigint, updated_at double precision) ON COMMIT DROP
"""
_COPY_WORKERS = """
COPY pg_temp.kept (id, host, pid, machine, start, lease, started_at, last_seen, ended_at, expires_at, beat, dead, floor)
FROM STDIN
"""
_ADD_WORKERS = "INSERT INTO speval.workers SELECT * FROM pg_temp.kept ON CONFLICT (id) DO NOTHING"
_COPY_ATTEMPTS = """
COPY speval.attempts (seq, evaluation, attempt, worker, started_at, duration, ended_at, outcome, result, error_type,
    error_message, error_traceback, final, released, suspect) FROM STDIN
"""
_COPY_EVALUATIONS = "COPY pg_temp.standing FROM STDIN"
_ADD_EVALUATIONS = "INSERT INTO speval.evaluations SELECT id, name, args FROM pg_temp.standing ORDER BY id"
_ENQUEUE = """
INSERT INTO speval.queue (id, attempt, released, forgiven, suspect, put_back, updated_at)
SELECT id, attempt, released, forgiven, suspect, CASE WHEN attempt > 0 THEN id END, updated_at
FROM pg_temp.standing WHERE status = 0 ORDER BY id
"""
_FINISH = """
UPDATE speval.attempts AS a SET final = true, released = s.released, suspect = s.suspect
FROM pg_temp.standing AS s WHERE s.status <> 0 AND a.seq = s.last
"""
_NUMBERS = """
SELECT setval('speval.ids', (SELECT coalesce(max(id), 0) FROM speval.evaluations)),
    setval('speval.seqs', (SELECT coalesce(max(seq), 1) FROM speval.attempts), EXISTS (SELECT FROM speval.attempts))
"""
_NEWS = "SELECT pg_notify('speval.news', '')"


class PostgresArchive(Archive):
    """One namespace of a PostgreSQL database.

    Args:
        url: The database and the namespace.
        mode: ``read`` to read it, ``create`` to fill it.
    """

    def __init__(self, url: PostgresUrl, mode: StoreMode) -> None:
        self._shown = url.shown
        self.damaged = Damaged(url.shown)
        self._names = Names(url.schema)
        self._connection = opened(url, mode)

    def __repr__(self) -> str:
        return f"<PostgresArchive {self._shown!r}>"

    def close(self) -> None:
        self._connection.close()

    def read(self, work: Callable[[Content], T]) -> T:
        return self._connection.run_once(_FOR_LONG, self._read, work)

    def _read(self, c: Connection, work: Callable[[Content], T]) -> T:
        c.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        c.execute(_PAGES)

        def rows(sql: str) -> Iterator[tuple[Any, ...]]:
            after = -1
            while page := c.execute(self._names(sql), {"after": after, "limit": _AT_ONCE, "size": PAGE_SIZE}).fetchall():
                after = page[-1][0]
                yield from (row[:-2] for row in page)

        workers = c.execute(self._names(_WORKERS)).fetchall()
        return work(
            Content(
                settings_of(c, self._names),
                map(StoredWorker._make, iter(workers)),
                (StoredAttempt._make(_as_it_was(row, 9)) for row in rows(_ATTEMPTS)),
                (StoredEvaluation(id, true_name(name), *rest) for id, name, *rest in rows(_EVALUATIONS)),
            )
        )

    def fill(self, content: Content) -> Counts:
        return self._connection.run_once(_FOR_LONG, self._fill, content)

    def _fill(self, c: Connection, content: Content) -> Counts:
        with c.block():
            self._one(c, _LOCK)
            self._one(c, READY)
            (is_empty,) = self._one(c, _IS_EMPTY)
            if not is_empty:
                raise DatabaseNotEmptyError(self._shown)
            settings = {"paused": 1 if content.settings.paused else None, "concurrency": content.settings.concurrency}
            for key, value in settings.items():
                if value is not None:
                    c.execute(self._names(_SETTING), (key, str(value)))
            c.execute(self._names(_KEPT))
            self._copy(c, _COPY_WORKERS, ((*worker, 0.0, 0, False, 0) for worker in content.workers))
            c.execute(self._names(_ADD_WORKERS))
            attempts = self._copy(c, _COPY_ATTEMPTS, ((*_as_stored(row, 9), False, 0, False) for row in content.attempts))
            evaluations = self._copy(c, _COPY_EVALUATIONS, (_as_stored(row, 1, 2) for row in content.evaluations))
            for sql in ("ANALYZE pg_temp.standing", _ADD_EVALUATIONS, _ENQUEUE, _FINISH):
                c.execute(self._names(sql))
            self._one(c, _NUMBERS)
            self._one(c, _NEWS)
        return Counts(evaluations, attempts)

    def _copy(self, c: Connection, sql: str, rows: Iterable[tuple[Any, ...]]) -> int:
        count = 0
        with c.cursor() as cursor, cursor.copy(self._names(sql)) as copy:
            for some in pieces(rows):
                copy.write("".join(["\t".join([_field(value) for value in row]) + "\n" for row in some]))
                count += len(some)
        return count

    def _one(self, c: Connection, sql: str, *values: object) -> tuple[Any, ...]:
        row: tuple[Any, ...] | None = c.execute(self._names(sql), values).fetchone()
        assert row is not None
        return row


def _field(value: object) -> str:
    """Return a value in the text format of COPY."""
    if value is None:
        return "\\N"
    text = str(value)
    if "\\" in text:
        text = text.replace("\\", "\\\\")
    if not text.isprintable():
        text = text.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
    return text


def _as_stored(row: tuple[Any, ...], first: int, last: int | None = None) -> tuple[Any, ...]:
    """Return a row with NUL escaped in its texts; JSON text never contains NUL."""
    return tuple(stored_name(v) if type(v) is str and first <= n < (last or 99) else v for n, v in enumerate(row))


def _as_it_was(row: tuple[Any, ...], first: int) -> tuple[Any, ...]:
    return tuple(true_name(v) if type(v) is str and n >= first else v for n, v in enumerate(row))
