"""What people do with a SQLite file: list, look, retry, pause, set, drop, check.

Owns the SQL of it. Invariant: looking takes no lock that keeps a worker waiting and no snapshot for longer than a page or a
count needs; ids and sequence numbers are never reused, so nothing that was dropped fits a fencing token of today.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

from ...clock import Clock
from ...errors import InProgressError, UnknownNameError
from ...model import Attempt, Cause, Compacted, Evaluation, Finding, Overview, Running, Settings, Status, WorkerView, counted
from ...spaces.eager import name_to_key
from ..control import Choice, Control, ControlMode, Facts, Rows, holds, orphaned
from ..overview import Holding, Look, StatusCounts, WorkerRow
from ..rows import CODES, decoded, error_of, label_of, settings_of
from .compact import compact
from .damage import damage as damage_of
from .errors import may_use, understood
from .file import SqliteFile
from .mount import filesystem, is_network, kind_of_place
from .rows import ATTEMPT, COLUMNS, FROM, bounded, check_attempt, check_states, evaluation
from .schema import SCHEMA
from .wal import blocked
from .watchman import missing_log

__all__ = ["SqliteControl"]

_SPAN = 20_000  # rows looked at in one transaction
_CHUNK = 10_000  # rows deleted in one transaction

# With a condition the first is counted row by row, so that it ends in a damaged file too.
# Ten times as quick as grouping by status: nearly all of a large database is completed, and in no index.
_COUNTS = """
SELECT
    (SELECT count(*) FROM states WHERE id > -9e18),
    (SELECT count(*) FROM states INDEXED BY states_pending WHERE status = 0)
        + (SELECT total(status = 4) FROM states INDEXED BY states_held WHERE status IN (1, 4)),
    (SELECT total(status = 1) FROM states INDEXED BY states_held WHERE status IN (1, 4)),
    (SELECT count(*) FROM states INDEXED BY states_failed WHERE status = 3)
"""
_CAUSES = """
SELECT CAST(a.outcome AS TEXT), count(*) FROM states AS s INDEXED BY states_failed JOIN attempts AS a ON a.seq = s.last
WHERE s.status = 3 GROUP BY 1
"""
_WORKERS = """
SELECT id, host, pid, machine, start, lease, dead, started_at, last_seen FROM workers INDEXED BY workers_here
WHERE ended_at IS NULL ORDER BY started_at, id
"""
# What is claimed ahead and has waited for long is under way: else it would have been given back.
_IS_RUNNING = "(status = 1 AND (ahead <> 1 OR updated_at < :begun))"
_HOLDINGS = f"""
SELECT worker, total({_IS_RUNNING}), total(status = 1), total(status = 4) FROM states INDEXED BY states_held
WHERE status IN (1, 4) GROUP BY worker
"""
_RUNS = f"""
SELECT e.name, s.updated_at FROM states AS s INDEXED BY states_held JOIN evaluations AS e ON e.id = s.id
WHERE status IN (1, 4) AND s.worker = :worker AND {_IS_RUNNING} ORDER BY s.updated_at, s.id LIMIT :limit
"""
_FAILURES = """
SELECT e.name, a.outcome, a.error_type, a.error_message, s.attempt - s.released, a.ended_at, w.id, w.host, w.pid
FROM states AS s INDEXED BY states_failed
JOIN evaluations AS e ON e.id = s.id JOIN attempts AS a ON a.seq = s.last LEFT JOIN workers AS w ON w.id = a.worker
WHERE s.status = 3 ORDER BY s.last DESC LIMIT ?
"""
_MAX_SEQ = "SELECT coalesce(max(seq), 0) FROM attempts"
_LAST_UPTO = "SELECT max(seq) FROM attempts WHERE seq <= ?"  # from one to the next that is there, however far apart they are
_NEXT_ATTEMPT = "SELECT seq, ended_at FROM attempts WHERE seq >= ? ORDER BY seq LIMIT 1"
_EARLIER_ATTEMPT = "SELECT ended_at FROM attempts WHERE seq <= ? ORDER BY seq DESC LIMIT 1 OFFSET ?"

# Names with a NUL, which GLOB takes for their end, are looked at one by one.
_PAGED = f"""
SELECT {COLUMNS} {FROM}
WHERE s.id > :after AND s.id <= :upto AND (:any OR s.status IN (SELECT value FROM json_each(:codes)))
    AND (:pattern IS NULL OR CAST(e.name AS TEXT) GLOB :pattern OR instr(CAST(e.name AS BLOB), x'00'))
    AND (:cause IS NULL OR (s.status = 3 AND a.outcome = :cause))
ORDER BY s.id
"""
_ONE = f"SELECT {COLUMNS} {FROM} WHERE e.name = ?"
_NEXT_ID = "SELECT min(id) FROM states WHERE id > ?"

_STANDING = """
SELECT s.id, s.status, s.attempt, s.attempt - s.released, s.last, s.updated_at, w.id, w.host, w.pid
FROM evaluations AS e JOIN states AS s ON s.id = e.id LEFT JOIN workers AS w ON w.id = s.worker WHERE e.name = ?
"""
# There is no index by evaluation, which would cost every worker; from the last one backwards, they are soon found.
_ATTEMPTS = f"""
SELECT {ATTEMPT}, w.id, w.host, w.pid
FROM attempts AS a LEFT JOIN workers AS w ON w.id = a.worker
WHERE a.seq > :after AND a.seq <= :upto AND a.evaluation = :id ORDER BY a.seq DESC
"""

_ID = "SELECT id FROM evaluations WHERE name = ?"
_RETRY = """
UPDATE states SET status = 0, worker = NULL, forgiven = attempt - released, updated_at = ?
WHERE status IN (SELECT value FROM json_each(?))
"""
_RETRY_SOME = _RETRY + " AND id IN (SELECT value FROM json_each(?))"
_NAMED = "SELECT e.id, s.status FROM evaluations AS e LEFT JOIN states AS s ON s.id = e.id WHERE e.name = ?"
_WITH_STATUS = "SELECT id FROM states WHERE id > ? AND status IN (SELECT value FROM json_each(?)) ORDER BY id LIMIT ?"
_DROP_STATES = "DELETE FROM states WHERE id IN (SELECT value FROM json_each(?)) AND status <> 1"
_DROP_EVALUATIONS = """
DELETE FROM evaluations
WHERE id IN (SELECT value FROM json_each(?)) AND NOT EXISTS (SELECT 1 FROM states AS s WHERE s.id = evaluations.id)
"""
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

_STATELESS = "SELECT count(*) FROM evaluations AS e WHERE NOT EXISTS (SELECT 1 FROM states AS s WHERE s.id = e.id)"
_NAMELESS = "SELECT count(*) FROM states AS s WHERE NOT EXISTS (SELECT 1 FROM evaluations AS e WHERE e.id = s.id)"
_ANSWERLESS = """
SELECT count(*) FROM states AS s
WHERE s.status IN (2, 3) AND NOT EXISTS (SELECT 1 FROM attempts AS a WHERE a.seq = s.last AND a.evaluation = s.id)
"""
_AMISS = ((_STATELESS, "without a status"), (_NAMELESS, "without a name"), (_ANSWERLESS, "without their attempt"))
_ORPHANED = """
SELECT count(*) FROM states AS s INDEXED BY states_held
WHERE status IN (1, 4) AND NOT EXISTS (SELECT 1 FROM workers AS w WHERE w.id = s.worker AND w.ended_at IS NULL)
"""


class SqliteControl(Control):
    """What people do with one SQLite file.

    Args:
        path: The file, which must be there.
        mode: ``read`` changes nothing; ``write`` is for what changes something.
        clock: Where the time comes from.
        given_up: Set by others to end all waiting for locks.
    """

    _way_out = "go back to a copy of the file, or start a new one"

    def __init__(
        self, path: Path, mode: ControlMode = "read", clock: Clock | None = None, given_up: Event | None = None
    ) -> None:
        self._file = SqliteFile(path, mode, given_up=given_up)
        super().__init__(self._file.shown, clock)
        self._is_0_1 = self._file.is_0_1
        if mode == "read":
            self._file.show_as_current()

    def close(self) -> None:
        self._file.close()

    # Looking

    def overview(self, *, failures: int = 5, runs: int = 5) -> Overview:
        self._file.look_after()
        return self._file.read(lambda c: self._overview(_Look(c), failures, runs))

    def _page(self, choice: Choice, after: int, limit: int) -> tuple[int | None, Rows]:
        return self._file.read(self._rows, choice, after, limit)

    def _rows(self, c: sqlite3.Connection, choice: Choice, after: int, limit: int) -> tuple[int | None, Rows]:
        status, cause, pattern = choice
        # GLOB knows sets of characters too, which nobody is promised, and ends a pattern at a NUL.
        glob = None if pattern is None else "*" if "\0" in pattern else pattern.replace("[", "[[]")
        (first,) = c.execute(_NEXT_ID, (after,)).fetchone()
        upto = 2**62 if first is None else first + _SPAN
        values = {"codes": CODES[status], "any": status is None, "cause": cause, "pattern": glob, "after": after, "upto": upto}
        # An open cursor would keep the transaction from ending, and the file locked while an error that was met is kept.
        with closing(c.execute(_PAGED, values)) as cursor:
            rows: Rows = deque(bounded(self.shown, cursor, limit))
        seen = rows[-1][0] if rows else upto
        if choice.is_all:
            check_states(c, self.shown, self.damaged, after, seen)
        return None if first is None else seen, rows

    def _evaluation(self, row: Sequence[Any]) -> Evaluation:
        with understood(self.shown):
            return evaluation(self.shown, row)

    def evaluation(self, name: str) -> Evaluation:
        def find(c: sqlite3.Connection) -> Evaluation:
            row = c.execute(_ONE, (name_to_key(name),)).fetchone()
            if row is None:
                raise UnknownNameError(self.shown, [name])
            return evaluation(self.shown, row)

        return self._file.read(find)

    def attempts(self, name: str) -> list[Attempt]:
        id, count, upto, found = self._file.read(self._standing, name)
        while len(found) < count and upto is not None:
            upto, more = self._file.read(self._attempts, id, name, upto)
            found += more
        return sorted(found, key=lambda attempt: attempt.number)

    def _standing(self, c: sqlite3.Connection, name: str) -> tuple[int, int, int | None, list[Attempt]]:
        """Return an evaluation's id, how many attempts it has had, where to look for them first, and the one under way."""
        row = c.execute(_STANDING, (name_to_key(name),)).fetchone()
        if row is None:
            raise UnknownNameError(self.shown, [name])
        id, code, latest, count, last, updated_at, *worker = row
        under_way = [Attempt(int(latest), label_of(worker), updated_at, None, None, None, None, None)] if code == 1 else []
        return id, int(count), None if last is None else int(last), under_way

    def _attempts(self, c: sqlite3.Connection, id: int, name: str, upto: int) -> tuple[int | None, list[Attempt]]:
        """Return where to look further, None at the beginning, and the attempts found in one span of rows."""
        after = upto - _SPAN
        (earlier,) = c.execute(_LAST_UPTO, (after,)).fetchone()
        found = []
        for row in c.execute(_ATTEMPTS, {"id": id, "after": after, "upto": upto}).fetchall():
            check_attempt(self.shown, name, row[:12], row[12])
            _, _, number, _, started_at, duration, ended_at, outcome, result, type_, message, traceback, _, *worker = row
            value = None if result is None else decoded(self.shown, name, result)
            error = None if outcome == "completed" else error_of(outcome, type_, message, traceback)
            found.append(Attempt(int(number), label_of(worker), started_at, ended_at, duration, outcome, value, error))
        return earlier, found

    # Steering

    def _set(self, key: str, value: int | None) -> None:
        def change(c: sqlite3.Connection) -> None:
            c.execute("DELETE FROM meta WHERE key = ?", (key,))
            if value is not None:
                c.execute("INSERT INTO meta VALUES (?, ?)", (key, value))

        self._file.write(change)

    def _retry(self, names: list[str] | None, status: Status) -> int:
        def put_back(c: sqlite3.Connection) -> int:
            now = self._clock.wall()
            if names is None:
                return c.execute(_RETRY, (now, CODES[status])).rowcount
            # One by one: SQLite's functions for JSON end a text at a NUL, and that is another name.
            ids = {name: c.execute(_ID, (name_to_key(name),)).fetchone() for name in names}
            if unknown := [name for name, row in ids.items() if row is None]:
                raise UnknownNameError(self.shown, unknown)
            return c.execute(_RETRY_SOME, (now, CODES[status], json.dumps([id for (id,) in ids.values()]))).rowcount

        return self._file.write(put_back)

    def _drop_names(self, names: list[str]) -> int:
        dropped = self._file.write(self._drop_named, names)
        if dropped:
            self._drop_attempts()
        return dropped

    def _drop_status(self, status: Status) -> int:
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
            raise UnknownNameError(self.shown, unknown)
        if held := [name for name, (_, code) in rows.items() if code == 1]:
            raise InProgressError(self.shown, held)
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

    # Checking

    def _outside(self) -> tuple[Facts, list[Finding]]:
        path = self._file.path
        kind = filesystem(path)
        facts: Facts = {
            "database": str(path),
            "store": f"SQLite {sqlite3.sqlite_version}",
            "bytes": path.stat().st_size,
            "log bytes": _size(Path(f"{path}-wal")),
            "filesystem": kind,
            "writable": may_use(path, os.W_OK) and may_use(path.parent, os.W_OK | os.X_OK),
        }
        findings = list(blocked(path))
        if is_network(kind):
            problem = f"it is on {kind_of_place(kind)}: commits are slow, and as safe as its locks"
            findings.append(Finding(problem, "keep it on a local disk, unless copies on several machines need it", False))
        return facts, findings

    def _inside(self, facts: Facts, findings: list[Finding]) -> None:
        if not self._is_0_1:
            more, found = self._file.read(self._look_inside)
            facts |= more
            findings += found
            return
        facts["schema"] = "speval 0.1.1"
        fix = "the first call of speval() migrates it; stop old copies first"
        findings.append(Finding("it is of speval 0.1.1", fix, False))

    def _look_inside(self, c: sqlite3.Connection) -> tuple[Facts, list[Finding]]:
        (journal,) = c.execute("PRAGMA journal_mode").fetchone()
        meta = dict(c.execute("SELECT key, value FROM meta").fetchall())
        facts: Facts = {"journal": journal, "schema": SCHEMA, "since release": meta.get("release")}
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
        for sql, what in _AMISS:
            (count,) = c.execute(sql).fetchone()
            if count:
                findings.append(Finding(f"{counted(count)} {what}", self._way_out, True))
        return facts, findings + orphaned(c.execute(_ORPHANED).fetchone()[0])

    def _damage(self, facts: Facts, findings: list[Finding]) -> str:
        damage, obstacle = damage_of(self._file.path, self.shown, is_immutable=self._file.is_immutable)
        facts["integrity"] = "damaged" if damage else "ok" if obstacle is None else "not checked"
        if obstacle is not None:
            problem = f"SQLite could not check the file in a process of its own ({obstacle})"
            findings.append(Finding(problem, "run `speval doctor` with a Python that this user may execute", False))
        fix = f"`speval salvage {self.shown} NEW` saves what can be saved"
        findings += [Finding(f"damaged: {problem}", fix, True) for problem in damage]
        return f"{fix}, `speval drop` forgets one"

    def _lost(self, worker: WorkerView) -> Finding:
        if worker.state == "dead":
            fix = "the next copy that is started takes them back"
            return Finding(f"worker {worker.worker} is dead and holds {holds(worker)}", fix, False)
        problem = f"worker {worker.worker} shows no sign of life, by this machine's clock, and holds {holds(worker)}"
        fix = f"any copy takes them back when it has watched it for its lease of {worker.lease:g} s"
        return Finding(problem, fix, False)


class _Look(Look):
    """A look at a SQLite file, in an open transaction."""

    def __init__(self, c: sqlite3.Connection) -> None:
        self._c = c

    def counts(self) -> StatusCounts:
        total, pending, in_progress, failed = (int(count) for count in self._c.execute(_COUNTS).fetchone())
        return StatusCounts(pending, in_progress, failed, total)

    def causes(self) -> dict[Cause, int]:
        return dict(self._c.execute(_CAUSES).fetchall())

    def settings(self) -> Settings:
        return settings_of(self._c)

    def workers(self, now: float) -> list[WorkerRow]:
        return [WorkerRow._make((*row, now - row[8] > row[5])) for row in self._c.execute(_WORKERS).fetchall()]

    def holdings(self, begun: float) -> dict[int, Holding]:
        rows = self._c.execute(_HOLDINGS, {"begun": begun}).fetchall()
        return {worker: Holding(*(int(count) for count in counts)) for worker, *counts in rows}

    def runs(self, worker: int, begun: float, limit: int) -> list[Running]:
        rows = self._c.execute(_RUNS, {"worker": worker, "begun": begun, "limit": limit}).fetchall()
        return [Running(str(name), float(since)) for name, since in rows]

    def failures(self, limit: int) -> list[Sequence[Any]]:
        return list(self._c.execute(_FAILURES, (limit,)).fetchall())

    def newest(self) -> int:
        return int(self._c.execute(_MAX_SEQ).fetchone()[0])

    def next_end(self, seq: int) -> tuple[int, float]:
        found: tuple[int, float] = self._c.execute(_NEXT_ATTEMPT, (seq,)).fetchone()
        return found

    def end_before(self, seq: int, count: int) -> float | None:
        row = self._c.execute(_EARLIER_ATTEMPT, (seq, count)).fetchone()
        return None if row is None else row[0]


def _drop(c: sqlite3.Connection, ids: Sequence[int]) -> int:
    listed = json.dumps(ids)
    c.execute(_DROP_STATES, (listed,))
    count: int = c.execute(_DROP_EVALUATIONS, (listed,)).rowcount
    c.execute("DELETE FROM meta WHERE key = 'space'")  # the digest speaks of all that was there
    return count


def _nobodys(c: sqlite3.Connection, upto: int) -> tuple[int | None, list[int]]:
    """Return where to look further, None at the beginning, and the attempts in one span of rows that have no evaluation."""
    (earlier,) = c.execute(_LAST_UPTO, (upto - _CHUNK,)).fetchone()
    return earlier, [seq for (seq,) in c.execute(_NOBODYS, (upto - _CHUNK, upto))]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
