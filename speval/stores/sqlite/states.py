"""The states of evaluations in a SQLite file.

Owns the tables ``fresh``, ``claimed``, ``queue`` and ``running``, and the columns ``final``, ``released`` and ``suspect`` of
``attempts``. Invariant: an evaluation is in one of these places; each function that takes it out of one is followed, in the
same transaction, by one that puts it into another, or by its end.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from ...model import Claim

__all__ = [
    "CLAIMED",
    "FRESH",
    "HOMES",
    "JOINS",
    "NUMBERS",
    "STATES",
    "STATUS_CODE",
    "Counters",
    "Ranges",
    "add_range",
    "lift",
    "put_back",
    "put_back_all",
    "runs",
    "take_claims",
    "take_out",
]

# Evaluations (e), and what they have in the table of their state.
JOINS = """
evaluations AS e
LEFT JOIN attempts AS a INDEXED BY attempts_final ON a.evaluation = e.id AND a.final
LEFT JOIN running AS r ON r.id = e.id
LEFT JOIN queue AS q ON q.id = e.id
LEFT JOIN claimed AS c ON c.first = (SELECT max(first) FROM claimed WHERE first <= e.id) AND c.last >= e.id
LEFT JOIN fresh AS f ON f.first = (SELECT max(first) FROM fresh WHERE first <= e.id) AND f.last >= e.id
"""
# 0 pending, 1 in progress, 2 completed, 3 failed, 4 pending and held for its backoff; NULL: in no table; -1: in several.
STATUS_CODE = """
CASE (a.seq IS NOT NULL) + (r.id IS NOT NULL) + (q.id IS NOT NULL) + (c.first IS NOT NULL) + (f.first IS NOT NULL)
    WHEN 0 THEN NULL
    WHEN 1 THEN CASE
        WHEN a.seq IS NOT NULL THEN CASE a.outcome WHEN 'completed' THEN 2 ELSE 3 END
        WHEN c.first IS NOT NULL THEN 1
        WHEN r.id IS NOT NULL THEN CASE WHEN r.held THEN 4 ELSE 1 END
        ELSE 0
    END
    ELSE -1
END
"""
NUMBERS = """
coalesce(a.attempt, r.attempt, q.attempt, c.first IS NOT NULL) AS attempt,
coalesce(a.released, r.released, q.released, 0) AS released,
coalesce(r.forgiven, q.forgiven, 0) AS forgiven,
coalesce(a.ended_at, r.updated_at, q.updated_at, c.updated_at, f.updated_at) AS updated_at
"""
# Of each evaluation, in whichever table its state is.
STATES = f"""
(SELECT e.id AS id, {STATUS_CODE} AS status, {NUMBERS}, coalesce(a.suspect, r.suspect, q.suspect, 0) AS suspect,
    coalesce(r.worker, c.worker) AS worker, a.seq AS last FROM {JOINS})
"""
# How many evaluations have a state.
HOMES = """
SELECT (SELECT total(last - first + 1) FROM fresh) + (SELECT total(last - first + 1) FROM claimed)
    + (SELECT count(*) FROM queue WHERE id > -9e18) + (SELECT count(*) FROM running WHERE id > -9e18)
    + (SELECT count(*) FROM attempts INDEXED BY attempts_final WHERE final)
"""

_LISTED = "(SELECT value FROM json_each(?))"
_TAKE_RUNNING = f"DELETE FROM running WHERE id IN {_LISTED}"
_LIFT = (
    f"DELETE FROM queue WHERE id IN {_LISTED}",
    _TAKE_RUNNING,
    f"UPDATE attempts SET final = 0 WHERE final AND evaluation IN {_LISTED}",
)
_RUNNING = f"""
SELECT id, attempt, released, forgiven, suspect, worker FROM running WHERE id IN {_LISTED} AND NOT held
"""
_PUT_BACK = "INSERT INTO queue (id, attempt, released, forgiven, suspect, updated_at) VALUES (?, ?, ?, ?, ?, ?)"
_CLAIMED_BY = "SELECT first, last FROM claimed WHERE worker IS ?"
# From evaluations, so that a range which is damaged makes no more rows than there are.
_PUT_BACK_RANGE = """
INSERT INTO queue (id, attempt, released, forgiven, suspect, updated_at)
SELECT id, 1, 1, 0, 0, ? FROM evaluations WHERE id BETWEEN ? AND ?
"""
_PUT_BACK_RUNNING = """
INSERT INTO queue (id, attempt, released, forgiven, suspect, updated_at)
SELECT id, attempt, released + (NOT held), forgiven, suspect, ? FROM running WHERE worker = ?
"""


class Counters(NamedTuple):
    """What is told of an evaluation besides its attempt number."""

    released: int = 0
    forgiven: int = 0
    suspect: int = 0


class Ranges(NamedTuple):
    """The statements of a table whose rows are ranges of ids."""

    find: str  # the ranges that hold ids of a list; of each the id, the range, and its other columns
    delete: str
    shorten: str
    insert: str


_FIND = """
SELECT j.value, t.first, t.last, {columns} FROM json_each(?) AS j
JOIN {table} AS t ON t.first = (SELECT max(first) FROM {table} WHERE first <= j.value) AND t.last >= j.value
"""
FRESH = Ranges(
    _FIND.format(table="fresh", columns="updated_at"),
    "DELETE FROM fresh WHERE first = ?",
    "UPDATE fresh SET last = ? WHERE first = ?",
    "INSERT INTO fresh (first, last, updated_at) VALUES (?, ?, ?)",
)
CLAIMED = Ranges(
    _FIND.format(table="claimed", columns="worker, ahead, updated_at"),
    "DELETE FROM claimed WHERE first = ?",
    "UPDATE claimed SET last = ? WHERE first = ?",
    "INSERT INTO claimed (first, last, worker, ahead, updated_at) VALUES (?, ?, ?, ?, ?)",
)


def runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield ascending ids as ranges."""
    if ids and ids[-1] - ids[0] == len(ids) - 1:
        yield ids[0], ids[-1]
        return
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1:
            yield ids[start], ids[i - 1]
            start = i


def add_range(c: sqlite3.Connection, table: Ranges, first: int, last: int, *rest: object) -> None:
    """Put ids that are in no table into one of ranges."""
    c.execute(table.insert, (first, last, *rest))


def take_out(c: sqlite3.Connection, table: Ranges, ids: Sequence[int], holder: int | None = None) -> set[int]:
    """Take ids out of their ranges, and return those that were in one.

    Args:
        c: A connection in a transaction that writes.
        table: Which ranges.
        ids: Ascending.
        holder: Of ``claimed`` only what this worker holds.
    """
    cuts: dict[int, tuple[int, tuple[Any, ...], list[int]]] = {}  # of each range its end, its other columns, what is taken
    # First one look for the beginnings of runs, which are in one range as a rule; then one for every id that this did not find.
    ends = dict(runs(ids))
    for id, first, last, *rest in c.execute(table.find, (json.dumps(list(ends)),)).fetchall():
        stop = min(ends[id], last) + 1
        cuts.setdefault(first, (last, tuple(rest), []))[2].extend(range(id, stop))
    seen = set(chain.from_iterable(out for _, _, out in cuts.values()))
    single = [id for id in ids if id not in seen] if len(seen) < len(ids) else []
    for id, first, last, *rest in c.execute(table.find, (json.dumps(single),)).fetchall() if single else ():
        cuts.setdefault(first, (last, tuple(rest), []))[2].append(id)
    taken: set[int] = set()
    for first, (last, rest, out) in cuts.items():
        if holder is not None and rest[0] != holder:
            continue
        taken.update(out)
        _cut(c, table, first, last, rest, sorted(out))
    return taken


def _cut(c: sqlite3.Connection, table: Ranges, first: int, last: int, rest: tuple[Any, ...], out: Sequence[int]) -> None:
    """Take ascending ids out of the range that holds them."""
    pieces = []
    begin = first
    for id in out:
        if begin < id:
            pieces.append((begin, id - 1))
        begin = id + 1
    if begin <= last:
        pieces.append((begin, last))
    if pieces and pieces[0][0] == first:
        c.execute(table.shorten, (pieces.pop(0)[1], first))
    else:
        c.execute(table.delete, (first,))
    for piece in pieces:
        c.execute(table.insert, (*piece, *rest))


def take_claims(c: sqlite3.Connection, claims: Collection[Claim]) -> dict[tuple[int, int, int], Counters]:
    """Take evaluations out of progress whose tokens are good.

    Returns:
        The tokens that were good, as (id, attempt, worker). A stale one changes nothing.
    """
    taken: dict[tuple[int, int, int], Counters] = {}
    none = Counters()
    firsts: dict[int, list[int]] = {}
    for claim in claims:
        if claim.attempt == 1:
            firsts.setdefault(claim.worker, []).append(claim.id)
    for worker, ids in firsts.items():
        for id in take_out(c, CLAIMED, sorted(set(ids)), worker):
            taken[id, 1, worker] = none
    if len(taken) < len(claims):
        tokens = {(claim.id, claim.attempt, claim.worker) for claim in claims}
        listed = json.dumps([id for id, _, _ in tokens - taken.keys()])
        ended = []
        for id, attempt, released, forgiven, suspect, worker in c.execute(_RUNNING, (listed,)).fetchall():
            if (id, attempt, worker) in tokens:
                taken[id, attempt, worker] = Counters(released, forgiven, suspect)
                ended.append(id)
        c.execute(_TAKE_RUNNING, (json.dumps(ended),))
    return taken


def lift(c: sqlite3.Connection, ids: Iterable[int]) -> None:
    """Take evaluations out of whatever state they are in; attempts that ended are no longer final."""
    ascending = sorted(set(ids))
    listed = json.dumps(ascending)
    for statement in _LIFT:
        c.execute(statement, (listed,))
    take_out(c, FRESH, ascending)
    take_out(c, CLAIMED, ascending)


def put_back(c: sqlite3.Connection, rows: Iterable[tuple[int, int, Counters]], now: float) -> None:
    """Make evaluations pending that are in no state: of each the id, the number of its latest attempt, and its counters."""
    c.executemany(_PUT_BACK, ((id, attempt, *counters, now) for id, attempt, counters in rows))


def put_back_all(c: sqlite3.Connection, worker: int, now: float) -> None:
    """Make pending again what a worker holds, charging nothing."""
    for first, last in c.execute(_CLAIMED_BY, (worker,)).fetchall():
        c.execute(_PUT_BACK_RANGE, (now, first, last))
    c.execute("DELETE FROM claimed WHERE worker = ?", (worker,))
    c.execute(_PUT_BACK_RUNNING, (now, worker))
    c.execute("DELETE FROM running WHERE worker = ?", (worker,))
