"""What an error of PostgreSQL, of a pooler or of libpq means: whether it passes.

Owns the table of SQLSTATE classes. Invariant: a verdict depends on codes and never on the words of a message, since a server
says them in its own language. The one exception is pgbouncer, which has one code for everything and no other language.
"""

from __future__ import annotations

import ctypes
import re
import select
import socket
import sys
import time
from contextlib import suppress
from enum import Enum, auto
from typing import Any

import psycopg
from psycopg import pq

__all__ = [
    "BEFORE_READY",
    "NEWER_SCHEMA",
    "SCHEMA",
    "Failure",
    "Verdict",
    "first_line",
    "sqlstate",
    "verdict",
    "why_not_connected",
]

SCHEMA = 1  # what this release reads and writes
NEWER_SCHEMA = "SP002"  # raised by our own functions: a newer release has changed the schema
# The transaction is not as a function needs it, or the role's settings ended it: it has done nothing, and a transaction with
# settings of its own does better. SP001 is raised by our own functions.
BEFORE_READY = ("SP001", "25006", "57014", "55P03", "40001")

_VERBOSE = 2  # PQERRORS_VERBOSE: the code stands before the text
_CODED = re.compile(r":  ([0-9A-Z]{5}): ")


class Verdict(Enum):
    """Whether the same again may succeed."""

    PASSES = auto()
    MAY_PASS = auto()  # within a minute or never
    STAYS = auto()
    UNREACHABLE = auto()  # nothing has answered


# Longer codes first. Classes 08, 53, 57 and 58: connections, resources, operators, the system.
_STATES = (
    ("08P01", Verdict.MAY_PASS),  # whatever pgbouncer has to say: that its server is away, or that it has no such database
    ("08", Verdict.PASSES),
    ("25006", Verdict.MAY_PASS),  # read only: a standby, for good or until it is promoted
    ("25P03", Verdict.PASSES),  # idle in a transaction for too long
    ("25P04", Verdict.PASSES),  # a transaction for too long
    ("40", Verdict.PASSES),  # serialization failure, deadlock
    ("53100", Verdict.PASSES),  # disk full
    ("53400", Verdict.STAYS),  # a configured limit, such as temp_file_limit
    ("53", Verdict.PASSES),  # too many connections, out of memory
    ("55P03", Verdict.PASSES),  # lock not available
    ("57P04", Verdict.STAYS),  # the database was dropped
    ("57", Verdict.PASSES),  # shutting down, starting up, cancelled
    ("58", Verdict.PASSES),  # input and output errors
)


class Failure(psycopg.OperationalError):
    """An attempt to connect has failed, for a known reason."""

    def __init__(self, text: str, state: str, verdict: Verdict) -> None:
        super().__init__(text)
        self.state = state
        self.verdict = verdict


def sqlstate(error: psycopg.Error) -> str:
    """Return the code of an error, empty if it has none."""
    if isinstance(error, Failure):
        return error.state
    return error.diag.sqlstate or error.sqlstate or ""


def verdict(state: str) -> Verdict:
    """Return whether what has this code passes."""
    return next((found for prefix, found in _STATES if state.startswith(prefix)), Verdict.STAYS)


def first_line(error: psycopg.Error) -> str:
    """Return what the server or libpq says, in one line."""
    text = error.diag.message_primary or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].removeprefix("connection failed: ") if lines else type(error).__name__


def why_not_connected(error: psycopg.OperationalError, conninfo: str, timeout: float) -> Failure:
    """Return why a connection could not be made.

    libpq keeps no code of an error that ends a connection before it is there, only a text. So a second attempt is made, with
    texts that begin with the code.
    """
    text = first_line(error)
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return Failure(text, "", Verdict.UNREACHABLE)
    states, found = _second_attempt(conninfo, timeout)
    if not states:
        return Failure(text, "", found)
    # Of several hosts, one that will soon be there is enough.
    order = (Verdict.PASSES, Verdict.MAY_PASS, Verdict.STAYS)
    state = min(states, key=lambda state: order.index(verdict(state)))
    return Failure(text, state, verdict(state))


def _second_attempt(conninfo: str, timeout: float) -> tuple[list[str], Verdict]:
    """Return the codes that the servers give, and the verdict if they give none."""
    deadline = time.monotonic() + timeout
    connection = pq.PGconn.connect_start(conninfo.encode())
    try:
        if not connection.host:  # options that libpq can't read, or a service that it does not know
            return [], Verdict.STAYS
        _speak_in_codes(connection)
        while connection.status != pq.ConnStatus.BAD and time.monotonic() < deadline:
            status = connection.connect_poll()
            if status == pq.PollingStatus.OK:
                return [], Verdict.PASSES  # it is there now
            if status == pq.PollingStatus.FAILED:
                break
            reads = status == pq.PollingStatus.READING
            _wait(connection.socket, reads, max(0.0, deadline - time.monotonic()))
        if connection.needs_password:
            return ["28P01"], Verdict.STAYS
        states = _CODED.findall(connection.get_error_message())
        if states or not _is_unknown(connection.host.decode()):
            return states, Verdict.UNREACHABLE
        return [], Verdict.STAYS
    finally:
        connection.finish()


def _wait(fileno: int, reads: bool, timeout: float) -> None:
    poll = select.poll()
    poll.register(fileno, select.POLLIN if reads else select.POLLOUT)
    poll.poll(timeout * 1000)


def _speak_in_codes(connection: Any) -> None:
    """Have texts of a connection begin with their code; without it, they have none."""
    with suppress(OSError, AttributeError, TypeError):
        # The extension is linked to its libpq, so the function is found through it.
        module = sys.modules[type(connection).__module__]
        library = getattr(module, "_pq", None) or ctypes.CDLL(module.__file__)
        library.PQsetErrorVerbosity.argtypes = [ctypes.c_void_p, ctypes.c_int]
        library.PQsetErrorVerbosity(ctypes.c_void_p(connection.pgconn_ptr), _VERBOSE)


def _is_unknown(host: str) -> bool:
    """Tell whether a host name is one that the name service says does not exist."""
    if host.startswith(("/", "@")):
        return False
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        return error.errno == socket.EAI_NONAME
    except (OSError, UnicodeError):
        return False
    return False
