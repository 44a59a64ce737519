"""Stores: where evaluations live.

Owns the contract (``base``) and its implementations, and the choice between them. Invariant: nothing above this package
knows any SQL, and a store's module is imported only when a database of its kind is used.
"""

from __future__ import annotations

from pathlib import Path
from threading import Event

from ..clock import Clock
from ..model import Durability
from ..options import Location
from ..url import PostgresUrl
from .archive import Archive
from .base import Store, StoreMode
from .control import Control, ControlMode

__all__ = ["make_archive", "make_control", "make_salvage", "make_store"]


def make_store(
    db: Location, mode: StoreMode = "create", durability: Durability = "process", clock: Clock | None = None
) -> Store:
    """Return a store for a checked database, not opened yet."""
    if isinstance(db, PostgresUrl):
        from .postgres.store import PostgresStore

        return PostgresStore(db, mode, durability, clock)
    from .sqlite.store import SqliteStore

    return SqliteStore(db, mode, durability, clock)


def make_control(
    db: Location, mode: ControlMode = "read", clock: Clock | None = None, given_up: Event | None = None
) -> Control:
    """Return what people use a checked database with, opened.

    Args:
        db: The database, which must be there.
        mode: ``read`` changes nothing; ``write`` is for what changes something.
        clock: Where the time comes from.
        given_up: Set by others to end all waiting, that for the database to open included.

    Raises:
        DatabaseError: it is not there, or can't be used.
    """
    if isinstance(db, PostgresUrl):
        from .postgres.control import PostgresControl

        return PostgresControl(db, mode, clock, given_up)
    from .sqlite.control import SqliteControl

    return SqliteControl(db, mode, clock, given_up)


def make_salvage(path: Path) -> Archive:
    """Return what a damaged file is read with, as far as it can be.

    Raises:
        DatabaseError: nothing of it can be read.
    """
    from .sqlite.salvage import SqliteSalvage

    return SqliteSalvage(path)


def make_archive(db: Location, mode: StoreMode) -> Archive:
    """Return what a checked database is read or filled as a whole with, opened.

    Raises:
        DatabaseError: it is not there and was to be read, or can't be used.
    """
    if isinstance(db, PostgresUrl):
        from .postgres.archive import PostgresArchive

        return PostgresArchive(db, mode)
    from .sqlite.archive import SqliteArchive

    return SqliteArchive(db, mode)
