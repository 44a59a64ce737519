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
from ...errors import InProgressError, SpevalError, UnknownNameError
from ...model import Attempt, Compacted, Evaluation, Finding, Overview, Status, WorkerView, counted
from ...spaces.eager import name_to_key
from ..control import RECLAIMED, Choice, Control, ControlMode, Facts, Rows, holds, orphaned
from ..rows import CODES, decoded, error_of, label_of
from .compact import compact
from .damage import damage as damage_of
from .errors import NONSENSE, may_use, nonsense
from .file import SqliteFile
from .mount import filesystem, is_network, kind_of_place
from .overview import MAX_SEQ, SqliteLook
from .rows import ATTEMPT, COLUMNS, FROM, bounded, check_attempt, check_names, evaluation
from .schema import SCHEMA
from .states import STATES, STATUS_CODE, Counters, lift, put_back
from .wal import blocked
from .watchman import missing_log

__all__ = ["SqliteControl"]

_SPAN = 20_000  # rows looked at in one transaction
_CHUNK = 10_000  # rows deleted in one transaction

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

_RETRY_NAMED = f"""
SELECT s.id, s.attempt, s.released, s.suspect, s.status FROM evaluations AS e JOIN {STATES} AS s ON s.id = e.id WHERE e.name = ?
"""
_RETRY = """
INSERT INTO queue (id, attempt, released, forgiven, suspect, updated_at)
SELECT evaluation, attempt, released, attempt - released, suspect, ? FROM attempts
WHERE final AND (outcome = 'completed') = ?
"""
_NOT_FINAL = "UPDATE attempts SET final = 0 WHERE final AND (outcome = 'completed') = ?"
_NAMED = f"SELECT e.id, s.status FROM evaluations AS e JOIN {STATES} AS s ON s.id = e.id WHERE e.name = ?"
_WITH_STATUS = f"""
SELECT id FROM {STATES} WHERE id > ? AND status IN (SELECT value FROM json_each(?)) ORDER BY id LIMIT ?
"""
_DROP_EVALUATIONS = "DELETE FROM evaluations WHERE id IN (SELECT value FROM json_each(?))"
_LAST_UPTO = "SELECT max(seq) FROM attempts WHERE seq <= ?"  # from one to the next that is there, however far apart they are
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
    """What people do with one SQLite file.

    Args:
        path: The file, which must be there.
        mode: ``read`` changes nothing; ``write`` is for what changes something.
        clock: Where the time comes from.
        given_up: Other threads set it to end all waiting for locks.
    """

    _fix = "use a backup of the file, or start a new one"

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
        return self._file.read(lambda c: self._overview(SqliteLook(c), failures, runs))

    def _page(self, choice: Choice, after: int, limit: int) -> tuple[int | None, Rows]:
        return self._file.read(self._rows, choice, after, limit)

    def _rows(self, c: sqlite3.Connection, choice: Choice, after: int, limit: int) -> tuple[int | None, Rows]:
        status, cause, pattern = choice
        # GLOB also has character sets, which patterns do not have, and it ends a pattern at a NUL.
        glob = None if pattern is None else "*" if "\0" in pattern else pattern.replace("[", "[[]")
        (first,) = c.execute(_NEXT_ID, (after,)).fetchone()
        upto = 2**62 if first is None else first + _SPAN
        values = {"codes": CODES[status], "any": status is None, "cause": cause, "pattern": glob, "after": after, "upto": upto}
        # An open cursor would keep the transaction from ending, and the file locked while an error that was met is kept.
        with closing(c.execute(_PAGED, values)) as cursor:
            rows: Rows = deque(bounded(self.shown, cursor, limit))
        seen = rows[-1][0] if rows else upto
        if choice.is_all:
            check_names(c, self.shown, self.damaged, after, seen)
        return None if first is None else seen, rows

    def _evaluation(self, row: Sequence[Any]) -> Evaluation:
        try:
            return evaluation(self.shown, row)
        except SpevalError:
            raise
        except NONSENSE as error:
            raise nonsense(self.shown, error) from error

    def evaluation(self, name: str) -> Evaluation:
        def find(c: sqlite3.Connection) -> Evaluation:
            row = c.execute(_ONE, (name_to_key(name),)).fetchone()
            if row is None:
                raise UnknownNameError(self.shown, [name])
            return evaluation(self.shown, row)

        return self._file.read(find)

    def attempts(self, name: str) -> list[Attempt]:
        return self._file.read(self._attempts, name)

    def _attempts(self, c: sqlite3.Connection, name: str) -> list[Attempt]:
        row = c.execute(_STANDING, (name_to_key(name),)).fetchone()
        if row is None:
            raise UnknownNameError(self.shown, [name])
        id, code, latest, updated_at, *worker = row
        found = [Attempt(int(latest), label_of(worker), updated_at, None, None, None, None, None)] if code == 1 else []
        for row in c.execute(_ATTEMPTS, {"id": id}).fetchall():
            check_attempt(self.shown, name, row[:12], row[12])
            _, _, number, _, started_at, duration, ended_at, outcome, result, type_, message, traceback, _, *worker = row
            value = None if result is None else decoded(self.shown, name, result)
            error = None if outcome == "completed" else error_of(outcome, type_, message, traceback)
            found.append(Attempt(int(number), label_of(worker), started_at, ended_at, duration, outcome, value, error))
        return sorted(found, key=lambda attempt: attempt.number)

    # Steering

    def _set(self, key: str, value: int | None) -> None:
        def change(c: sqlite3.Connection) -> None:
            c.execute("DELETE FROM meta WHERE key = ?", (key,))
            if value is not None:
                c.execute("INSERT INTO meta VALUES (?, ?)", (key, value))

        self._file.write(change)

    def _retry(self, names: list[str] | None, status: Status) -> int:
        return self._file.write(self._put_back, names, status == "completed")

    def _put_back(self, c: sqlite3.Connection, names: list[str] | None, is_completed: bool) -> int:
        now = self._clock.wall()
        if names is None:
            count: int = c.execute(_RETRY, (now, is_completed)).rowcount
            c.execute(_NOT_FINAL, (is_completed,))
            return count
        # One by one: SQLite's functions for JSON end a text at a NUL, and that is another name.
        found = {name: c.execute(_RETRY_NAMED, (name_to_key(name),)).fetchone() for name in names}
        if unknown := [name for name, row in found.items() if row is None]:
            raise UnknownNameError(self.shown, unknown)
        ended = {row[0]: row for row in found.values() if row[4] == (2 if is_completed else 3)}
        lift(c, ended)
        rows = ((id, number, Counters(lost, number - lost, suspect)) for id, number, lost, suspect, _ in ended.values())
        put_back(c, rows, now)
        return len(ended)

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
        """Delete attempts without an evaluation, also those that an interrupted drop has left."""
        upto: int | None = self._file.read(lambda c: c.execute(MAX_SEQ).fetchone())[0]
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
            problem = f"it is on {kind_of_place(kind)}: commits are slow, and only as safe as its locks"
            findings.append(Finding(problem, "use a local disk, unless copies on several machines need it", False))
        return facts, findings

    def _inside(self, facts: Facts, findings: list[Finding]) -> None:
        if not self._is_0_1:
            more, found = self._file.read(self._look_inside)
            facts |= more
            findings += found
            return
        facts["schema"] = "speval 0.1.1"
        fix = "the first call of speval() migrates it; stop copies of the old release first"
        findings.append(Finding("it was written by speval 0.1.1", fix, False))

    def _look_inside(self, c: sqlite3.Connection) -> tuple[Facts, list[Finding]]:
        (journal,) = c.execute("PRAGMA journal_mode").fetchone()
        meta = dict(c.execute("SELECT key, value FROM meta").fetchall())
        facts: Facts = {"journal": journal, "schema": SCHEMA, "since release": meta.get("release")}
        findings = []
        if self._file.lacks_log and (problem := missing_log(c)):
            fix = 'copy both files, or take copies with `sqlite3 NAME ".backup COPY"`; otherwise nothing is missing'
            findings.append(Finding(problem, fix, False))
        stored = meta.get("journal_mode")
        if self._file.is_immutable:
            # SQLite opened the file as immutable and did not read its journal mode.
            facts["journal"] = "unknown without write permission"
        elif stored is not None and journal not in (stored, "memory"):
            problem = f"its journal mode is {journal}, but the copies agreed on {stored}"
            findings.append(Finding(problem, "stop all copies and start again", True))
        for sql, what in _AMISS:
            (count,) = c.execute(sql).fetchone()
            if count:
                findings.append(Finding(f"{counted(count)} {what}", self._fix, True))
        return facts, findings + orphaned(c.execute(_ORPHANED).fetchone()[0])

    def _damage(self, facts: Facts, findings: list[Finding]) -> str:
        damage, obstacle = damage_of(self._file.path, self.shown, is_immutable=self._file.is_immutable)
        facts["integrity"] = "damaged" if damage else "ok" if obstacle is None else "not checked"
        if obstacle is not None:
            problem = f"SQLite could not check the file in a separate process ({obstacle})"
            findings.append(Finding(problem, "run `speval doctor` with a Python that this user may execute", False))
        fix = f"`speval salvage {self.shown} NEW` copies all intact data"
        findings += [Finding(f"damaged: {problem}", fix, True) for problem in damage]
        return f"{fix}, `speval drop` deletes one"

    def _lost(self, worker: WorkerView) -> Finding:
        if worker.state == "dead":
            return Finding(f"worker {worker.worker} is dead and holds {holds(worker)}", RECLAIMED, False)
        problem = f"worker {worker.worker} has not renewed its lease, by the clock of this machine, and holds {holds(worker)}"
        fix = f"a copy reclaims them when it has watched the worker for its lease of {worker.lease:g} s"
        return Finding(problem, fix, False)


def _drop(c: sqlite3.Connection, ids: Sequence[int]) -> int:
    lift(c, ids)
    count: int = c.execute(_DROP_EVALUATIONS, (json.dumps(ids),)).rowcount
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
