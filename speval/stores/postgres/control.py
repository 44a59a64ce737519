"""What people at a terminal look at and steer, in a PostgreSQL database.

Owns the SQL of the command. Invariant: looking takes no lock and no snapshot for longer than a page or a count needs; what is
dropped leaves nothing behind that a fencing token or a sequence number of today could fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...clock import Clock
from ...errors import DatabaseError, InProgressError, OptionError, UnknownNameError
from ...host import Process, is_gone, this_process
from ...model import (
    Attempt,
    Cause,
    Compacted,
    Evaluation,
    Failure,
    Finding,
    Health,
    Overview,
    Running,
    Status,
    WorkerState,
    WorkerView,
    counted,
)
from ...url import PostgresUrl
from ..base import Control, ControlMode
from ..rows import Damaged, decoded, error_of, fits, worker_label
from .connection import Connection, PostgresConnection, numbers, texts
from .rows import COLUMNS, PAGE_SIZE, STATES, evaluation, loading, page_of, settings_of
from .schema import READY, SCHEMA, Names, prepare, stored_name, true_name

__all__ = ["PostgresControl"]

_PAGE = 500  # evaluations
_CHUNK = 10_000  # evaluations dropped in one transaction
_WINDOW = 60.0  # seconds over which a rate is taken
_FEWEST = 10  # attempts over which a rate is taken when the window holds fewer
_BEGUN = 1.0  # seconds after which what was claimed ahead has begun or been given back
_OLD = 600.0  # seconds after which an open transaction keeps too many dead rows

_COUNTS = """
SELECT (SELECT count(*) FROM speval.queue), count(*) FILTER (WHERE r.held), count(*) FILTER (WHERE NOT r.held),
    (SELECT count(*) FROM speval.evaluations)
FROM speval.running AS r
"""
_CAUSES = """
SELECT a.outcome, count(*) FROM speval.attempts AS a WHERE a.final AND a.outcome <> 'completed' GROUP BY a.outcome
"""
_WORKERS = """
SELECT id, host, pid, machine, start, lease, dead, started_at, last_seen, expires_at < speval.clock() FROM speval.workers
WHERE ended_at IS NULL ORDER BY started_at, id
"""
# What is claimed ahead and has waited for long is under way: else it would have been given back.
_IS_RUNNING = "NOT r.held AND (NOT r.ahead OR r.updated_at < %(begun)s)"
_HOLDINGS = f"""
SELECT r.worker, count(*) FILTER (WHERE {_IS_RUNNING}), count(*) FILTER (WHERE NOT r.held), count(*) FILTER (WHERE r.held)
FROM speval.running AS r GROUP BY r.worker
"""
_RUNS = f"""
SELECT e.name, r.updated_at FROM speval.running AS r JOIN speval.evaluations AS e ON e.id = r.id
WHERE r.worker = %(worker)s AND {_IS_RUNNING} ORDER BY r.updated_at, r.id LIMIT %(limit)s
"""
_FAILURES = """
SELECT e.name, a.outcome, a.error_type, a.error_message, a.attempt - a.released, a.ended_at, w.id, w.host, w.pid
FROM speval.attempts AS a JOIN speval.evaluations AS e ON e.id = a.evaluation
LEFT JOIN speval.workers AS w ON w.id = a.worker
WHERE a.final AND a.outcome <> 'completed' ORDER BY a.seq DESC LIMIT %s
"""
_MAX_SEQ = "SELECT coalesce(max(seq), 0) FROM speval.attempts"
_NEXT_ATTEMPT = "SELECT seq, ended_at FROM speval.attempts WHERE seq >= %s ORDER BY seq LIMIT 1"
_EARLIER_ATTEMPT = "SELECT ended_at FROM speval.attempts WHERE seq <= %s ORDER BY seq DESC LIMIT 1 OFFSET %s"
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
    """What people look at and steer in one eval space of a PostgreSQL database.

    Args:
        url: The database, and the space in it, which must be there.
        mode: ``read`` changes nothing; ``write`` is for what changes something.
        clock: Where the time comes from.
    """

    def __init__(self, url: PostgresUrl, mode: ControlMode = "read", clock: Clock | None = None) -> None:
        self._url = url
        self._shown = url.shown
        self.damaged = Damaged(url.shown)
        self._clock = clock or Clock()
        self._machine = this_process().machine
        self._names = Names(url.schema)
        self._connection = PostgresConnection(url, writes=mode != "read")
        try:
            self._connection.open()
            self._connection.run(prepare, url, mode)
        except BaseException:
            self._connection.close()
            raise

    def __repr__(self) -> str:
        return f"<PostgresControl {self._shown!r}>"

    def close(self) -> None:
        self._connection.close()

    def _execute(self, c: Connection, sql: str, values: Any = None) -> Any:
        return c.execute(self._names(sql), values)

    @contextmanager
    def _snapshot(self, c: Connection) -> Iterator[None]:
        c.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        yield

    # Looking

    def overview(self, *, failures: int = 5, runs: int = 5) -> Overview:
        return self._connection.run(self._overview, failures, runs)

    def _overview(self, c: Connection, failures: int, runs: int) -> Overview:
        with self._snapshot(c):
            queued, held, in_progress, total = self._execute(c, _COUNTS).fetchone()
            causes: dict[Cause, int] = dict(self._execute(c, _CAUSES).fetchall())
            failed = sum(causes.values())
            now = self._clock.wall()
            workers = self._workers(c, now, runs)
            shown = self._execute(c, _FAILURES, (failures,)).fetchall()
            return Overview(
                at=now,
                pending=queued + held,
                in_progress=in_progress,
                completed=total - queued - held - in_progress - failed,
                failed=failed,
                causes=causes,
                rate=self._rate(c, workers, now),
                settings=settings_of(c, self._names),
                workers=workers,
                failures=tuple(
                    Failure(
                        true_name(name),
                        cause,
                        true_name(type_ or ""),
                        true_name(message or ""),
                        attempts,
                        ended_at,
                        _label(worker),
                    )
                    for name, cause, type_, message, attempts, ended_at, *worker in shown
                ),
            )

    def _workers(self, c: Connection, now: float, runs: int) -> tuple[WorkerView, ...]:
        values = {"begun": now - _BEGUN, "limit": runs}
        holdings = {worker: counts for worker, *counts in self._execute(c, _HOLDINGS, values)}
        views = []
        for id, host, pid, machine, start, lease, dead, started_at, last_seen, expired in self._execute(c, _WORKERS).fetchall():
            running, claimed, held = holdings.get(id, (0, 0, 0))
            named = self._execute(c, _RUNS, values | {"worker": id}).fetchall() if running else []
            state: WorkerState = "alive"
            if dead or is_gone(Process(host, pid, machine, start), self._machine):
                state = "dead"
            elif expired:
                state = "silent"
            views.append(
                WorkerView(
                    worker=worker_label(id, host, pid),
                    host=host,
                    pid=pid,
                    state=state,
                    started_at=started_at,
                    last_seen=last_seen,
                    ended_at=None,
                    lease=lease,
                    runs=tuple(Running(true_name(name), since) for name, since in named),
                    running=running,
                    ahead=claimed - running,
                    held=held,
                )
            )
        return tuple(views)

    def _rate(self, c: Connection, workers: Sequence[WorkerView], now: float) -> float | None:
        """Return how many attempts end per second; attempts are nearly in the order of their ends, so a few of them tell."""
        alive = [worker.started_at for worker in workers if worker.state == "alive"]
        (newest,) = self._execute(c, _MAX_SEQ).fetchone()
        if not alive or not newest:
            return None
        began = min(alive)
        since = max(began, now - _WINDOW)
        count = newest + 1 - self._first_after(c, since, newest)
        if count < _FEWEST:
            row = self._execute(c, _EARLIER_ATTEMPT, (newest, _FEWEST)).fetchone()
            since = max(began, row[0]) if row else began
            count = newest + 1 - self._first_after(c, since, newest)
        return count / max(now - since, 1e-3) if count else None

    def _first_after(self, c: Connection, moment: float, newest: int) -> int:
        """Return the number of the first attempt that ended after a moment."""
        low, high = 1, newest + 1
        while low < high:
            middle = (low + high) // 2
            seq, ended_at = self._execute(c, _NEXT_ATTEMPT, (middle,)).fetchone()
            if ended_at > moment:
                high = middle
            else:
                low = seq + 1
        return low

    def evaluations(
        self,
        *,
        status: Status | None = None,
        cause: Cause | None = None,
        pattern: str | None = None,
        limit: int | None = None,
    ) -> Iterator[Evaluation]:
        if cause is not None and status is None:
            status = "failed"  # nothing else has one
        like = None if pattern is None else _like(pattern)
        values = {"cause": cause, "pattern": like}
        after: int | None = 0
        left = limit
        try:
            while after is not None and left != 0:
                at_once = _PAGE if left is None else min(_PAGE, left)
                after, page = self._connection.run(self._page, status, values, after, at_once)
                if pattern is not None:
                    page = [e for e in page if stored_name(e["name"]) == e["name"] or fits(pattern, e["name"])]
                left = None if left is None else left - len(page)
                yield from page
        finally:
            self.damaged.tell()

    def _page(
        self, c: Connection, status: Status | None, values: dict[str, str | None], after: int, limit: int
    ) -> tuple[int | None, list[Evaluation]]:
        """Return where the next page begins, None at the end, and the evaluations of this one."""
        sql = page_of(f"{loading(status)} AND {_FILTERED}")
        found: list[Evaluation] = []
        rows = self._execute(c, sql, values | {"after": after, "limit": limit, "size": PAGE_SIZE}).fetchall()
        for row in rows:
            with self.damaged.left_out():
                found.append(evaluation(self._shown, row[1:-2]))
        return rows[-1][0] if rows else None, found

    def evaluation(self, name: str) -> Evaluation:
        def find(c: Connection) -> Evaluation:
            row = self._execute(c, _ONE, (stored_name(name),)).fetchone()
            if row is None:
                raise UnknownNameError(self._shown, [name])
            return evaluation(self._shown, row[1:])

        return self._connection.run(find)

    def attempts(self, name: str) -> list[Attempt]:
        def find(c: Connection) -> list[Attempt]:
            with self._snapshot(c):
                row = self._execute(c, _STANDING, (stored_name(name),)).fetchone()
                if row is None:
                    raise UnknownNameError(self._shown, [name])
                id, under_way, since, *worker = row
                found = [self._attempt(name, ended) for ended in self._execute(c, _ATTEMPTS, (id,)).fetchall()]
            if under_way is not None:
                found.append(Attempt(under_way, _label(worker), since, None, None, None, None, None))
            return found

        return self._connection.run(find)

    def _attempt(self, name: str, row: Sequence[Any]) -> Attempt:
        number, started_at, ended_at, duration, outcome, result, type_, message, traceback, *worker = row
        value = None if result is None else decoded(self._shown, name, result)
        shown = [None if text is None else true_name(text) for text in (type_, message, traceback)]
        error = None if outcome == "completed" else error_of(outcome, *shown)
        return Attempt(number, _label(worker), started_at, ended_at, duration, outcome, value, error)

    # Steering

    def _set(self, key: str, value: int | None) -> None:
        def change(c: Connection) -> None:
            self._execute(c, READY)
            if value is None:
                self._execute(c, _UNSET, (key,))
            else:
                self._execute(c, _SET, (key, str(value)))

        self._connection.run(change)

    def drop(self, names: Sequence[str] | None = None, *, status: Status | None = None) -> int:
        if (names is None) == (status is None):
            raise OptionError("names", repr(names), "name what to drop, or give a status, and not both")
        if status == "in_progress":
            raise OptionError("status", repr(status), "what a worker runs can't be dropped; stop the worker first")
        if names is not None:
            return self._connection.run(self._drop_named, [stored_name(name) for name in names])
        assert status is not None
        dropped = 0
        while count := self._connection.run(self._drop_some, status):
            dropped += count
        return dropped

    def _drop_named(self, c: Connection, names: list[str]) -> int:
        with c.block():
            self._execute(c, _STAND_STILL)
            self._execute(c, READY)
            rows = self._execute(c, _NAMED, (texts(names),)).fetchall()
            if unknown := [true_name(name) for name, id, _ in rows if id is None]:
                raise UnknownNameError(self._shown, unknown)
            if held := [true_name(name) for name, _, is_running in rows if is_running]:
                raise InProgressError(self._shown, held)
            return self._drop(c, [id for _, id, _ in rows])

    def _drop_some(self, c: Connection, status: Status) -> int:
        """Drop a bounded number, and return how many."""
        with c.block():
            self._execute(c, _STAND_STILL)
            self._execute(c, READY)
            return self._drop(c, [id for (id,) in self._execute(c, _WITH_STATUS[status], (_CHUNK,))])

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

        def vacuum(c: Connection) -> None:  # which is no part of a transaction, and lets others work
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

    # Looking under the bonnet

    def check(self, *, integrity: bool = True) -> Health:
        facts: dict[str, str | int | float | bool | None] = {"database": self._shown}
        findings: list[Finding] = []
        try:
            more, found = self._connection.run(self._look_at_server)
            facts |= more
            findings += found
            overview = self.overview(failures=0, runs=0)
            facts |= {"evaluations": overview.total, "workers": sum(w.state == "alive" for w in overview.workers)}
            facts |= {"paused": overview.settings.paused, "concurrency": overview.settings.concurrency}
            findings += [_lost(worker) for worker in overview.workers if worker.state in ("dead", "silent")]
            if overview.settings.paused:
                findings.append(Finding("it is paused: workers claim nothing", "`speval resume` lets them go on", False))
            if integrity:
                damage = self._connection.run(self._damage)
                facts["integrity"] = "damaged" if damage else "ok"
                findings += [Finding(f"damaged: {problem}", "go back to a backup", True) for problem in damage]
                after: int | None = 0
                while after is not None:
                    after, _ = self._connection.run(self._page, None, {"cause": None, "pattern": None}, after, _PAGE)
                findings += self.damaged.findings("`speval drop` forgets it")
        except DatabaseError as error:  # then the rest can't be known
            findings.append(Finding(error.problem, "see to the server, then look again", True))
        return Health(facts, tuple(sorted(findings, key=lambda finding: not finding.is_error)))

    def _look_at_server(self, c: Connection) -> tuple[dict[str, str | int | bool | None], list[Finding]]:
        row = self._execute(c, _FACTS, {"schema": self._url.schema}).fetchone()
        version, size, dead_rows, most, connections, syncs, vacuums, read_only = row
        facts: dict[str, str | int | bool | None] = {
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
            findings.append(Finding("the server runs with fsync off", "a power cut may destroy its data; turn it on", False))
        if not vacuums:
            findings.append(Finding("the server runs with autovacuum off", "claims get slower and slower; turn it on", False))
        oldest = self._execute(c, _OLDEST).fetchone()
        if oldest is not None and oldest[2] > _OLD:
            problem = (
                f"a transaction has been open for {oldest[2]:.0f} s (pid {oldest[0]}, {oldest[1]}): dead rows are kept for it"
            )
            findings.append(Finding(problem, f"end it, with pg_terminate_backend({oldest[0]}) if need be", False))
        (count,) = self._execute(c, _ORPHANED).fetchone()
        if count:
            problem = f"{counted(count)} held by no worker"
            findings.append(Finding(problem, "the next copy that is started takes them back", False))
        return facts, findings

    def _damage(self, c: Connection) -> list[str]:
        """Return what does not fit together."""
        with self._snapshot(c):
            found = [(self._execute(c, sql).fetchone()[0], what) for sql, what in _AMISS]
        return [f"{counted(count)} {what}" for count, what in found if count]


def _like(pattern: str) -> str:
    """Return a pattern of LIKE for one in which ``*`` stands for any text and ``?`` for any one character."""
    for sign in "\\%_":
        pattern = pattern.replace(sign, f"\\{sign}")
    return stored_name(pattern.replace("*", "%").replace("?", "_"))


def _label(worker: Sequence[Any]) -> str | None:
    return None if worker[0] is None else worker_label(*worker)


def _lost(worker: WorkerView) -> Finding:
    holds = counted(worker.running + worker.ahead + worker.held)
    what = "is dead" if worker.state == "dead" else "shows no sign of life, by the server's clock,"
    return Finding(f"worker {worker.worker} {what} and holds {holds}", "the next copy that is started takes them back", False)
