"""The feed of ended attempts, in a database whose commits have no fixed order.

Owns the sequence number up to which the table of attempts is complete. Invariant: the cursor never passes a sequence number
that may still be committed.

A transaction takes its sequence number before it commits, so a higher number may be visible first. Without a gap the numbers
are complete. For a missing number there are two cases: its transaction is still open and holds the movers lock, or it was
rolled back and the number never appears.
"""

from __future__ import annotations

from typing import Any

from ...model import Evaluation
from ..rows import Damaged
from .connection import Connection
from .rows import COLUMNS, FINAL, PAGE_SIZE, SIZE, evaluation, in_space, page_of
from .schema import Names
from .seed import Extent

__all__ = ["Feed"]

_STEP = 10_000  # sequence numbers checked for a gap at once

# The casts avoid an overflow: the driver sends a number in the smallest type that fits.
_UNBROKEN = """
SELECT count(*), coalesce(max(seq), 0)
FROM (SELECT seq FROM speval.attempts
    WHERE seq > %(after)s::bigint AND seq <= %(after)s::bigint + %(step)s::bigint ORDER BY seq) AS part
"""
_FIRST_GAP = """
SELECT seq FROM (SELECT seq, row_number() OVER (ORDER BY seq) AS place FROM speval.attempts
    WHERE seq > %(after)s::bigint AND seq <= %(after)s::bigint + %(step)s::bigint) AS part
WHERE seq = %(after)s::bigint + place ORDER BY seq DESC LIMIT 1
"""
# Two statements, in this order: a transaction that took a number before the first one is listed by the second one or has ended.
_TAKEN = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM speval.seqs"
_MOVERS = """
SELECT virtualtransaction FROM pg_locks
WHERE locktype = 'advisory' AND classid = 1936745846 AND objid = speval.movers()::oid AND objsubid = 2
    AND database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database()) AND granted
"""
_ENDED = page_of(
    f"SELECT a.seq AS place, e.id, {COLUMNS}, {SIZE} AS size FROM {FINAL}"
    f" WHERE a.seq > %(cursor)s AND a.seq <= %(complete)s AND a.final AND {in_space('a.evaluation')}"
)


class Feed:
    """Reads ended attempts in the order of their sequence numbers."""

    def __init__(self, names: Names, shown: str, damaged: Damaged) -> None:
        self._names = names
        self._shown = shown
        self._damaged = damaged
        self._complete = 0
        self._mark: tuple[int, set[str]] | None = None

    def read(self, c: Connection, extent: Extent, cursor: int, limit: int) -> tuple[int, list[tuple[int, Evaluation]]]:
        """Return the next cursor and the evaluations that ended after the given one."""
        found: list[tuple[int, Evaluation]] = []
        while True:
            values: dict[str, int | None] = {"cursor": cursor, "complete": self._complete, "limit": limit, "size": PAGE_SIZE}
            values |= {"first": extent.first, "last": extent.last, "space": extent.space}
            rows = c.execute(self._names(_ENDED), values).fetchall()
            for row in rows:
                cursor = row[0]
                with self._damaged.left_out():
                    found.append((row[1], evaluation(self._shown, row[2:-2])))
            if found:
                return cursor, found
            if rows:
                continue
            cursor = max(cursor, self._complete)
            if not self._advance(c):
                return cursor, found

    def _advance(self, c: Connection) -> bool:
        """Update the complete sequence number; return whether it has grown."""
        before = self._complete
        values = {"after": before, "step": _STEP}
        count, last = self._one(c, _UNBROKEN, values)
        if count and last == before + count:
            self._complete = last
        elif count:
            row = c.execute(self._names(_FIRST_GAP), values).fetchone()
            if row is not None:
                self._complete = row[0]
            else:
                self._pass_gap(c)
        else:
            (taken,) = self._one(c, _TAKEN)
            if taken > before:  # taken and not visible: not committed yet, or rolled back
                self._pass_gap(c)
        return self._complete > before

    def _pass_gap(self, c: Connection) -> None:
        (taken,) = self._one(c, _TAKEN)
        movers = {mover for (mover,) in c.execute(self._names(_MOVERS)).fetchall()}
        if self._mark is not None and not self._mark[1] & movers:
            taken, movers = self._mark[0], set()
        if not movers:
            self._complete, self._mark = max(self._complete, taken), None
        elif self._mark is None:
            self._mark = taken, movers

    def _one(self, c: Connection, sql: str, values: dict[str, Any] | None = None) -> tuple[Any, ...]:
        row: tuple[Any, ...] | None = c.execute(self._names(sql), values).fetchone()
        assert row is not None
        return row
