"""Seeding: an eval space compared with what is stored, in SQL.

Owns the TEMP tables ``incoming``, ``differing`` and ``unlisted`` of a store's connection. Invariant: a comparison made before
the lock is taken is repeated or found unchanged under the lock, so any number of workers may seed at once; each function is
the whole work of one transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import NamedTuple

from ...codec import same
from ...errors import ArgsChangedError
from ...model import OnChanged
from ...spaces.eager import Key, Space
from ..base import Seeded
from .checksum import of_evaluation
from .states import FRESH, HOMES, STATES, Counters, add_range, lift, put_back

__all__ = [
    "CHUNK",
    "SMALL",
    "Comparison",
    "add",
    "at_once",
    "compare",
    "count_missing",
    "extend",
    "fill",
    "follow",
    "is_known",
    "load",
    "settle",
    "unload",
]

CHUNK = 10_000  # rows added in one transaction: holds the lock for some 30 ms
SMALL = 100  # rows of a space that is compared under the lock as well: holds it for some 2 ms
_EXAMPLES = 3

# name is declared without a type, here as in the schema, so that 17 and '17' stay what they are.
_INCOMING = "CREATE TEMP TABLE incoming (position INTEGER PRIMARY KEY, name NOT NULL UNIQUE, args TEXT NOT NULL)"
_DIFFERING = "CREATE TEMP TABLE differing (id INTEGER PRIMARY KEY, position INTEGER NOT NULL)"
_COUNT_MISSING = """
SELECT count(*) FROM incoming AS i
WHERE position > ? AND position <= ? AND NOT EXISTS (SELECT 1 FROM evaluations AS e WHERE e.name = i.name)
"""
_OTHER_TEXT = """
SELECT e.id, i.position, e.args, i.args FROM incoming AS i JOIN evaluations AS e ON e.name = i.name
WHERE e.args <> i.args ORDER BY i.position
"""
_MISSING = """
SELECT name, args FROM incoming AS i
WHERE position > ? AND position <= ? AND NOT EXISTS (SELECT 1 FROM evaluations AS e WHERE e.name = i.name)
ORDER BY position
"""
_ADD = "INSERT INTO evaluations (id, name, args, crc) VALUES (?, ?, ?, ?)"
_DIFFERENT = """
SELECT d.id, e.name, i.args FROM differing AS d
JOIN incoming AS i ON i.position = d.position JOIN evaluations AS e ON e.id = d.id
"""
_NEW_ARGS = "UPDATE evaluations SET args = ?, crc = ? WHERE id = ?"
_STANDING = f"""
SELECT s.id, s.attempt, s.released, s.suspect FROM differing AS d CROSS JOIN {STATES} AS s ON s.id = d.id
"""
_STRANGERS = """
INSERT INTO unlisted SELECT id FROM evaluations AS e WHERE NOT EXISTS (SELECT 1 FROM incoming AS i WHERE i.name = e.name)
"""
_LAST = "SELECT coalesce(max(id), 0) FROM evaluations WHERE id NOT IN unlisted"
_COUNT = "SELECT count(*) FROM evaluations WHERE id > -9e18"
# Where others have deleted only a part of an evaluation; its attempts keep their numbers, which are never reused.
_WITHOUT_STATE = f"""
SELECT s.id, coalesce((SELECT max(a.attempt) FROM attempts AS a WHERE a.evaluation = s.id AND NOT a.final), 0)
FROM {STATES} AS s WHERE s.status IS NULL
"""
_LAST_GIVEN = """
SELECT max(coalesce((SELECT max(seq) FROM sqlite_sequence WHERE name = 'evaluations'), 0),
    coalesce((SELECT max(id) FROM evaluations), 0))
"""
_MAX_SEQ = "SELECT coalesce(max(seq), 0) FROM attempts"


class Comparison(NamedTuple):
    """How a space differs from what is stored; those with other args are noted in the table ``differing``."""

    missing: int
    differing: int
    examples: list[tuple[str, str, str]]  # name, args as stored, args as given
    version: int  # of the stored args

    def refuse(self, db: str, on_changed: OnChanged) -> None:
        """Raise ``ArgsChangedError`` where other args are an error."""
        if self.differing and on_changed == "error":
            raise ArgsChangedError(db, self.differing, self.examples)

    def seeded(self, count: int, gone: int) -> Seeded:
        """Return what seeding so many evaluations has found."""
        return Seeded(self.missing, count - self.missing - self.differing, self.differing, gone)


def is_known(c: sqlite3.Connection, space: Space) -> tuple[int, int, bool]:
    """Return the newest attempt, the space's last id, and whether the digest of what is stored is that of the space."""
    since = follow(c)
    (last,) = c.execute(_LAST).fetchone()
    stored = c.execute("SELECT value FROM meta WHERE key = 'space'").fetchone()
    # The digest speaks of what speval has stored, the count of what others have left of it.
    return since, last, stored == (_digest(space),) and _counts(c) == (space.count, space.count)


def follow(c: sqlite3.Connection) -> int:
    """Pass over nothing that is stored, and return the newest attempt."""
    c.execute("DELETE FROM unlisted")
    (since,) = c.execute(_MAX_SEQ).fetchone()
    return int(since)


def fill(c: sqlite3.Connection, space: Space, rows: Iterator[tuple[Key, str]], filled: int, now: float) -> int:
    """Add the next rows of a space to a database that holds those before them and nothing else.

    Returns:
        The number of added rows; 0 if the database now has other rows and must be compared.
    """
    # The last id that was ever given: where all has been dropped, they do not begin with 1.
    (last,) = c.execute(_LAST_GIVEN).fetchone()
    if last != filled or _args_version(c):
        return 0
    added: int = c.executemany(_ADD, _numbered(last, islice(rows, CHUNK))).rowcount
    if added > 0:
        add_range(c, FRESH, last + 1, last + added, now)
    # Unless some of them were dropped in the meantime: the next start compares.
    if filled + added == space.count == c.execute(_COUNT).fetchone()[0]:
        c.execute("INSERT OR REPLACE INTO meta VALUES ('space', ?)", (_digest(space),))
    return added


def _numbered(last: int, rows: Iterable[tuple[Key, str]]) -> Iterator[tuple[int, Key, str, int]]:
    """Yield rows as they are stored, numbered behind the last id that was ever given."""
    return ((id, name, args, of_evaluation(id, name, args)) for id, (name, args) in enumerate(rows, last + 1))


def load(c: sqlite3.Connection, rows: Iterable[tuple[Key, str]]) -> None:
    """Put a space where SQL can compare it."""
    c.execute(_INCOMING)
    c.execute(_DIFFERING)
    c.executemany("INSERT INTO incoming (name, args) VALUES (?, ?)", rows)


def unload(c: sqlite3.Connection) -> None:
    """Forget the space."""
    c.execute("DROP TABLE IF EXISTS incoming")
    c.execute("DROP TABLE IF EXISTS differing")


def count_missing(c: sqlite3.Connection, low: int, high: int) -> int:
    """Return how many of the positions above ``low`` up to ``high`` are not stored."""
    (count,) = c.execute(_COUNT_MISSING, (low, high)).fetchone()
    return int(count)


def compare(c: sqlite3.Connection) -> Comparison:
    """Compare the whole space with what is stored."""
    (total,) = c.execute("SELECT coalesce(max(position), 0) FROM incoming").fetchone()
    c.execute("DELETE FROM differing")
    examples: list[tuple[str, str, str]] = []
    differing = 0
    # Other text need not be other args: the order of keys and spaces, as other releases write them, don't count.
    with closing(c.execute(_OTHER_TEXT)) as other:  # also after an error, or the file would stay locked
        for id, position, stored, given in other:
            if not same(stored, given):
                differing += 1
                c.execute("INSERT INTO differing VALUES (?, ?)", (id, position))
                if len(examples) < _EXAMPLES:
                    (name,) = c.execute("SELECT name FROM incoming WHERE position = ?", (position,)).fetchone()
                    examples.append((str(name), _shorten(stored), _shorten(given)))
    return Comparison(count_missing(c, 0, total), differing, examples, _args_version(c))


def add(c: sqlite3.Connection, low: int, high: int, now: float) -> int:
    """Add what is missing of these positions, and return how many."""
    (last,) = c.execute(_LAST_GIVEN).fetchone()
    missing = c.execute(_MISSING, (low, high)).fetchall()
    c.executemany(_ADD, _numbered(last, missing))
    if missing:
        add_range(c, FRESH, last + 1, last + len(missing), now)
    c.execute("DELETE FROM meta WHERE key = 'space'")
    return len(missing)


def settle(
    c: sqlite3.Connection, space: Space, comparison: Comparison, on_changed: OnChanged, now: float
) -> tuple[int, int] | None:
    """Do what is left to do under the lock, unless the comparison is stale.

    Returns:
        The number of unlisted evaluations, and the last id of the space; None if it must be compared again.
    """
    if _args_version(c) != comparison.version:
        return None
    if comparison.differing and on_changed == "rerun":
        _rerun(c, comparison.version, now)
    count, homes = _counts(c)
    if count != homes:
        put_back(c, [(id, attempt, Counters()) for id, attempt in c.execute(_WITHOUT_STATE).fetchall()], now)
    c.execute("DELETE FROM unlisted")
    gone: int = c.execute(_STRANGERS).rowcount
    (last,) = c.execute(_LAST).fetchone()
    if not gone and (not comparison.differing or on_changed == "rerun"):
        c.execute("INSERT OR REPLACE INTO meta VALUES ('space', ?)", (_digest(space),))
    return gone, last


def extend(c: sqlite3.Connection, db: str, rows: Sequence[tuple[Key, str]], on_changed: OnChanged, now: float) -> Seeded:
    """Do all of it for a few evaluations at once, where what else is stored does not matter."""
    comparison = _merged(c, db, rows, len(rows), on_changed, now)
    if comparison.differing and on_changed == "rerun":
        _rerun(c, comparison.version, now)
    unload(c)
    return comparison.seeded(len(rows), 0)


def at_once(c: sqlite3.Connection, db: str, space: Space, on_changed: OnChanged, now: float) -> tuple[Seeded, int]:
    """Compare, add and settle a small space in one transaction.

    Returns:
        What was found, and the last id of the space.
    """
    comparison = _merged(c, db, space.rows(), space.count, on_changed, now)
    settled = settle(c, space, comparison, on_changed, now)
    assert settled is not None  # no other worker writes meanwhile
    unload(c)
    gone, last = settled
    return comparison.seeded(space.count, gone), last


def _merged(
    c: sqlite3.Connection, db: str, rows: Iterable[tuple[Key, str]], count: int, on_changed: OnChanged, now: float
) -> Comparison:
    """Compare so many rows with what is stored, and add those that are missing."""
    load(c, rows)
    comparison = compare(c)
    comparison.refuse(db, on_changed)
    if comparison.missing:
        add(c, 0, count, now)
    return comparison


def _rerun(c: sqlite3.Connection, version: int, now: float) -> None:
    """Store the other args, and have those evaluated again."""
    differing = c.execute(_DIFFERENT).fetchall()
    c.executemany(_NEW_ARGS, ((args, of_evaluation(id, name, args), id) for id, name, args in differing))
    # With a new attempt number, so that a worker that still runs one with the old args is refused.
    standing = c.execute(_STANDING).fetchall()
    lift(c, [row[0] for row in standing])
    rows = ((id, number + 1, Counters(lost + 1, number - lost, suspect)) for id, number, lost, suspect in standing)
    put_back(c, rows, now)
    c.execute("INSERT OR REPLACE INTO meta VALUES ('args_version', ?)", (version + 1,))
    c.execute("DELETE FROM meta WHERE key = 'space'")


def _counts(c: sqlite3.Connection) -> tuple[int, int]:
    """Return how many evaluations there are, and how many states."""
    (count,), (homes,) = c.execute(_COUNT).fetchone(), c.execute(HOMES).fetchone()
    return count, int(homes)


def _digest(space: Space) -> str:
    return f"{space.digest} {space.count}"


def _args_version(c: sqlite3.Connection) -> int:
    """Return a number that grows whenever stored args are replaced."""
    row = c.execute("SELECT value FROM meta WHERE key = 'args_version'").fetchone()
    return 0 if row is None else int(row[0])


def _shorten(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."
