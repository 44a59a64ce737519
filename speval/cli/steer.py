"""The subcommands that change a database: retry, pause, resume, set, unset, drop, copy.

Owns what they ask and print. Invariant: they only use the database and never contact a worker.
"""

from __future__ import annotations

import sys
from typing import Literal

import click

from ..database import Database
from ..model import MOST_CONCURRENCY, Cause, Status, counted
from ..stores.copying import copy as copy_all
from ..sync import retry as put_back
from .format import escaped, line, print_json
from .params import DB, as_json, cause, database, database_name, filters, named, names_of, pattern

__all__ = ["copy", "drop", "pause", "resume", "retry", "set_", "unset"]


@click.command()
@database
@named(many=True)
@click.option(
    "--status", "-s", type=click.Choice(["failed", "completed"]), default="failed", show_default=True,
    help="Only evaluations with this status; others stay unchanged.",
)  # fmt: skip
@cause
@pattern
@as_json
def retry(
    db: str,
    names: tuple[str, ...],
    status: Literal["failed", "completed"],
    cause: Cause | None,
    pattern: str | None,
    as_json: bool,
) -> None:
    """Make evaluations pending again with a new attempt budget: all failed ones, or those named."""
    chosen: list[str] | None = list(names) or None
    if cause is not None or pattern is not None:
        chosen = names_of(db, names, status=status, cause=cause, pattern=pattern)
    count = put_back(db, chosen, status=status)
    if as_json:
        print_json({"retried": count})
    else:
        line(f"{counted(count)} pending again")


@click.command()
@database
def pause(db: str) -> None:
    """Stop all workers from claiming evaluations. Running evaluations continue; the workers wait for `speval resume`."""
    with Database(db) as opened:
        opened.pause()
        seen = opened.status(failures=0, runs=0)
    line(f"paused; {counted(seen.in_progress)} still in progress, {seen.pending} pending until `speval resume`")


@click.command()
@database
def resume(db: str) -> None:
    """Let workers claim evaluations again after `speval pause`."""
    with Database(db) as opened:
        opened.resume()
        seen = opened.status(failures=0, runs=0)
    line(f"resumed; {counted(seen.pending)} pending, {counted(len(seen.workers), 'worker')}")


_SETTING = click.argument("setting", type=click.Choice(["concurrency"]))


@click.command("set")
@database
@_SETTING
@click.argument("value", type=click.IntRange(1, MOST_CONCURRENCY), metavar="N")
def set_(db: str, setting: str, value: int) -> None:
    """Set the number of evaluations that each worker runs at once. It overrides the argument of the call, now and later."""
    with Database(db) as opened:
        opened.set(concurrency=value)
    line(f"{setting} set to {value} for every worker")


@click.command()
@database
@_SETTING
def unset(db: str, setting: str) -> None:
    """Remove the setting: each worker runs as many evaluations at once as its call says."""
    with Database(db) as opened:
        opened.unset("concurrency")
    line(f"{setting} not set; each worker uses the value of its call")


@click.command()
@database
@named(many=True)
@filters
@click.option("--yes", "-y", is_flag=True, help="Don't ask.")
@as_json
def drop(
    db: str,
    names: tuple[str, ...],
    status: Status | None,
    cause: Cause | None,
    pattern: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete evaluations with all attempts and results. Evaluations in progress can't be dropped.

    A later run whose eval space still has them adds them as new evaluations.
    """
    is_whole_status = status is not None and not names and cause is None and pattern is None
    if not names and status is None and cause is None and pattern is None:
        raise click.UsageError("name the evaluations to drop, or select them with --status, --cause or --match")
    chosen = [] if is_whole_status else names_of(db, names, status=status, cause=cause, pattern=pattern)
    count = _count(db, status) if status is not None and is_whole_status else len(chosen)
    if count and not yes:
        if not sys.stdin.isatty():
            raise click.ClickException(f"this deletes {counted(count)} with all attempts and results; pass --yes to confirm")
        click.confirm(f"Delete {counted(count)} with all attempts and results?", abort=True, err=True)
    with Database(db) as opened:
        dropped = opened.drop(status=status) if is_whole_status else opened.drop(chosen)
    if as_json:
        print_json({"dropped": dropped})
    else:
        line(f"{counted(dropped)} dropped")


@click.command()
@database
@click.argument("target", type=DB, metavar="TARGET")
@as_json
def copy(db: str, target: str, as_json: bool) -> None:
    """Copy the whole database DB to TARGET, which must be new or empty: from a file to a server, or back.

    Workers may continue to use DB meanwhile. Evaluations in progress are pending in TARGET.
    """
    copied = copy_all(db, target)
    if as_json:
        print_json(copied._asdict())
    else:
        what = f"{counted(copied.evaluations)} and {counted(copied.attempts, 'attempt')}"
        line(f"{what} copied to {escaped(database_name(target))}")


def _count(db: str, status: Status) -> int:
    with Database(db) as opened:
        seen = opened.status(failures=0, runs=0)
    return int(getattr(seen, status))
