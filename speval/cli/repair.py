"""The subcommands that put a database in order: compact, salvage.

Owns what they answer. Invariant: what was lost is named, and neither changes what an evaluation says.
"""

from __future__ import annotations

import click

from ..database import Database
from ..model import counted
from ..stores.copying import salvage as salvage_all
from .format import line, print_json, shown
from .params import DB, as_json, database, database_name

__all__ = ["compact", "salvage"]


@click.command()
@database
@as_json
def compact(db: str, as_json: bool) -> None:
    """Give back the room of what was dropped, and forget workers that left and that no attempt names.

    Refused while workers are at work, who would have to wait for long.
    """
    with Database(db) as opened:
        done = opened.compact()
    if as_json:
        print_json(done._asdict())
    else:
        line(f"{done.before:,} bytes before, {done.after:,} now; {counted(done.workers, 'worker')} forgotten")


@click.command()
@database
@click.argument("target", type=DB, metavar="NEW")
@as_json
def salvage(db: str, target: str, as_json: bool) -> int:
    """Copy what is sound in the damaged file DB to NEW, which must be new or empty, and name what is lost.

    An evaluation whose result is lost is pending in NEW; one whose args are lost is brought back by its eval space. Exits
    with 1 if something is lost.
    """
    done = salvage_all(db, target)
    if as_json:
        lost = [{"name": error.name, "problem": error.what} for error in done.lost]
        print_json({**done.copied._asdict(), "lost": lost, "lost_count": done.lost_count})
    else:
        for error in done.lost:
            line("lost ", shown(f"{error.name!r}: {error.what}"))
        if done.lost_count > len(done.lost):
            line(f"and {done.lost_count - len(done.lost)} more")
        saved = f"{counted(done.copied.evaluations)} and {counted(done.copied.attempts, 'attempt')}"
        line(f"{saved} saved to {shown(database_name(target))}, {done.lost_count} lost or damaged")
    return 1 if done.lost_count else 0
