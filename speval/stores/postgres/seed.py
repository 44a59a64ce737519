"""Seeding: compares an eval space with a PostgreSQL database and adds what is new.

Owns the temporary table ``incoming``, which exists for one transaction. Invariant: one worker seeds at a time, from the
comparison to the commit, and claiming and recording do not wait for it. Only replacing stored args blocks all writers.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from ...codec import same
from ...errors import ArgsChangedError
from ...model import OnChanged
from ...spaces.eager import Key, Space
from ..base import Seeded
from .connection import Connection, numbers, texts
from .schema import READY, Names, stored_name, true_name

__all__ = ["Extent", "Seeding"]

_EXAMPLES = 3
_AT_ONCE = 1000  # rows sent in one piece

_LOCK = "SELECT pg_advisory_xact_lock(1936745846, 'speval.evaluations'::regclass::oid::integer)"
_BLOCK_WRITERS = "SELECT pg_advisory_xact_lock(1936745846, speval.movers())"
_KNOWN = """
SELECT id, first, last, gaps, (SELECT count(*) FROM speval.evaluations) FROM speval.spaces WHERE digest = %s AND exact
"""
_SINCE = "SELECT coalesce(max(seq), 0) FROM speval.attempts"
_INCOMING = """
CREATE TEMPORARY TABLE incoming (position bigint NOT NULL, name text COLLATE "C" NOT NULL, args text NOT NULL) ON COMMIT DROP
"""
_OTHER_TEXT = """
SELECT e.id, i.name, e.args, i.args FROM pg_temp.incoming AS i JOIN speval.evaluations AS e ON e.name = i.name
WHERE e.args <> i.args ORDER BY i.position
"""
_COUNT_MISSING = """
SELECT count(*) FROM pg_temp.incoming AS i WHERE NOT EXISTS (SELECT FROM speval.evaluations AS e WHERE e.name = i.name)
"""
_NEXT_ID = "SELECT last_value FROM speval.ids"
_ADD = """
INSERT INTO speval.evaluations (id, name, args)
SELECT %s + row_number() OVER (ORDER BY i.position), i.name, i.args FROM pg_temp.incoming AS i
WHERE NOT EXISTS (SELECT FROM speval.evaluations AS e WHERE e.name = i.name) ORDER BY i.position
"""
_ADD_FEW = """
INSERT INTO speval.evaluations (id, name, args)
SELECT %s + i.position, i.name, i.args FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS i (name, args, position)
"""
_ENQUEUE = "INSERT INTO speval.queue (id, updated_at) SELECT id, %s FROM speval.evaluations WHERE id > %s ORDER BY id"
_IDS_GIVEN = "SELECT setval('speval.ids', %s)"
_FIND = "SELECT e.name, e.id, e.args FROM speval.evaluations AS e WHERE e.name = ANY (%s::text[])"
_NEW_ARGS = """
UPDATE speval.evaluations AS e SET args = i.args FROM pg_temp.incoming AS i WHERE i.name = e.name AND e.id = ANY (%s::bigint[])
"""
_NEW_ARGS_FEW = """
UPDATE speval.evaluations AS e SET args = i.args FROM unnest(%s::text[], %s::text[]) AS i (name, args) WHERE i.name = e.name
"""
# The new attempt number makes the token of an attempt with the old args stale.
_RERUN_HELD = """
WITH held AS (
    DELETE FROM speval.running AS r WHERE r.id = ANY (%(ids)s::bigint[]) RETURNING r.id, r.attempt, r.released, r.suspect
), ended AS (
    UPDATE speval.attempts AS a SET final = false WHERE a.evaluation = ANY (%(ids)s::bigint[]) AND a.final
    RETURNING a.evaluation, a.attempt, a.released, a.suspect
)
INSERT INTO speval.queue (id, attempt, released, forgiven, suspect, put_back, updated_at)
SELECT t.id, t.attempt + 1, t.released + 1, t.attempt - t.released, t.suspect, t.id, %(now)s
FROM (SELECT * FROM held UNION ALL SELECT * FROM ended) AS t
"""
_RERUN_WAITING = """
UPDATE speval.queue AS q
SET forgiven = attempt - released, attempt = attempt + 1, released = released + 1, put_back = id, updated_at = %s
WHERE q.id = ANY (%s::bigint[])
"""
_EXTENT = """
SELECT coalesce(min(e.id), 1), coalesce(max(e.id), 0), count(*) FROM pg_temp.incoming AS i
JOIN speval.evaluations AS e ON e.name = i.name
"""
_REMEMBER = """
INSERT INTO speval.spaces (digest, first, last, gaps, exact) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (digest) DO UPDATE SET first = excluded.first, last = excluded.last, gaps = excluded.gaps, exact = excluded.exact
RETURNING id
"""
_FORGET_UNLISTED = "DELETE FROM speval.unlisted WHERE space = %s"
_UNLISTED = """
INSERT INTO speval.unlisted (space, id) SELECT %s, e.id FROM speval.evaluations AS e
WHERE e.id BETWEEN %s AND %s AND NOT EXISTS (SELECT FROM pg_temp.incoming AS i WHERE i.name = e.name)
"""
_COUNT_BETWEEN = "SELECT count(*), count(*) FILTER (WHERE id BETWEEN %s AND %s) FROM speval.evaluations"
_NEWS = "SELECT pg_notify('speval.news', '')"


class Extent(NamedTuple):
    """The ids of a space: from first to last; if ``space`` is not None, without the ids in ``unlisted`` for this space."""

    first: int = 0
    last: int = 2**62
    space: int | None = None
    since: int = 0  # the highest attempts.seq at seeding


class Seeding:
    """The statements of seeding, for one schema."""

    def __init__(self, names: Names, shown: str) -> None:
        self._names = names
        self._shown = shown

    def follow(self, c: Connection) -> Extent:
        """Return the extent of a lazy space: everything that is stored, now and later."""
        (since,) = self._one(c, _SINCE)
        return Extent(since=since)

    def seed(self, c: Connection, space: Space, on_changed: OnChanged, now: float) -> tuple[Seeded, Extent]:
        """Compare and add a whole space, in one transaction."""
        known = self._known(c, space)
        if known is not None:
            return known
        with c.block():
            self._one(c, _LOCK)
            self._one(c, READY)
            known = self._known(c, space)
            if known is not None:
                return known  # another worker has seeded it in the meantime
            (since,) = self._one(c, _SINCE)
            c.execute(_INCOMING)
            self._load(c, space.rows())
            c.execute("ANALYZE pg_temp.incoming")
            ids, examples = self._compare(c)
            if ids and on_changed == "error":
                raise ArgsChangedError(self._shown, len(ids), examples)
            missing = self._add(c, now)
            is_exact = not ids or on_changed == "rerun"
            if ids and on_changed == "rerun":
                self._rerun(c, ids, now)
                self._execute(c, _NEW_ARGS, numbers(ids))
            first, last, _ = self._one(c, _EXTENT)
            total, between = self._one(c, _COUNT_BETWEEN, first, last)
            gaps = between > space.count
            (number,) = self._one(c, _REMEMBER, _digest(space), first, last, gaps, is_exact)
            self._execute(c, _FORGET_UNLISTED, number)
            if gaps:
                self._execute(c, _UNLISTED, number, first, last)
            seeded = Seeded(missing, space.count - missing - len(ids), len(ids), total - space.count)
            return seeded, Extent(first, last, number if gaps else None, since)

    def extend(self, c: Connection, rows: Sequence[tuple[Key, str]], on_changed: OnChanged, now: float) -> Seeded:
        """Compare and add a few evaluations, in one transaction."""
        given = {stored_name(str(name)): args for name, args in rows}
        with c.block():
            self._one(c, _LOCK)
            self._one(c, READY)
            found = self._execute(c, _FIND, texts(given)).fetchall()
            changed = [(id, name, args) for name, id, args in found if not same(args, given[name])]
            if changed and on_changed == "error":
                examples = [_example(name, args, given[name]) for _, name, args in changed[:_EXAMPLES]]
                raise ArgsChangedError(self._shown, len(changed), examples)
            known = {name for name, _, _ in found}
            new = {name: args for name, args in given.items() if name not in known}
            if new:
                (newest,) = self._one(c, _NEXT_ID)
                self._execute(c, _ADD_FEW, newest, texts(new), texts(new.values()))
                self._enqueue(c, newest, len(new), now)
            if changed and on_changed == "rerun":
                self._rerun(c, [id for id, _, _ in changed], now)
                names = [name for _, name, _ in changed]
                self._execute(c, _NEW_ARGS_FEW, texts(names), texts(given[name] for name in names))
        return Seeded(len(new), len(given) - len(new) - len(changed), len(changed), 0)

    def _known(self, c: Connection, space: Space) -> tuple[Seeded, Extent] | None:
        """Find the space by its digest among those compared before, which avoids a comparison of all rows."""
        row = self._execute(c, _KNOWN, _digest(space)).fetchone()
        if row is None:
            return None
        number, first, last, gaps, stored = row
        if stored < space.count:
            return None  # some of its evaluations were deleted
        (since,) = self._one(c, _SINCE)
        return Seeded(0, space.count, 0, stored - space.count), Extent(first, last, number if gaps else None, since)

    def _load(self, c: Connection, rows: Iterable[tuple[Key, str]]) -> None:
        numbered = enumerate(rows, 1)
        with c.cursor() as cursor, cursor.copy("COPY pg_temp.incoming FROM STDIN") as copy:
            while lines := [_line(n, name, args) for n, (name, args) in islice(numbered, _AT_ONCE)]:
                copy.write("".join(lines))

    def _compare(self, c: Connection) -> tuple[array[int], list[tuple[str, str, str]]]:
        """Return the ids of evaluations with different args, and a few examples."""
        ids = array("q")
        examples: list[tuple[str, str, str]] = []
        for id, name, stored, given in self._pages(c, _OTHER_TEXT):
            # Different text can be the same args: other releases may order keys or write white space differently.
            if not same(stored, given):
                ids.append(id)
                if len(examples) < _EXAMPLES:
                    examples.append(_example(name, stored, given))
        return ids, examples

    def _pages(self, c: Connection, sql: str) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a query through a server-side cursor, so that they need not fit in memory."""
        with c.cursor(name="speval") as cursor:
            cursor.itersize = _AT_ONCE
            cursor.execute(self._names(sql))
            yield from cursor

    def _add(self, c: Connection, now: float) -> int:
        (missing,) = self._one(c, _COUNT_MISSING)
        if missing:
            (newest,) = self._one(c, _NEXT_ID)
            self._execute(c, _ADD, newest)
            self._enqueue(c, newest, missing, now)
        return int(missing)

    def _enqueue(self, c: Connection, newest: int, count: int, now: float) -> None:
        self._execute(c, _ENQUEUE, now, newest)
        self._one(c, _IDS_GIVEN, newest + count)
        self._one(c, _NEWS)

    def _rerun(self, c: Connection, ids: Sequence[int], now: float) -> None:
        # Block all writers: both updates would miss an evaluation that moves between two tables meanwhile.
        self._one(c, _BLOCK_WRITERS)
        self._execute(c, _RERUN_WAITING, now, numbers(ids))
        c.execute(self._names(_RERUN_HELD), {"ids": numbers(ids), "now": now})
        self._execute(c, "UPDATE speval.spaces SET exact = false")
        self._one(c, _NEWS)

    def _execute(self, c: Connection, sql: str, *values: object) -> Any:
        return c.execute(self._names(sql), values)

    def _one(self, c: Connection, sql: str, *values: object) -> tuple[Any, ...]:
        row: tuple[Any, ...] = self._execute(c, sql, *values).fetchone()
        return row


def _line(position: int, name: Key, args: str) -> str:
    """Return a row in the text format of COPY."""
    if "\\" in args:
        args = args.replace("\\", "\\\\")
    if type(name) is str:
        name = stored_name(name).replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
    return f"{position}\t{name}\t{args}\n"


def _digest(space: Space) -> str:
    return f"{space.digest} {space.count}"


def _example(name: str, stored: str, given: str) -> tuple[str, str, str]:
    return true_name(name), _shorten(stored), _shorten(given)


def _shorten(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."
