"""What people do with an eval space of a PostgreSQL database: list, look, retry, pause, set, drop, check.

Owns the SQL of it. Invariant: looking takes no lock and no snapshot for longer than a page or a count needs; ids and sequence
numbers are never reused, so nothing that was dropped fits a fencing token of today.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import Any

from ...clock import Clock
from ...errors import InProgressError, UnknownNameError
from ...model import Attempt, Compacted, Evaluation, Finding, Overview, Status, WorkerView, counted
from ...url import PostgresUrl
from ..control import RECLAIMED, Choice, Control, ControlMode, Facts, Rows, holds, orphaned
from ..rows import decoded, error_of, label_of
from .connection import Connection, numbers, texts
from .overview import PostgresLook
from .rows import COLUMNS, PAGE_SIZE, STATES, evaluation, loading, page_of
from .schema import READY, SCHEMA, Names, opened, stored_name, true_name

__all__ = ["PostgresControl"]

_CHUNK = 10_000  # evaluations dropped in one transaction
_OLD = 600.0  # seconds after which an open transaction keeps too many dead rows

# Names with a character that is stored as two are looked at one by one.
_FILTERED = """
(%(pattern)s::text IS NULL OR e.name LIKE %(pattern)s OR strpos(e.name, chr(16)) > 0)
AND (%(cause)s::text IS NULL OR a.outcome = %(cause)s)
"""
_ONE = f"SELECT e.id, {COLUMNS} FROM {STATES} WHERE e.name = %s"
_STANDING = """
SELECT e.id, r.attempt, r.updated_at, w.id, w.host, w.pid FROM speval.evaluations AS e
LEFT JOIN speval.running AS r ON r.id = e.id AND NOT r.held LEFT JOIN speval.workers AS w ON w.id = r.worker WHERE e.name = %s
"""
_ATTEMPTS = """
SELECT a.attempt, a.started_at, a.ended_at, a.duration, a.outcome, a.result, a.error_type, a.error_message, a.error_traceback,
    w.id, w.host, w.pid
FROM speval.attempts AS a LEFT JOIN speval.workers AS w ON w.id = a.worker WHERE a.evaluation = %s ORDER BY a.attempt
"""

_ANSWER = 60.0  # seconds to wait for the answer to what can't be done twice
_UNKNOWN = "SELECT n FROM unnest(%s::text[]) AS n WHERE NOT EXISTS (SELECT FROM speval.evaluations AS e WHERE e.name = n)"
_RETRY = """
WITH ended AS (
    UPDATE speval.attempts AS a SET final = false
    WHERE a.final AND a.outcome {} 'completed' AND (%(ids)s::text[] IS NULL OR a.evaluation = ANY (ARRAY(
        SELECT e.id FROM speval.evaluations AS e WHERE e.name = ANY (%(ids)s::text[])
    )))
    RETURNING a.*
)
INSERT INTO speval.queue (id, attempt, released, forgiven, suspect, put_back, updated_at)
SELECT evaluation, attempt, released, attempt - released, suspect, evaluation, %(now)s FROM ended
"""
_RETRY_FAILED, _RETRY_COMPLETED = _RETRY.format("<>"), _RETRY.format("=")
_NEWS = "SELECT pg_notify('speval.news', '')"
_SET = "INSERT INTO speval.meta VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
_UNSET = "DELETE FROM speval.meta WHERE key = %s"
# Nothing is seeded and nothing moves meanwhile.
_FOR_VACUUM = ("statement_timeout = 0", "lock_timeout = 0", "default_transaction_read_only = off")
_STAND_STILL = """
SELECT pg_advisory_xact_lock(1936745846, 'speval.evaluations'::regclass::oid::integer),
    pg_advisory_xact_lock(1936745846, speval.movers())
"""
_NAMED = """
SELECT n.name, e.id, r.id IS NOT NULL FROM unnest(%s::text[]) AS n (name)
LEFT JOIN speval.evaluations AS e ON e.name = n.name LEFT JOIN speval.running AS r ON r.id = e.id AND NOT r.held
"""
_WITH_STATUS: dict[Status, str] = {
    "pending": "SELECT id FROM speval.queue UNION ALL SELECT id FROM speval.running WHERE held LIMIT %s",
    "completed": "SELECT evaluation FROM speval.attempts WHERE final AND outcome = 'completed' LIMIT %s",
    "failed": "SELECT evaluation FROM speval.attempts WHERE final AND outcome <> 'completed' LIMIT %s",
}
_DROP = (
    "DELETE FROM speval.queue WHERE id = ANY (%s::bigint[])",
    "DELETE FROM speval.running WHERE id = ANY (%s::bigint[])",
    "DELETE FROM speval.attempts WHERE evaluation = ANY (%s::bigint[])",
    "DELETE FROM speval.evaluations WHERE id = ANY (%s::bigint[])",
)

_FACTS = """
SELECT current_setting('server_version'),
    (SELECT sum(pg_total_relation_size(c.oid)) FROM pg_class AS c
        WHERE c.relnamespace = to_regnamespace(%(schema)s) AND c.relkind = 'r')::bigint,
    (SELECT sum(pg_stat_get_dead_tuples(c.oid)) FROM pg_class AS c
        WHERE c.relnamespace = to_regnamespace(%(schema)s) AND c.relkind = 'r')::bigint,
    current_setting('max_connections')::integer, (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
    current_setting('fsync')::boolean, current_setting('autovacuum')::boolean, current_setting('transaction_read_only')::boolean
"""
_FOR_LONG = 86_400.0  # seconds that compacting may take
_BYTES = """
SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint FROM pg_class AS c
WHERE c.relnamespace = to_regnamespace(%s) AND c.relkind = 'r'
"""
_PRUNE = """
DELETE FROM speval.workers AS w WHERE w.ended_at IS NOT NULL
    AND NOT EXISTS (SELECT FROM speval.attempts AS a WHERE a.worker = w.id)
    AND NOT EXISTS (SELECT FROM speval.running AS r WHERE r.worker = w.id)
"""
_OLDEST = """
SELECT pid, coalesce(nullif(application_name, ''), 'without a name'), extract(epoch FROM clock_timestamp() - xact_start)
FROM pg_stat_activity WHERE backend_xmin IS NOT NULL AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
ORDER BY xact_start LIMIT 1
"""
_AMISS = (
    (
        """
        SELECT count(*) FROM speval.evaluations AS e LEFT JOIN speval.queue AS q ON q.id = e.id
        LEFT JOIN speval.running AS r ON r.id = e.id LEFT JOIN speval.attempts AS a ON a.evaluation = e.id AND a.final
        WHERE q.id IS NULL AND r.id IS NULL AND a.seq IS NULL
        """,
        "without a status",
    ),
    (
        """
        SELECT count(*) FROM (
            SELECT id FROM speval.queue UNION ALL SELECT id FROM speval.running UNION ALL
            SELECT evaluation FROM speval.attempts WHERE final
        ) AS s WHERE NOT EXISTS (SELECT FROM speval.evaluations AS e WHERE e.id = s.id)
        """,
        "without a name",
    ),
    (
        """
        SELECT count(*) FROM (SELECT s.id FROM (
            SELECT id FROM speval.queue UNION ALL SELECT id FROM speval.running UNION ALL
            SELECT evaluation FROM speval.attempts WHERE final
        ) AS s GROUP BY s.id HAVING count(*) > 1) AS twice
        """,
        "with two statuses",
    ),
)
_ORPHANED = """
SELECT count(*) FROM speval.running AS r
WHERE NOT EXISTS (SELECT FROM speval.workers AS w WHERE w.id = r.worker AND w.ended_at IS NULL)
"""


class PostgresControl(Control):
    """What people do with one eval space of a PostgreSQL database.

    Args:
        url: The database, and the space in it, which must be there.
        mode: ``read`` changes nothing; ``write`` is for what changes something.
        clock: Where the time comes from.
        given_up: Other threads set it to end all waiting for answers.
    """

    _fix = "repair the server, then check again"

    def __init__(
        self, url: PostgresUrl, mode: ControlMode = "read", clock: Clock | None = None, given_up: Event | None = None
    ) -> None:
        super().__init__(url.shown, clock)
        self._url = url
        self._names_of = Names(url.schema)
        self._connection = opened(url, mode, given_up)

    def close(self) -> None:
        self._connection.close()

    def _execute(self, c: Connection, sql: str, values: Any = None) -> Any:
        return c.execute(self._names_of(sql), values)

    # Looking

    def overview(self, *, failures: int = 5, runs: int = 5) -> Overview:
        def look(c: Connection) -> Overview:
            with _snapshot(c):
                return self._overview(PostgresLook(c, self._names_of), failures, runs)

        return self._connection.run(look)

    def _page(self, choice: Choice, after: int, limit: int) -> tuple[int | None, Rows]:
        status: Status | None = "failed" if choice.cause and choice.status is None else choice.status  # nothing else has one
        sql = page_of(f"{loading(status)} AND {_FILTERED}")
        pattern = None if choice.pattern is None else _like(choice.pattern)
        values = {"cause": choice.cause, "pattern": pattern, "after": after, "limit": limit, "size": PAGE_SIZE}
        rows: Rows = deque(self._connection.run(lambda c: self._execute(c, sql, values).fetchall()))
        return rows[-1][0] if rows else None, rows

    def _evaluation(self, row: Sequence[Any]) -> Evaluation:
        return evaluation(self.shown, row[1:-2])

    def evaluation(self, name: str) -> Evaluation:
        def find(c: Connection) -> Evaluation:
            row = self._execute(c, _ONE, (stored_name(name),)).fetchone()
            if row is None:
                raise UnknownNameError(self.shown, [name])
            return evaluation(self.shown, row[1:])

        return self._connection.run(find)

    def attempts(self, name: str) -> list[Attempt]:
        def find(c: Connection) -> list[Attempt]:
            with _snapshot(c):
                row = self._execute(c, _STANDING, (stored_name(name),)).fetchone()
                if row is None:
                    raise UnknownNameError(self.shown, [name])
                id, under_way, since, *worker = row
                found = [self._attempt(name, ended) for ended in self._execute(c, _ATTEMPTS, (id,)).fetchall()]
            if under_way is not None:
                found.append(Attempt(under_way, label_of(worker), since, None, None, None, None, None))
            return found

        return self._connection.run(find)

    def _attempt(self, name: str, row: Sequence[Any]) -> Attempt:
        number, started_at, ended_at, duration, outcome, result, type_, message, traceback, *worker = row
        value = None if result is None else decoded(self.shown, name, result)
        shown = [None if text is None else true_name(text) for text in (type_, message, traceback)]
        error = None if outcome == "completed" else error_of(outcome, *shown)
        return Attempt(number, label_of(worker), started_at, ended_at, duration, outcome, value, error)

    # Steering

    def _set(self, key: str, value: int | None) -> None:
        def change(c: Connection) -> None:
            self._execute(c, READY)
            if value is None:
                self._execute(c, _UNSET, (key,))
            else:
                self._execute(c, _SET, (key, str(value)))

        self._connection.run(change)

    def _retry(self, names: list[str] | None, status: Status) -> int:
        given = None if names is None else texts(stored_name(name) for name in names)
        sql = _RETRY_COMPLETED if status == "completed" else _RETRY_FAILED

        def put_back(c: Connection) -> int:
            self._execute(c, READY)
            if given is not None:
                unknown = [true_name(name) for (name,) in self._execute(c, _UNKNOWN, (given,)).fetchall()]
                if unknown:
                    raise UnknownNameError(self.shown, unknown)
            count: int = self._execute(c, sql, {"ids": given, "now": self._clock.wall()}).rowcount
            self._execute(c, _NEWS)
            return count

        return self._connection.run_once(_ANSWER, put_back)

    def _drop_names(self, names: list[str]) -> int:
        def drop(c: Connection) -> int:
            with self._standing_still(c):
                rows = self._execute(c, _NAMED, (texts(stored_name(name) for name in names),)).fetchall()
                if unknown := [true_name(name) for name, id, _ in rows if id is None]:
                    raise UnknownNameError(self.shown, unknown)
                if held := [true_name(name) for name, _, is_running in rows if is_running]:
                    raise InProgressError(self.shown, held)
                return self._drop(c, [id for _, id, _ in rows])

        return self._connection.run(drop)

    def _drop_status(self, status: Status) -> int:
        def drop_some(c: Connection) -> int:
            with self._standing_still(c):
                return self._drop(c, [id for (id,) in self._execute(c, _WITH_STATUS[status], (_CHUNK,))])

        dropped = 0
        while count := self._connection.run(drop_some):
            dropped += count
        return dropped

    @contextmanager
    def _standing_still(self, c: Connection) -> Iterator[None]:
        """Keep others from seeding and moving meanwhile."""
        with c.block():
            self._execute(c, _STAND_STILL)
            self._execute(c, READY)
            yield

    def _drop(self, c: Connection, ids: Sequence[int]) -> int:
        count = 0
        if ids:
            for sql in _DROP:
                count = self._execute(c, sql, (numbers(ids),)).rowcount
            # Their digests and unlisted ids describe the evaluations before this change.
            self._execute(c, "UPDATE speval.spaces SET exact = false")
        return count

    def compact(self) -> Compacted:
        def pruned(c: Connection) -> tuple[int, int]:
            (before,) = self._execute(c, _BYTES, (self._url.schema,)).fetchone()
            return before, self._execute(c, _PRUNE).rowcount

        def vacuum(c: Connection) -> None:  # outside of a transaction, and without blocking workers
            for setting in _FOR_VACUUM:
                c.execute(f"SET {setting}")
            try:
                for table in ("workers", "queue", "running", "attempts", "evaluations"):
                    self._execute(c, f"VACUUM (ANALYZE) speval.{table}")
            finally:
                c.close()  # the settings are not for what comes after

        before, count = self._connection.run_once(_FOR_LONG, pruned)
        self._connection.call(_FOR_LONG, vacuum)
        (after,) = self._connection.run(lambda c: self._execute(c, _BYTES, (self._url.schema,)).fetchone())
        return Compacted(before, after, count)

    # Checking

    def _outside(self) -> tuple[Facts, list[Finding]]:
        return {"database": self.shown}, []

    def _inside(self, facts: Facts, findings: list[Finding]) -> None:
        more, found = self._connection.run(self._look_at_server)
        facts |= more
        findings += found

    def _look_at_server(self, c: Connection) -> tuple[Facts, list[Finding]]:
        row = self._execute(c, _FACTS, {"schema": self._url.schema}).fetchone()
        version, size, dead_rows, most, connections, syncs, vacuums, read_only = row
        facts: Facts = {
            "store": f"PostgreSQL {version}",
            "schema": SCHEMA,
            "tables in": self._url.schema,
            "bytes": size,
            "dead rows": dead_rows,
            "connections": f"{connections} of {most}",
            "writable": not read_only,
        }
        findings = []
        if connections > 0.8 * most:
            problem = f"{connections} of the server's {most} connections are in use, and each worker needs one"
            findings.append(Finding(problem, "raise max_connections, or connect through pgbouncer", False))
        if not syncs:
            findings.append(Finding("the server runs with fsync off", "turn it on: a power failure may destroy data", False))
        if not vacuums:
            findings.append(
                Finding("the server runs with autovacuum off", "turn it on: claims become slower and slower", False)
            )
        oldest = self._execute(c, _OLDEST).fetchone()
        if oldest is not None and oldest[2] > _OLD:
            problem = (
                f"a transaction has been open for {oldest[2]:.0f} s (pid {oldest[0]}, {oldest[1]}): dead rows are kept for it"
            )
            findings.append(Finding(problem, f"end it, with pg_terminate_backend({oldest[0]}) if need be", False))
        return facts, findings + orphaned(self._execute(c, _ORPHANED).fetchone()[0])

    def _damage(self, facts: Facts, findings: list[Finding]) -> str:
        def look(c: Connection) -> list[str]:
            with _snapshot(c):
                found = [(self._execute(c, sql).fetchone()[0], what) for sql, what in _AMISS]
            return [f"{counted(count)} {what}" for count, what in found if count]

        damage = self._connection.run(look)
        facts["integrity"] = "damaged" if damage else "ok"
        findings += [Finding(f"damaged: {problem}", "restore a backup", True) for problem in damage]
        return "`speval drop` deletes it"

    def _lost(self, worker: WorkerView) -> Finding:
        what = "is dead" if worker.state == "dead" else "has not renewed its lease, by the clock of the server,"
        return Finding(f"worker {worker.worker} {what} and holds {holds(worker)}", RECLAIMED, False)


@contextmanager
def _snapshot(c: Connection) -> Iterator[None]:
    c.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
    yield


def _like(pattern: str) -> str:
    """Return a pattern of LIKE for one in which ``*`` stands for any text and ``?`` for any one character."""
    for sign in "\\%_":
        pattern = pattern.replace(sign, f"\\{sign}")
    return stored_name(pattern.replace("*", "%").replace("?", "_"))
