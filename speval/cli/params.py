"""Arguments that several subcommands share.

Owns their names, values and shell completion. Invariant: a subcommand only gets a valid database argument.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, get_args

import click
from click.shell_completion import CompletionItem

from ..database import Database
from ..errors import SpevalError
from ..model import Cause, Status
from ..options import checked_database
from ..url import PostgresUrl

__all__ = ["DB", "as_json", "as_private_as", "cause", "database", "database_name", "filters"]
__all__ += ["named", "names_of", "pattern", "status"]

F = TypeVar("F", bound=Callable[..., Any])

_COMPLETED = 100  # the maximum number of names that a shell offers


class _Database(click.Path):
    """The path of a SQLite file, or the URL of a PostgreSQL database."""

    name = "database"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        checked_database(value)
        return str(value)


class _Name(click.ParamType):  # type: ignore[type-arg]
    """The name of an evaluation in the database given before it."""

    name = "name"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        beginning = incomplete.replace("*", "?")  # the name may contain a literal star, which "?" also matches
        try:
            with Database(ctx.params["db"]) as opened:
                found = [e["name"] for e in opened.evaluations(pattern=f"{beginning}*", limit=_COMPLETED)]
        except (SpevalError, KeyError, OSError):
            return []
        # A shell would print unprintable characters to the terminal.
        return [CompletionItem(name, stored=True) for name in found if name.startswith(incomplete) and name.isprintable()]


DB = _Database()
database = click.argument("db", type=DB, metavar="DB")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
status = click.option("--status", "-s", type=click.Choice(get_args(Status)), help="Only evaluations with this status.")
cause = click.option("--cause", "-c", type=click.Choice(get_args(Cause)), help="Only evaluations that failed for this cause.")
pattern = click.option(
    "--match", "-m", "pattern", metavar="PATTERN",
    help="Only evaluations whose name matches: * is any text, ? any character.",
)  # fmt: skip


def database_name(db: str) -> str:
    """Return the database argument for display: as given, without a password."""
    checked = checked_database(db)
    return checked.shown if isinstance(checked, PostgresUrl) else db


@contextmanager
def as_private_as(db: str) -> Iterator[None]:
    """Limit the permissions of files that are made in the body to those of the database, if it is a file."""
    checked = checked_database(db)
    forbidden = 0
    with suppress(OSError):  # the file does not exist; opening it reports that
        forbidden = 0 if isinstance(checked, PostgresUrl) else ~checked.stat().st_mode & 0o077
    old = os.umask(0o077)
    os.umask(old | forbidden)
    try:
        yield
    finally:
        os.umask(old)


def named(*, many: bool) -> Callable[[F], F]:
    """Return the argument for one name, or for any number of names."""
    if many:
        return click.argument("names", type=_Name(), metavar="[NAME]...", nargs=-1)
    return click.argument("name", type=_Name(), metavar="NAME")


def filters(command: F) -> F:
    """Add the options that select evaluations to a subcommand."""
    return status(cause(pattern(command)))


def names_of(db: str, names: tuple[str, ...], *, status: Status | None, cause: Cause | None, pattern: str | None) -> list[str]:
    """Return the names that the arguments select, in eval-space order if there are filters.

    Raises:
        UnknownNameError: the database has no evaluation with one of the given names.
    """
    if status is None and cause is None and pattern is None:
        return list(names)
    with Database(db) as opened:
        for name in names:
            opened.evaluation(name)
        chosen = set(names)
        found = opened.evaluations(status=status, cause=cause, pattern=pattern)
        return [e["name"] for e in found if not chosen or e["name"] in chosen]
