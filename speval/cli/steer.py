"""The subcommands that change something: retry, pause, resume, set, unset, drop, copy.

Owns what they ask and answer. Invariant: they go through the database alone; no worker is spoken to.
"""

from __future__ import annotations

import sys

import click

from ..database import Database
from ..model import MOST_CONCURRENCY, Cause, Status, counted
from ..stores.copying import copy as copy_all
from ..sync import retry as put_back
from .format import line, print_json, shown
from .params import DB, as_json, cause, database, database_name, filters, named, names_of, pattern

__all__ = ["copy", "drop", "pause", "resume", "retry", "set_", "unset"]


@click.command()
@database
@named(many=True)
@click.option(
    "--status", "-s", type=click.Choice(["failed", "completed"]), default="failed", show_default=True,
    help="Put back those of this status; others stay as they are.",
)  # fmt: skip
@cause
@pattern
@as_json
def retry(db: str, names: tuple[str, ...], status: Status, cause: Cause | None, pattern: str | None, as_json: bool) -> None:
    """Put evaluations back to pending with a fresh budget of attempts: all failed ones, or those named."""
    chosen: list[str] | None = list(names) or None
    if cause is not None or pattern is not None:
        chosen = names_of(db, names, status=status, cause=cause, pattern=pattern)
    count = put_back(db, chosen, status=status)
    if as_json:
        print_json({"retried": count})
    else:
        line(f"{counted(count)} put back")


@click.command()
@database
def pause(db: str) -> None:
    """Let all workers claim nothing more; what runs goes on, and they wait for `speval resume`."""
    with Database(db) as opened:
        opened.pause()
        seen = opened.status(failures=0, runs=0)
    line(f"paused; {counted(seen.in_progress)} still in progress, {seen.pending} pending until `speval resume`")


@click.command()
@database
def resume(db: str) -> None:
    """Let the workers go on after `speval pause`."""
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
    """Have each worker run N evaluations at once, whatever its call was given, now and later."""
    with Database(db) as opened:
        opened.set(concurrency=value)
    line(f"{setting} set to {value} for every worker")


@click.command()
@database
@_SETTING
def unset(db: str, setting: str) -> None:
    """Have each worker run as many evaluations at once as its call was given."""
    with Database(db) as opened:
        opened.unset("concurrency")
    line(f"{setting} as each call was given it")


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
    """Forget evaluations with all their attempts and results, for good; what is in progress is not dropped.

    A space that still has them brings them back as new ones.
    """
    is_whole_status = status is not None and not names and cause is None and pattern is None
    if not names and status is None and cause is None and pattern is None:
        raise click.UsageError("name what to drop, or choose with --status, --cause or --match")
    chosen = [] if is_whole_status else names_of(db, names, status=status, cause=cause, pattern=pattern)
    count = _count(db, status) if status is not None and is_whole_status else len(chosen)
    if count and not yes:
        if not sys.stdin.isatty():
            raise click.ClickException(f"this drops {counted(count)} with what is recorded of them; say --yes to do so")
        click.confirm(f"Drop {counted(count)} with all that is recorded of them?", abort=True, err=True)
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
    """Copy all that is in DB to TARGET, which must be new or empty: from a file to a server, or back.

    Workers may go on with DB meanwhile. What they hold is pending in the copy.
    """
    copied = copy_all(db, target)
    if as_json:
        print_json(copied._asdict())
    else:
        line(
            f"{counted(copied.evaluations)} and {counted(copied.attempts, 'attempt')} copied to {shown(database_name(target))}"
        )


def _count(db: str, status: Status) -> int:
    with Database(db) as opened:
        seen = opened.status(failures=0, runs=0)
    return int(getattr(seen, status))
