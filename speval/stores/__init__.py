"""Stores: databases of evaluations.

Owns the contract (``base``), its implementations, and the choice between them. Invariant: no module above this package
contains SQL, and the module of a store is imported only when a database of its kind is used.
"""

from __future__ import annotations

from pathlib import Path

from ..clock import Clock
from ..model import Durability
from ..options import Database
from ..url import PostgresUrl
from .archive import Archive
from .base import Control, ControlMode, Store, StoreMode

__all__ = ["make_archive", "make_control", "make_salvage", "make_store"]


def make_store(
    db: Database, mode: StoreMode = "create", durability: Durability = "process", clock: Clock | None = None
) -> Store:
    """Return a store for a validated database; it is not open yet."""
    if isinstance(db, PostgresUrl):
        from .postgres.store import PostgresStore

        return PostgresStore(db, mode, durability, clock)
    from .sqlite.store import SqliteStore

    return SqliteStore(db, mode, durability, clock)


def make_control(db: Database, mode: ControlMode = "read", clock: Clock | None = None) -> Control:
    """Open a validated database for users: to read it, or to change it.

    Raises:
        DatabaseError: the database does not exist, or can't be used.
    """
    if isinstance(db, PostgresUrl):
        from .postgres.control import PostgresControl

        return PostgresControl(db, mode, clock)
    from .sqlite.control import SqliteControl

    return SqliteControl(db, mode, clock)


def make_salvage(path: Path) -> Archive:
    """Return an archive that reads the intact rows of a damaged file.

    Raises:
        DatabaseError: the file can't be read at all.
    """
    from .sqlite.salvage import SqliteSalvage

    return SqliteSalvage(path)


def make_archive(db: Database, mode: StoreMode) -> Archive:
    """Open a validated database, to read or to fill it as a whole.

    Raises:
        DatabaseError: the database can't be used, or does not exist and the mode is not "create".
    """
    if isinstance(db, PostgresUrl):
        from .postgres.archive import PostgresArchive

        return PostgresArchive(db, mode)
    from .sqlite.archive import SqliteArchive

    return SqliteArchive(db, mode)
