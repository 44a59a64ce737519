"""The schema of one eval space in a PostgreSQL database.

Owns recognising, creating and migrating it, and the names in it. Invariant: it is made in one transaction, by one of those who
start at once, and a schema that is not ours is never written to.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

from ...errors import DatabaseError, DatabaseMissingError, ForeignDatabaseError, NewerSchemaError
from ...url import PostgresUrl
from ..base import StoreMode
from .connection import Connection
from .errors import SCHEMA
from .trust import check_functions, check_owners

__all__ = ["READY", "SCHEMA", "Names", "prepare", "stored_name", "true_name"]

RELEASE_FOR_SCHEMA = "1.0"  # the first release that reads SCHEMA

_NAME = re.compile(r"\bspeval\.")
# PostgreSQL's text holds every character but one. It is written as this and a digit, this itself as this twice.
_ESCAPE = "\x10"

_LOOK = """
SELECT to_regnamespace(%(schema)s)::oid, to_regclass(%(meta)s)::oid, current_setting('server_encoding'),
    (SELECT count(*) FROM pg_class AS c
        WHERE c.relnamespace = to_regnamespace(%(schema)s) AND c.relkind IN ('r', 'p', 'v', 'm'))
"""
_META = "SELECT key, value FROM speval.meta WHERE key IN ('application', 'schema', 'release')"
# By its name: before the schema is there, nothing else tells it from others.
_LOCK = "SELECT pg_advisory_xact_lock(1936745846, hashtext(%s))"
_SIGN = "INSERT INTO speval.meta VALUES ('application', 'speval'), ('schema', %s), ('release', %s)"


# In a transaction that changes something, once it has the lock that a release that changes the schema needs too.
READY = "SELECT speval.ready_1()"


class Names:
    """Statements as they are for one schema."""

    def __init__(self, schema: str) -> None:
        self.schema = schema
        self._known: dict[str, str] = {}

    def __call__(self, sql: str) -> str:
        """Return a statement in which ``speval.`` stands for the schema, with that put in its place."""
        known = self._known.get(sql)
        if known is None:
            known = self._known[sql] = _NAME.sub(f"{self.schema}.", sql)
        return known


def stored_name(name: str) -> str:
    """Return a text as it can be stored."""
    if "\0" in name or _ESCAPE in name:
        return name.replace(_ESCAPE, _ESCAPE * 2).replace("\0", f"{_ESCAPE}0")
    return name


def true_name(stored: str) -> str:
    """Return a stored text as it was."""
    if _ESCAPE in stored:
        return re.sub(f"{_ESCAPE}(.)", lambda found: "\0" if found[1] == "0" else found[1], stored, flags=re.DOTALL)
    return stored


def prepare(connection: Connection, url: PostgresUrl, mode: StoreMode) -> None:
    """Recognise the schema, and make it if it is missing and ``mode`` is "create", in one transaction.

    Raises:
        DatabaseError: it can't be used; it is as it was.
    """
    if _recognise(connection, url, mode):
        return
    names = Names(url.schema)
    connection.execute(_LOCK, (url.schema,))
    if _recognise(connection, url, mode):
        return  # another one has made it meanwhile
    (exists,) = _one(connection, "SELECT to_regnamespace(%s) IS NOT NULL", url.schema)
    if not exists:
        connection.execute(names("CREATE SCHEMA speval.").rstrip("."))
    script = resources.files(__package__).joinpath("schema.sql").read_text(encoding="utf-8")
    connection.execute(names(script))
    connection.execute(names(_SIGN), (str(SCHEMA), RELEASE_FOR_SCHEMA))


def _recognise(connection: Connection, url: PostgresUrl, mode: StoreMode) -> bool:
    """Tell whether the schema is there and ours, writing nothing."""
    schema = url.schema
    values = {"schema": schema, "meta": f"{schema}.meta"}
    row = connection.execute(_LOOK, values).fetchone()
    assert row is not None
    namespace, meta, encoding, tables = row
    if encoding != "UTF8":
        raise DatabaseError(url.shown, f"its encoding is {encoding}, which can't hold every text; create one with UTF8")
    if namespace is not None:
        check_owners(connection, url)
    if meta is None:
        if namespace is not None and tables:
            raise ForeignDatabaseError(url.shown, f"a schema {schema} of something else")
        if mode != "create":
            raise DatabaseMissingError(url.shown)
        return False
    stored: dict[str, Any] = dict(connection.execute(Names(schema)(_META)).fetchall())
    if stored.get("application") != "speval":
        raise ForeignDatabaseError(url.shown, f"a schema {schema} of something else")
    version = int(stored["schema"])
    if version > SCHEMA:
        raise NewerSchemaError(url.shown, version, SCHEMA, stored["release"])
    check_functions(connection, url, reads=mode == "read")
    return True


def _one(connection: Connection, sql: str, *values: object) -> tuple[Any, ...]:
    row = connection.execute(sql, values).fetchone()
    assert row is not None
    return row
