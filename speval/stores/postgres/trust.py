"""Checks the owners and the objects of a PostgreSQL schema.

Owns the rule of whose code a connection may run. Trusted roles are the login role, the database owner, superusers, and the
owners named in the URL. Invariant: before a schema is used, every object that speval reads or writes has the expected kind and
a trusted owner, and no other role can add objects.

Membership in the role of the owner is not enough: before PostgreSQL 16 a role can make any other role its member.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib import resources
from typing import Any

from ...errors import DatabaseError
from ...url import PostgresUrl
from .connection import Connection

__all__ = ["check_functions", "check_owners", "sources"]

_TABLES = ("meta", "evaluations", "queue", "running", "attempts", "workers", "spaces", "unlisted")
_SEQUENCES = ("ids", "seqs", "looked", "spaces_id_seq")
_READING = ("clock", "movers")  # the functions that readers call

_TRUSTED = """
WITH trusted AS (
    SELECT r.oid FROM pg_roles AS r WHERE r.rolsuper OR r.rolname IN (current_user, 'pg_database_owner')
        OR r.rolname = ANY (%(owners)s::text[])
        OR r.oid = (SELECT d.datdba FROM pg_database AS d WHERE d.datname = current_database())
)
"""
_OWNERS = f"""
{_TRUSTED}, schema AS (
    SELECT n.* FROM pg_namespace AS n WHERE n.nspname = %(schema)s
), ours AS (
    SELECT c.* FROM pg_class AS c JOIN schema AS s ON c.relnamespace = s.oid
    WHERE c.relname = ANY (%(tables)s::text[]) OR c.relname = ANY (%(sequences)s::text[])
)
SELECT 'owner', s.nspname::text, pg_get_userbyid(s.nspowner)::text FROM schema AS s WHERE s.nspowner NOT IN (TABLE trusted)
UNION ALL
SELECT 'create', s.nspname, coalesce(r.rolname, 'PUBLIC')
FROM schema AS s CROSS JOIN aclexplode(s.nspacl) AS g LEFT JOIN pg_roles AS r ON r.oid = g.grantee
WHERE g.privilege_type = 'CREATE' AND g.grantee NOT IN (TABLE trusted)
UNION ALL
SELECT 'kind', c.relname, c.relkind::text FROM ours AS c
WHERE c.relkind <> CASE WHEN c.relname = ANY (%(tables)s::text[]) THEN 'r' ELSE 'S' END
UNION ALL
SELECT 'owner', c.relname, pg_get_userbyid(c.relowner) FROM ours AS c WHERE c.relowner NOT IN (TABLE trusted)
UNION ALL
SELECT 'trigger', c.relname, coalesce(r.rolname, 'PUBLIC')
FROM ours AS c CROSS JOIN aclexplode(c.relacl) AS g LEFT JOIN pg_roles AS r ON r.oid = g.grantee
WHERE g.privilege_type = 'TRIGGER' AND g.grantee NOT IN (TABLE trusted)
UNION ALL
SELECT 'extra', c.relname, 'a row level security policy' FROM ours AS c WHERE c.relrowsecurity
UNION ALL
SELECT 'extra', c.relname, 'a rule' FROM ours AS c JOIN pg_rewrite AS w ON w.ev_class = c.oid WHERE c.relkind = 'r'
UNION ALL
SELECT 'extra', c.relname, 'a trigger' FROM ours AS c JOIN pg_trigger AS t ON t.tgrelid = c.oid WHERE NOT t.tgisinternal
UNION ALL
SELECT 'extra', c.relname, 'another table that inherits from it' FROM ours AS c JOIN pg_inherits AS i ON i.inhparent = c.oid
"""
_FUNCTIONS = f"""
{_TRUSTED}
SELECT p.proname, p.proowner IN (TABLE trusted), pg_get_userbyid(p.proowner), p.prosecdef,
    encode(sha256(convert_to(p.prosrc, 'UTF8')), 'hex')
FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
WHERE n.nspname = %(schema)s AND p.proname = ANY (%(functions)s::text[])
"""
_FUNCTION = re.compile(r"CREATE FUNCTION speval\.(\w+)\(.*?AS \$\$(.*?)\$\$;", re.DOTALL)


def check_owners(connection: Connection, url: PostgresUrl) -> None:
    """Refuse a schema in which an untrusted role has put code, or could put code.

    Raises:
        DatabaseError: an object has an untrusted owner or an unexpected kind, or an untrusted role may add objects.
    """
    values = {"schema": url.schema, "owners": list(url.owners), "tables": list(_TABLES), "sequences": list(_SEQUENCES)}
    found = connection.execute(_OWNERS, values).fetchone()
    if found is None:
        return
    what, name, other = found
    named = url.schema if what in ("owner", "create") and name == url.schema else f"{url.schema}.{name}"
    if what == "owner":
        raise _not_ours(url, named, other)
    problem = {
        "create": f"the role {other} may create objects in the schema {named}, which would run with your rights; "
        f"REVOKE CREATE ON SCHEMA {named} FROM {other}",
        "trigger": f"the role {other} may create triggers on {named}, which would run with your rights; "
        f"REVOKE TRIGGER ON ALL TABLES IN SCHEMA {url.schema} FROM {other}",
        "kind": f"{named} should be a table and is something else, for example a view; use another ?namespace=NAME",
        "extra": f"{named} has {other}, which speval did not create; remove it, or use another ?namespace=NAME",
    }
    raise DatabaseError(url.shown, problem[what])


def check_functions(connection: Connection, url: PostgresUrl, *, reads: bool) -> None:
    """Refuse a schema whose functions differ from those of this release.

    Raises:
        DatabaseError: a function is missing, is different, or has an untrusted owner.
    """
    expected = sources(url.schema)
    names = _READING if reads else tuple(expected)
    values = {"schema": url.schema, "owners": list(url.owners), "functions": list(names)}
    found: dict[str, Any] = {}
    for name, is_trusted, owner, is_definers, digest in connection.execute(_FUNCTIONS, values).fetchall():
        if not is_trusted:
            raise _not_ours(url, f"{url.schema}.{name}()", owner)
        if name in found or is_definers or digest not in expected[name]:
            raise DatabaseError(
                url.shown,
                f"the function {url.schema}.{name}() differs from that of this release; make a copy with `speval copy`",
            )
        found[name] = digest
    if missing := [name for name in names if name not in found]:
        problem = f"the function {url.schema}.{missing[0]}() is missing; make a copy with `speval copy`"
        raise DatabaseError(url.shown, problem)


@cache
def sources(schema: str) -> dict[str, set[str]]:
    """Return the digests of the functions of a schema, by name."""
    script = resources.files(__package__).joinpath("schema.sql").read_text(encoding="utf-8")
    bodies = {name: re.sub(r"\bspeval\.", f"{schema}.", body) for name, body in _FUNCTION.findall(script)}
    return {name: {hashlib.sha256(body.encode()).hexdigest()} for name, body in bodies.items()}


def _not_ours(url: PostgresUrl, what: str, owner: str) -> DatabaseError:
    return DatabaseError(
        url.shown,
        f"{what} belongs to the role {owner}, which could run code with your rights; if you trust this role, "
        f"add owner={owner} to the URL, otherwise use another ?namespace=NAME",
    )
