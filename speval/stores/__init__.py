"""Stores: databases of evaluations.

Owns the contract (``base``), its implementations, and the choice between them. Invariant: no module above this package
contains SQL, and the module of a store is imported only when a database of its kind is used.
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
    """Return a store for a validated database; it is not open yet."""
    if isinstance(db, PostgresUrl):
        from .postgres.store import PostgresStore

        return PostgresStore(db, mode, durability, clock)
    from .sqlite.store import SqliteStore

    return SqliteStore(db, mode, durability, clock)


def make_control(
    db: Location, mode: ControlMode = "read", clock: Clock | None = None, given_up: Event | None = None
) -> Control:
    """Open a validated database for users: to read it, or to change it.

    Args:
        db: The database; it must exist.
        mode: ``read`` changes nothing.
        clock: The source of the time.
        given_up: Other threads set it to end all waiting, also the waiting to open the database.

    Raises:
        DatabaseError: the database does not exist, or can't be used.
    """
    if isinstance(db, PostgresUrl):
        from .postgres.control import PostgresControl

        return PostgresControl(db, mode, clock, given_up)
    from .sqlite.control import SqliteControl

    return SqliteControl(db, mode, clock, given_up)


def make_salvage(path: Path) -> Archive:
    """Return an archive that reads the intact rows of a damaged file.

    Raises:
        DatabaseError: the file can't be read at all.
    """
    from .sqlite.salvage import SqliteSalvage

    return SqliteSalvage(path)


def make_archive(db: Location, mode: StoreMode) -> Archive:
    """Open a validated database, to read or to fill it as a whole.

    Raises:
        DatabaseError: the database can't be used, or does not exist and the mode is not "create".
    """
    if isinstance(db, PostgresUrl):
        from .postgres.archive import PostgresArchive

        return PostgresArchive(db, mode)
    from .sqlite.archive import SqliteArchive

    return SqliteArchive(db, mode)
