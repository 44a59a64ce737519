"""What a PostgreSQL URL says.

Owns the way from the URL a user writes to the parts a connection needs. Invariant: nothing that is shown of a URL (its text,
its repr, an error about it) holds a password, also not of one that can't be read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from .errors import OptionError

__all__ = ["PostgresUrl", "is_conninfo", "is_postgres"]

_SCHEMES = ("postgresql", "postgres")
_SPACE = re.compile(r"[a-z0-9_]{1,50}", re.ASCII)
# What libpq would refuse only when it connects, where it can't be told from a server that is away.
_CHOICES = {
    "sslmode": ("prefer", "disable", "allow", "require", "verify-ca", "verify-full"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
    "gssencmode": ("prefer", "disable", "require"),
    "channel_binding": ("prefer", "disable", "require"),
    "load_balance_hosts": ("disable", "random"),
}
# A connection string of libpq: words with values, at least one of which says where.
_WORDS = r"(?:host|hostaddr|port|dbname|user|password|passfile|service|options|application_name|connect_timeout|\w*ssl\w*)"
_VALUE = r"\s*=\s*(?:'(?:[^'\\]|\\.)*'|[^\s']*)"
_CONNINFO = re.compile(rf"\s*(?=.*\b(?:host|hostaddr|dbname|service)\s*=)(?:{_WORDS}{_VALUE}\s*)+", re.ASCII)
_ENCODE = "write / ? # @ : % and spaces in user and password percent-encoded (@ is %40), or keep the password in ~/.pgpass"


def is_postgres(text: str) -> bool:
    """Tell whether a database argument is meant as a PostgreSQL URL."""
    return text.partition("://")[0].lower() in _SCHEMES and "://" in text


def is_conninfo(text: str) -> bool:
    """Tell whether a database argument is meant as a connection string of libpq, such as ``host=db dbname=runs``."""
    return _CONNINFO.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class PostgresUrl:
    """A database on a PostgreSQL server.

    Attributes:
        parameters: What libpq is told, by its own keywords; the password among them.
        space: The name of the eval space in the database, empty for the one without a name.
        shown: The URL as messages show it.
        owners: Roles whose schemas we use besides our own.
    """

    parameters: dict[str, str] = field(repr=False, hash=False)
    space: str
    shown: str
    owners: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.shown

    @property
    def schema(self) -> str:
        """Return the schema that holds the tables of the space."""
        return f"speval_{self.space}" if self.space else "speval"

    @property
    def file_name(self) -> str:
        """Return a file name that tells this database and space from others; without user and password."""
        parts = [re.sub(r"[^\w.]+", "_", self.parameters.get(key, "")).strip("_") for key in ("host", "port", "dbname")]
        return "-".join(["postgresql", *filter(None, parts), self.schema])[:150]

    @classmethod
    def parse(cls, text: str) -> PostgresUrl:
        """Read a URL.

        Raises:
            OptionError: it can't be read; the error does not show it.
        """
        try:
            parts = urlsplit(text)
            query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        except ValueError:
            raise _refused(_ENCODE) from None
        login, _, places = parts.netloc.rpartition("@")
        # A separator of the URL inside the password would have its rest taken for host, database or query.
        stray = [key + value for key, value in query.items() if key not in ("user", "password", "host")]
        if "@" in login or parts.fragment or "@" in parts.path or "@" in "".join(stray):
            raise _refused(_ENCODE)
        user, _, password = login.partition(":")
        hosts, ports = _places(places)
        given = {"user": unquote(user), "password": unquote(password), "dbname": unquote(parts.path[1:])}
        given |= {"host": ",".join(hosts), "port": ",".join(ports) if any(ports) else ""}
        parameters = {key: value for key, value in given.items() if value}
        space = query.pop("space", "")
        if space and not _SPACE.fullmatch(space):
            raise OptionError("db", f"{parts.scheme}://...?space={space[:60]!r}", "a space has 1 to 50 of a to z, 0 to 9 and _")
        if any("\0" in value for value in [*parameters.values(), *query, *query.values()]):
            raise _refused("it holds a NUL character")
        owners = tuple(filter(None, query.pop("owner", "").split(",")))
        for key, allowed in _CHOICES.items():
            if query.get(key, allowed[0]) not in allowed:
                raise OptionError(
                    "db", f"{parts.scheme}://...?{key}={query[key][:30]!r}", f"{key} is one of {', '.join(allowed)}"
                )
        parameters |= query
        return cls(parameters, space, _shown(parameters, space), owners)


def _places(text: str) -> tuple[list[str], list[str]]:
    """Return hosts and ports; libpq tries several, one after the other."""
    hosts, ports = [], []
    for place in text.split(",") if text else ():
        found = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]]*)(?::([0-9]*))?", place)
        if found is None:
            raise _refused(_ENCODE)
        hosts.append(unquote(found[1].strip("[]")))
        ports.append(found[2] or "")
    return hosts, ports


def _shown(parameters: dict[str, str], space: str) -> str:
    """Return the URL of what tells one database from another, and nothing else."""
    hosts = parameters.get("host", "").split(",")
    ports = parameters.get("port", "").split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    user = f"{quote(parameters['user'])}@" if "user" in parameters else ""
    # The folder of a socket is no host that a URL could show in its place.
    folder = f"?host={hosts[0]}" if hosts[0].startswith(("/", "@")) else ""
    places = [f"[{host}]" if ":" in host else host for host in hosts]
    places = [f"{place}:{port}" if port else place for place, port in zip(places, ports, strict=False)]
    place = "" if folder else ",".join(places)
    name = f"{'&' if folder else '?'}space={space}" if space else ""
    return f"postgresql://{user}{place}/{quote(parameters.get('dbname', ''))}{folder}{name}"


def _refused(expected: str) -> OptionError:
    return OptionError("db", "'postgresql://...'", f"this URL can't be read: {expected}")
