"""Classifies errors of PostgreSQL, poolers and libpq as transient or permanent.

Owns the table of SQLSTATE classes. Invariant: a verdict depends on codes and never on the text of a message, because servers
translate their messages. The one exception is pgbouncer, which uses a single code for all errors and only English.
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

SCHEMA = 1  # the schema version that this release reads and writes
NEWER_SCHEMA = "SP002"  # raised by our SQL functions: a newer release has changed the schema
# The settings of the session are wrong for a function, or ended its transaction, which did nothing. A transaction that sets
# its own settings can succeed. SP001 is raised by our SQL functions.
BEFORE_READY = ("SP001", "25006", "57014", "55P03", "40001")

_VERBOSE = 2  # PQERRORS_VERBOSE: the message starts with the code
_CODED = re.compile(r":  ([0-9A-Z]{5}): ")


class Verdict(Enum):
    """Whether a retry can succeed."""

    PASSES = auto()
    MAY_PASS = auto()  # within a minute or never
    STAYS = auto()
    UNREACHABLE = auto()  # no answer from any host


# Longer codes first. Classes 08, 53, 57 and 58: connections, resources, operators, the system.
_STATES = (
    ("08P01", Verdict.MAY_PASS),  # every pgbouncer error: its server is down, or the database is unknown
    ("08", Verdict.PASSES),
    ("25006", Verdict.MAY_PASS),  # read-only: a standby, which may be promoted soon
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
    """A connection could not be made, for a known reason."""

    def __init__(self, text: str, state: str, verdict: Verdict) -> None:
        super().__init__(text)
        self.state = state
        self.verdict = verdict


def sqlstate(error: psycopg.Error) -> str:
    """Return the SQLSTATE of an error, or an empty string."""
    if isinstance(error, Failure):
        return error.state
    return error.diag.sqlstate or error.sqlstate or ""


def verdict(state: str) -> Verdict:
    """Return whether an error with this SQLSTATE is transient."""
    return next((found for prefix, found in _STATES if state.startswith(prefix)), Verdict.STAYS)


def first_line(error: psycopg.Error) -> str:
    """Return the message of the server or libpq in one line."""
    text = error.diag.message_primary or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].removeprefix("connection failed: ") if lines else type(error).__name__


def why_not_connected(error: psycopg.OperationalError, conninfo: str, timeout: float) -> Failure:
    """Return the reason of a failed connection attempt.

    For an error during connecting, libpq keeps only the message, not the code. So this connects a second time, with verbose
    messages, which start with the code.
    """
    text = first_line(error)
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return Failure(text, "", Verdict.UNREACHABLE)
    states, found = _second_attempt(conninfo, timeout)
    if not states:
        return Failure(text, "", found)
    # One of several hosts is enough, if its error is transient.
    order = (Verdict.PASSES, Verdict.MAY_PASS, Verdict.STAYS)
    state = min(states, key=lambda state: order.index(verdict(state)))
    return Failure(text, state, verdict(state))


def _second_attempt(conninfo: str, timeout: float) -> tuple[list[str], Verdict]:
    """Return the codes from the servers, and the verdict for an error without a code."""
    deadline = time.monotonic() + timeout
    connection = pq.PGconn.connect_start(conninfo.encode())
    try:
        if not connection.host:  # invalid options, or an unknown service
            return [], Verdict.STAYS
        _speak_in_codes(connection)
        while connection.status != pq.ConnStatus.BAD and time.monotonic() < deadline:
            status = connection.connect_poll()
            if status == pq.PollingStatus.OK:
                return [], Verdict.PASSES  # this time it succeeded
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
    """Make the messages of a connection start with their code."""
    with suppress(OSError, AttributeError, TypeError):
        # Look the function up through psycopg's extension, which is linked to its libpq.
        module = sys.modules[type(connection).__module__]
        library = getattr(module, "_pq", None) or ctypes.CDLL(module.__file__)
        library.PQsetErrorVerbosity.argtypes = [ctypes.c_void_p, ctypes.c_int]
        library.PQsetErrorVerbosity(ctypes.c_void_p(connection.pgconn_ptr), _VERBOSE)


def _is_unknown(host: str) -> bool:
    """Tell whether the name service reports that a host name does not exist."""
    if host.startswith(("/", "@")):
        return False
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        return error.errno == socket.EAI_NONAME
    except (OSError, UnicodeError):
        return False
    return False
