"""What people at a terminal look at and steer, in a SQLite file.

Owns the SQL of the command. Invariant: looking takes no lock that keeps a worker waiting and no snapshot for longer than a page
or a count needs; what is dropped leaves nothing behind that a fencing token or a sequence number of today could fit.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
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
from ...spaces.eager import name_to_key
from ..base import Control, ControlMode
from ..rows import CODES, Damaged, decoded, error_of, fits, settings_of, worker_label
from .compact import compact
from .damage import damage as damage_of
from .errors import may_use
from .file import SqliteFile
from .mount import filesystem, is_network, kind_of_place
from .rows import ATTEMPT, COLUMNS, FROM, bounded, check_attempt, check_names, evaluation
from .schema import SCHEMA
from .states import STATES, STATUS_CODE, lift
from .wal import blocked
from .watchman import missing_log

__all__ = ["SqliteControl"]

_SPAN = 20_000  # rows looked at in one transaction
_PAGE = 500  # evaluations
_CHUNK = 10_000  # rows deleted in one transaction
_WINDOW = 60.0  # seconds over which a rate is taken
_FEWEST = 10  # attempts over which a rate is taken when the window holds fewer
_BEGUN = 1.0  # seconds after which what was claimed ahead has begun or been given back

# With a condition the first is counted row by row, so that it ends in a damaged file too.
_COUNTS = """
SELECT
    (SELECT count(*) FROM evaluations WHERE id > -9e18),
    (SELECT total(last - first + 1) FROM fresh) + (SELECT count(*) FROM queue) + (SELECT total(held) FROM running),
    (SELECT total(last - first + 1) FROM claimed) + (SELECT total(NOT held) FROM running),
    (SELECT count(*) FROM attempts INDEXED BY attempts_failed WHERE final AND outcome <> 'completed')
"""
_CAUSES = """
SELECT CAST(outcome AS TEXT), count(*) FROM attempts INDEXED BY attempts_failed
WHERE final AND outcome <> 'completed' GROUP BY 1
"""
_WORKERS = """
SELECT id, host, pid, machine, start, lease, dead, started_at, last_seen FROM workers INDEXED BY workers_here
WHERE ended_at IS NULL ORDER BY started_at, id
"""
# What is claimed ahead and has waited for long is under way: else it would have been given back.
_IS_RUNNING = "(NOT held AND (NOT ahead OR updated_at < :begun))"
_HOLDINGS = f"""
SELECT worker, total(running), total(in_progress), total(held) FROM (
    SELECT worker, {_IS_RUNNING} AS running, NOT held AS in_progress, held FROM running
    UNION ALL
    SELECT worker, (NOT ahead OR updated_at < :begun) * (last - first + 1), last - first + 1, 0 FROM claimed
)
GROUP BY worker
"""
_RUNS = f"""
SELECT name, updated_at FROM (
    SELECT * FROM (
        SELECT e.name, r.updated_at, r.id FROM running AS r JOIN evaluations AS e ON e.id = r.id
        WHERE r.worker = :worker AND {_IS_RUNNING} ORDER BY r.updated_at, r.id LIMIT :limit
    )
    UNION ALL
    SELECT * FROM (
        SELECT e.name, c.updated_at, e.id FROM claimed AS c JOIN evaluations AS e ON e.id BETWEEN c.first AND c.last
        WHERE c.worker = :worker AND (NOT c.ahead OR c.updated_at < :begun) ORDER BY c.updated_at, e.id LIMIT :limit
    )
)
ORDER BY updated_at, id LIMIT :limit
"""
_FAILURES = """
SELECT e.name, a.outcome, a.error_type, a.error_message, a.attempt - a.released, a.ended_at, w.id, w.host, w.pid
FROM attempts AS a INDEXED BY attempts_failed
JOIN evaluations AS e ON e.id = a.evaluation LEFT JOIN workers AS w ON w.id = a.worker
WHERE a.final AND a.outcome <> 'completed' ORDER BY a.seq DESC LIMIT ?
"""
_MAX_SEQ = "SELECT coalesce(max(seq), 0) FROM attempts"
_LAST_UPTO = "SELECT max(seq) FROM attempts WHERE seq <= ?"  # from one to the next that is there, however far apart they are
_NEXT_ATTEMPT = "SELECT seq, ended_at FROM attempts WHERE seq >= ? ORDER BY seq LIMIT 1"
_EARLIER_ATTEMPT = "SELECT ended_at FROM attempts WHERE seq <= ? ORDER BY seq DESC LIMIT 1 OFFSET ?"

# Names with a NUL, which GLOB takes for their end, are looked at one by one.
_PAGED = f"""
SELECT {COLUMNS} {FROM}
WHERE e.id > :after AND e.id <= :upto AND (:any OR {STATUS_CODE} IN (SELECT value FROM json_each(:codes)))
    AND (:pattern IS NULL OR CAST(e.name AS TEXT) GLOB :pattern OR instr(CAST(e.name AS BLOB), x'00'))
    AND (:cause IS NULL OR a.outcome = :cause)
ORDER BY e.id
"""
_ONE = f"SELECT {COLUMNS} {FROM} WHERE e.name = ?"
_NEXT_ID = "SELECT min(id) FROM evaluations WHERE id > ?"

_STANDING = f"""
SELECT s.id, s.status, s.attempt, s.updated_at, w.id, w.host, w.pid
FROM evaluations AS e JOIN {STATES} AS s ON s.id = e.id LEFT JOIN workers AS w ON w.id = s.worker WHERE e.name = ?
"""
_ATTEMPTS = f"""
SELECT {ATTEMPT}, w.id, w.host, w.pid FROM attempts AS a LEFT JOIN workers AS w ON w.id = a.worker
WHERE a.evaluation = :id AND a.final
UNION ALL
SELECT {ATTEMPT}, w.id, w.host, w.pid FROM attempts AS a LEFT JOIN workers AS w ON w.id = a.worker
WHERE a.evaluation = :id AND NOT a.final
"""

_NAMED = f"SELECT e.id, s.status FROM evaluations AS e JOIN {STATES} AS s ON s.id = e.id WHERE e.name = ?"
_WITH_STATUS = f"""
SELECT id FROM {STATES} WHERE id > ? AND status IN (SELECT value FROM json_each(?)) ORDER BY id LIMIT ?
"""
_DROP_EVALUATIONS = "DELETE FROM evaluations WHERE id IN (SELECT value FROM json_each(?))"
_NOBODYS = """
SELECT seq FROM attempts AS a
WHERE seq > ? AND seq <= ? AND NOT EXISTS (SELECT 1 FROM evaluations AS e WHERE e.id = a.evaluation)
"""
# The last row stays, empty: it has the number after which the next one is numbered.
_DROP_ATTEMPTS = """
DELETE FROM attempts WHERE seq IN (SELECT value FROM json_each(?)) AND seq < (SELECT max(seq) FROM attempts)
"""
_EMPTY_ATTEMPTS = """
UPDATE attempts SET result = NULL, error_type = NULL, error_message = NULL, error_traceback = NULL, crc = NULL
WHERE seq IN (SELECT value FROM json_each(?))
"""

_AMISS = (
    (f"SELECT count(*) FROM {STATES} WHERE status IS NULL", "without a status"),
    (f"SELECT count(*) FROM {STATES} WHERE status = -1", "with several"),
)
_ORPHANED = """
SELECT (SELECT total(last - first + 1) FROM claimed WHERE {0}) + (SELECT count(*) FROM running WHERE {0})
""".format("NOT EXISTS (SELECT 1 FROM workers AS w WHERE w.id = worker AND w.ended_at IS NULL)")


class SqliteControl(Control):
    """What people look at and steer in one SQLite file.

    Args:
        path: The file, which must be there.
        mode: ``read`` changes nothing; ``write`` is for what changes something.
        clock: Where the time comes from.
    """

    def __init__(self, path: Path, mode: ControlMode = "read", clock: Clock | None = None) -> None:
        self._clock = clock or Clock()
        self._file = SqliteFile(path, mode)
        self.damaged = Damaged(self._file.shown)
        self._is_0_1 = self._file.is_0_1
        self._machine = this_process().machine
        if mode == "read":
            self._file.show_as_current()

    def __repr__(self) -> str:
        return f"<SqliteControl {self._file.shown!r}>"

    def close(self) -> None:
        self._file.close()

    # Looking

    def overview(self, *, failures: int = 5, runs: int = 5) -> Overview:
        self._file.look_after()
        return self._file.read(self._overview, failures, runs)

    def _overview(self, c: sqlite3.Connection, failures: int, runs: int) -> Overview:
        total, pending, in_progress, failed = (int(count) for count in c.execute(_COUNTS).fetchone())
        now = self._clock.wall()
        workers = self._workers(c, now, runs)
        shown = c.execute(_FAILURES, (failures,)).fetchall()
        return Overview(
            at=now,
            pending=pending,
            in_progress=in_progress,
            completed=total - pending - in_progress - failed,
            failed=failed,
            causes=dict(c.execute(_CAUSES).fetchall()),
            rate=_rate(c, workers, now),
            settings=settings_of(c),
            workers=workers,
            failures=tuple(
                Failure(str(name), cause, str(type_ or ""), str(message or ""), attempts, float(ended_at), _label(worker))
                for name, cause, type_, message, attempts, ended_at, *worker in shown
            ),
        )

    def _workers(self, c: sqlite3.Connection, now: float, runs: int) -> tuple[WorkerView, ...]:
        values = {"begun": now - _BEGUN, "limit": runs}
        holdings = {worker: counts for worker, *counts in c.execute(_HOLDINGS, values)}
        views = []
        for id, host, pid, machine, start, lease, dead, started_at, last_seen in c.execute(_WORKERS).fetchall():
            running, claimed, held = (int(count) for count in holdings.get(id, (0, 0, 0)))
            named = c.execute(_RUNS, values | {"worker": id}).fetchall() if running else []
            state: WorkerState = "alive"
            if dead or is_gone(Process(host, pid, machine, start), self._machine):
                state = "dead"
            elif now - last_seen > lease:
                state = "silent"
            views.append(
                WorkerView(
                    worker=worker_label(id, host, pid),
                    host=host,
                    pid=pid,
                    state=state,
                    started_at=float(started_at),
                    last_seen=last_seen,
                    ended_at=None,
                    lease=lease,
                    runs=tuple(Running(str(name), float(since)) for name, since in named),
                    running=running,
                    ahead=claimed - running,
                    held=held,
                )
            )
        return tuple(views)

    def evaluations(
        self,
        *,
        status: Status | None = None,
        cause: Cause | None = None,
        pattern: str | None = None,
        limit: int | None = None,
    ) -> Iterator[Evaluation]:
        # GLOB knows sets of characters too, which nobody is promised, and ends a pattern at a NUL.
        glob = None if pattern is None else "*" if "\0" in pattern else pattern.replace("[", "[[]")
        values = {"codes": CODES[status], "any": status is None, "cause": cause, "pattern": glob}
        is_all = status is None and cause is None and pattern is None
        after: int | None = 0
        left = limit
        try:
            while after is not None and left != 0:
                at_once = _PAGE if left is None else min(_PAGE, left)
                after, page = self._file.read(self._page, values, after, at_once, is_all)
                if pattern is not None:
                    page = [e for e in page if "\0" not in pattern + e["name"] or fits(pattern, e["name"])]
                left = None if left is None else left - len(page)
                yield from page
        finally:
            self.damaged.tell()

    def _page(
        self, c: sqlite3.Connection, values: dict[str, Any], after: int, limit: int, is_all: bool
    ) -> tuple[int | None, list[Evaluation]]:
        """Return where the next page begins, None at the end, and the evaluations of this one."""
        db = self._file.shown
        (first,) = c.execute(_NEXT_ID, (after,)).fetchone()
        upto = 2**62 if first is None else first + _SPAN
        found: list[Evaluation] = []
        seen = after
        # An open cursor would keep the transaction from ending, and the file locked while an error that was met is kept.
        with closing(c.execute(_PAGED, values | {"after": after, "upto": upto})) as cursor:
            for row in bounded(db, cursor, limit):
                seen = row[0]
                with self.damaged.left_out():
                    found.append(evaluation(db, row))
        if seen == after:
            seen = upto
        if is_all:
            check_names(c, db, self.damaged, after, seen)
        return None if first is None else seen, found

    def evaluation(self, name: str) -> Evaluation:
        def find(c: sqlite3.Connection) -> Evaluation:
            row = c.execute(_ONE, (name_to_key(name),)).fetchone()
            if row is None:
                raise UnknownNameError(self._file.shown, [name])
            return evaluation(self._file.shown, row)

        return self._file.read(find)

    def attempts(self, name: str) -> list[Attempt]:
        return self._file.read(self._attempts, name)

    def _attempts(self, c: sqlite3.Connection, name: str) -> list[Attempt]:
        row = c.execute(_STANDING, (name_to_key(name),)).fetchone()
        if row is None:
            raise UnknownNameError(self._file.shown, [name])
        id, code, latest, updated_at, *worker = row
        found = [Attempt(int(latest), _label(worker), updated_at, None, None, None, None, None)] if code == 1 else []
        for row in c.execute(_ATTEMPTS, {"id": id}).fetchall():
            check_attempt(self._file.shown, name, row[:12], row[12])
            _, _, number, _, started_at, duration, ended_at, outcome, result, type_, message, traceback, _, *worker = row
            value = None if result is None else decoded(self._file.shown, name, result)
            error = None if outcome == "completed" else error_of(outcome, type_, message, traceback)
            found.append(Attempt(int(number), _label(worker), started_at, ended_at, duration, outcome, value, error))
        return sorted(found, key=lambda attempt: attempt.number)

    # Steering

    def _set(self, key: str, value: int | None) -> None:
        def change(c: sqlite3.Connection) -> None:
            c.execute("DELETE FROM meta WHERE key = ?", (key,))
            if value is not None:
                c.execute("INSERT INTO meta VALUES (?, ?)", (key, value))

        self._file.write(change)

    def drop(self, names: Sequence[str] | None = None, *, status: Status | None = None) -> int:
        if (names is None) == (status is None):
            raise OptionError("names", repr(names), "name what to drop, or give a status, and not both")
        if status == "in_progress":
            raise OptionError("status", repr(status), "what a worker runs can't be dropped; stop the worker first")
        if names is not None:
            dropped = self._file.write(self._drop_named, list(names))
        else:
            dropped, after = 0, 0
            while True:
                count, last = self._file.write(self._drop_some, after, CODES[status])
                dropped += count
                if last is None:
                    break
                after = last
        if dropped:
            self._drop_attempts()
        return dropped

    def _drop_named(self, c: sqlite3.Connection, names: list[str]) -> int:
        # One by one: SQLite's functions for JSON end a text at a NUL, and that is another name.
        rows = {name: c.execute(_NAMED, (name_to_key(name),)).fetchone() for name in names}
        if unknown := [name for name, row in rows.items() if row is None]:
            raise UnknownNameError(self._file.shown, unknown)
        if held := [name for name, (_, code) in rows.items() if code == 1]:
            raise InProgressError(self._file.shown, held)
        return _drop(c, [id for id, _ in rows.values()])

    def _drop_some(self, c: sqlite3.Connection, after: int, codes: str) -> tuple[int, int | None]:
        """Drop a bounded number; return how many, and where to go on."""
        ids = [id for (id,) in c.execute(_WITH_STATUS, (after, codes, _CHUNK))]
        return _drop(c, ids), ids[-1] if len(ids) == _CHUNK else None

    def _drop_attempts(self) -> None:
        """Delete the attempts of what is not there any more; what an interrupted drop has left is found too."""
        upto: int | None = self._file.read(lambda c: c.execute(_MAX_SEQ).fetchone())[0]
        while upto is not None:
            upto, seqs = self._file.read(_nobodys, upto)
            if seqs:
                self._file.write(self._delete_attempts, json.dumps(seqs))

    def _delete_attempts(self, c: sqlite3.Connection, seqs: str) -> None:
        c.execute(_DROP_ATTEMPTS, (seqs,))
        c.execute(_EMPTY_ATTEMPTS, (seqs,))

    def compact(self) -> Compacted:
        return compact(self._file)

    # Looking under the bonnet

    def check(self, *, integrity: bool = True) -> Health:
        path = self._file.path
        kind = filesystem(path)
        facts: dict[str, str | int | float | bool | None] = {
            "database": str(path),
            "store": f"SQLite {sqlite3.sqlite_version}",
            "bytes": path.stat().st_size,
            "log bytes": _size(Path(f"{path}-wal")),
            "filesystem": kind,
            "writable": may_use(path, os.W_OK) and may_use(path.parent, os.W_OK | os.X_OK),
        }
        findings = []
        try:
            if self._is_0_1:
                facts["schema"] = "speval 0.1.1"
                fix = "the first call of speval() migrates it; stop old copies first"
                findings.append(Finding("it is of speval 0.1.1", fix, False))
            else:
                more, found = self._file.read(self._look_inside)
                facts |= more
                findings += found
            overview = self.overview(failures=0, runs=0)
            facts |= {"evaluations": overview.total, "workers": sum(w.state == "alive" for w in overview.workers)}
            facts |= {"paused": overview.settings.paused, "concurrency": overview.settings.concurrency}
            findings += [_lost(worker) for worker in overview.workers if worker.state in ("dead", "silent")]
            if overview.settings.paused:
                findings.append(Finding("it is paused: workers claim nothing", "`speval resume` lets them go on", False))
            if integrity:
                damage, obstacle = damage_of(path, self._file.shown, is_immutable=self._file.is_immutable)
                facts["integrity"] = "damaged" if damage else "ok" if obstacle is None else "not checked"
                if obstacle is not None:
                    problem = f"SQLite could not check the file in a process of its own ({obstacle})"
                    findings.append(Finding(problem, "run `speval doctor` with a Python that this user may execute", False))
                fix = f"`speval salvage {self._file.shown} NEW` saves what can be saved"
                findings += [Finding(f"damaged: {problem}", fix, True) for problem in damage]
                self._read_all()
                findings += self.damaged.findings(f"{fix}, `speval drop` forgets one")
        except DatabaseError as error:  # then the rest can't be known
            findings.append(Finding(error.problem, "go back to a copy of the file, or start a new one", True))
        findings += blocked(path)
        if is_network(kind):
            problem = f"it is on {kind_of_place(kind)}: commits are slow, and as safe as its locks"
            findings.append(Finding(problem, "keep it on a local disk, unless copies on several machines need it", False))
        return Health(facts, tuple(sorted(findings, key=lambda finding: not finding.is_error)))

    def _read_all(self) -> None:
        """Read every evaluation, for what is damaged of them."""
        values = {"codes": CODES[None], "any": True, "cause": None, "pattern": None}
        after: int | None = 0
        while after is not None:
            after, _ = self._file.read(self._page, values, after, _PAGE, True)

    def _look_inside(self, c: sqlite3.Connection) -> tuple[dict[str, str | int | None], list[Finding]]:
        (journal,) = c.execute("PRAGMA journal_mode").fetchone()
        meta = dict(c.execute("SELECT key, value FROM meta").fetchall())
        facts: dict[str, str | int | None] = {"journal": journal, "schema": SCHEMA, "since release": meta.get("release")}
        findings = []
        if self._file.lacks_log and (problem := missing_log(c)):
            fix = 'copy both files, or take copies with `sqlite3 NAME ".backup COPY"`; if it is no copy, nothing is missing'
            findings.append(Finding(problem, fix, False))
        stored = meta.get("journal_mode")
        if self._file.is_immutable:
            # SQLite has not looked, and says that of a file that nobody changes.
            facts["journal"] = "can't be told without write permission"
        elif stored is not None and journal not in (stored, "memory"):
            problem = f"its journal mode is {journal}, and the copies agreed on {stored}"
            findings.append(Finding(problem, "stop all copies and start again", True))
        fix = "go back to a copy of the file, or start a new one"
        for sql, what in _AMISS:
            (count,) = c.execute(sql).fetchone()
            if count:
                findings.append(Finding(f"{counted(count)} {what}", fix, True))
        (count,) = c.execute(_ORPHANED).fetchone()
        if count:
            problem = f"{counted(count)} held by no worker"
            findings.append(Finding(problem, "the next copy that is started takes them back", False))
        return facts, findings


def _drop(c: sqlite3.Connection, ids: Sequence[int]) -> int:
    lift(c, ids)
    count: int = c.execute(_DROP_EVALUATIONS, (json.dumps(ids),)).rowcount
    c.execute("DELETE FROM meta WHERE key = 'space'")  # the digest speaks of all that was there
    return count


def _nobodys(c: sqlite3.Connection, upto: int) -> tuple[int | None, list[int]]:
    """Return where to look further, None at the beginning, and the attempts in one span of rows that have no evaluation."""
    (earlier,) = c.execute(_LAST_UPTO, (upto - _CHUNK,)).fetchone()
    return earlier, [seq for (seq,) in c.execute(_NOBODYS, (upto - _CHUNK, upto))]


def _label(worker: Sequence[Any]) -> str | None:
    return None if worker[0] is None else worker_label(*worker)


def _rate(c: sqlite3.Connection, workers: Sequence[WorkerView], now: float) -> float | None:
    """Return how many attempts end per second; attempts are in the order of their ends, so a few of them tell."""
    alive = [worker.started_at for worker in workers if worker.state == "alive"]
    (newest,) = c.execute(_MAX_SEQ).fetchone()
    if not alive or not newest:
        return None
    began = min(alive)
    since = max(began, now - _WINDOW)
    count = newest + 1 - _first_after(c, since, newest)
    if count < _FEWEST:
        row = c.execute(_EARLIER_ATTEMPT, (newest, _FEWEST)).fetchone()
        since = max(began, row[0]) if row else began
        count = newest + 1 - _first_after(c, since, newest)
    return count / max(now - since, 1e-3) if count else None


def _first_after(c: sqlite3.Connection, moment: float, newest: int) -> int:
    """Return the number of the first attempt that ended after a moment."""
    low, high = 1, newest + 1
    while low < high:
        middle = (low + high) // 2
        seq, ended_at = c.execute(_NEXT_ATTEMPT, (middle,)).fetchone()
        if ended_at > moment:
            high = middle
        else:
            low = seq + 1
    return low


def _lost(worker: WorkerView) -> Finding:
    holds = counted(worker.running + worker.ahead + worker.held)
    if worker.state == "dead":
        return Finding(
            f"worker {worker.worker} is dead and holds {holds}", "the next copy that is started takes them back", False
        )
    problem = f"worker {worker.worker} shows no sign of life, by this machine's clock, and holds {holds}"
    return Finding(problem, f"any copy takes them back when it has watched it for its lease of {worker.lease:g} s", False)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
