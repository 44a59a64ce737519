"""PostgreSQL URLs.

Owns the parsing of a URL into connection parameters. Invariant: the display text of a URL, its repr and errors about it never
contain a password, also when the URL is malformed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from .errors import OptionError

__all__ = ["PostgresUrl", "is_conninfo", "is_postgres"]

_SCHEMES = ("postgresql", "postgres")
_NAMESPACE = re.compile(r"[a-z0-9_]{1,50}", re.ASCII)
# libpq checks these values only when it connects, and the error looks like one of an unreachable server.
_CHOICES = {
    "sslmode": ("prefer", "disable", "allow", "require", "verify-ca", "verify-full"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
    "gssencmode": ("prefer", "disable", "require"),
    "channel_binding": ("prefer", "disable", "require"),
    "load_balance_hosts": ("disable", "random"),
}
# A connection string of libpq: keywords with values, at least one of which names the server or the database.
_WORDS = r"(?:host|hostaddr|port|dbname|user|password|passfile|service|options|application_name|connect_timeout|\w*ssl\w*)"
_VALUE = r"\s*=\s*(?:'(?:[^'\\]|\\.)*'|[^\s']*)"
_CONNINFO = re.compile(rf"\s*(?=.*\b(?:host|hostaddr|dbname|service)\s*=)(?:{_WORDS}{_VALUE}\s*)+", re.ASCII)
_ENCODE = "percent-encode / ? # @ : % and blanks in user and password (@ is %40), or keep the password in ~/.pgpass"


def is_postgres(text: str) -> bool:
    """Tell whether a database argument looks like a PostgreSQL URL."""
    return text.partition("://")[0].lower() in _SCHEMES and "://" in text


def is_conninfo(text: str) -> bool:
    """Tell whether a database argument looks like a libpq connection string, such as ``host=db dbname=runs``."""
    return _CONNINFO.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class PostgresUrl:
    """A database on a PostgreSQL server.

    Attributes:
        parameters: Connection parameters by libpq keyword, the password included.
        namespace: The namespace in the database; empty for the default one.
        shown: The display name of the database: the URL without password.
        owners: Roles whose schemas are trusted besides the login role.
    """

    parameters: dict[str, str] = field(repr=False, hash=False)
    namespace: str
    shown: str
    owners: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.shown

    @property
    def schema(self) -> str:
        """Return the PostgreSQL schema that holds the tables of the namespace."""
        return f"speval_{self.namespace}" if self.namespace else "speval"

    @property
    def file_name(self) -> str:
        """Return a file name that is unique for the database and namespace, without user and password."""
        parts = [re.sub(r"[^\w.]+", "_", self.parameters.get(key, "")).strip("_") for key in ("host", "port", "dbname")]
        return "-".join(["postgresql", *filter(None, parts), self.schema])[:150]

    @classmethod
    def parse(cls, text: str) -> PostgresUrl:
        """Parse a URL.

        Raises:
            OptionError: the URL is malformed; the error does not contain it.
        """
        try:
            parts = urlsplit(text)
            query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        except ValueError:
            raise _refused(_ENCODE) from None
        login, _, places = parts.netloc.rpartition("@")
        # A raw separator in the password would make the rest of the password part of host, database or query.
        stray = [key + value for key, value in query.items() if key not in ("user", "password", "host")]
        if "@" in login or parts.fragment or "@" in parts.path or "@" in "".join(stray):
            raise _refused(_ENCODE)
        user, _, password = login.partition(":")
        hosts, ports = _places(places)
        given = {"user": unquote(user), "password": unquote(password), "dbname": unquote(parts.path[1:])}
        given |= {"host": ",".join(hosts), "port": ",".join(ports) if any(ports) else ""}
        parameters = {key: value for key, value in given.items() if value}
        name = query.pop("namespace", "")
        if name and not _NAMESPACE.fullmatch(name):
            expected = "a namespace is 1 to 50 characters of a to z, 0 to 9 and _"
            raise OptionError("db", f"{parts.scheme}://...?namespace={name[:60]!r}", expected)
        if any("\0" in value for value in [*parameters.values(), *query, *query.values()]):
            raise _refused("it contains a NUL character")
        owners = tuple(filter(None, query.pop("owner", "").split(",")))
        for key, allowed in _CHOICES.items():
            if query.get(key, allowed[0]) not in allowed:
                raise OptionError(
                    "db", f"{parts.scheme}://...?{key}={query[key][:30]!r}", f"{key} is one of {', '.join(allowed)}"
                )
        parameters |= query
        return cls(parameters, name, _shown(parameters, name), owners)


def _places(text: str) -> tuple[list[str], list[str]]:
    """Return hosts and ports; libpq tries them in order."""
    hosts, ports = [], []
    for place in text.split(",") if text else ():
        found = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]]*)(?::([0-9]*))?", place)
        if found is None:
            raise _refused(_ENCODE)
        hosts.append(unquote(found[1].strip("[]")))
        ports.append(found[2] or "")
    return hosts, ports


def _shown(parameters: dict[str, str], namespace: str) -> str:
    """Return the URL with user, hosts, database and namespace only."""
    hosts = parameters.get("host", "").split(",")
    ports = parameters.get("port", "").split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    user = f"{quote(parameters['user'])}@" if "user" in parameters else ""
    # The folder of a Unix socket can't be the host part of a URL.
    folder = f"?host={hosts[0]}" if hosts[0].startswith(("/", "@")) else ""
    places = [f"[{host}]" if ":" in host else host for host in hosts]
    places = [f"{place}:{port}" if port else place for place, port in zip(places, ports, strict=False)]
    place = "" if folder else ",".join(places)
    name = f"{'&' if folder else '?'}namespace={namespace}" if namespace else ""
    return f"postgresql://{user}{place}/{quote(parameters.get('dbname', ''))}{folder}{name}"


def _refused(expected: str) -> OptionError:
    return OptionError("db", "'postgresql://...'", f"the URL is malformed: {expected}")
