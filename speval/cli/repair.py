"""The subcommands for maintenance: compact, salvage.

Owns what they print. Invariant: salvage names every damaged evaluation, and both leave the content of evaluations unchanged.
"""

from __future__ import annotations

import click

from ..database import Database
from ..model import counted
from ..stores.copying import salvage as salvage_all
from .format import escaped, line, print_json
from .params import DB, as_json, database, database_name

__all__ = ["compact", "salvage"]


@click.command()
@database
@as_json
def compact(db: str, as_json: bool) -> None:
    """Return the disk space of dropped evaluations to the system, and delete ended workers without attempts.

    Fails while workers are alive, because they would wait for a long time.
    """
    with Database(db) as opened:
        done = opened.compact()
    if as_json:
        print_json(done._asdict())
    else:
        line(f"{done.before:,} bytes before, {done.after:,} now; {counted(done.workers, 'worker')} deleted")


@click.command()
@database
@click.argument("target", type=DB, metavar="NEW")
@as_json
def salvage(db: str, target: str, as_json: bool) -> int:
    """Copy all intact data of the damaged file DB to NEW, which must be new or empty, and name the damaged evaluations.

    An evaluation with a damaged result is pending in NEW. An evaluation with damaged args is missing in NEW; the next run with
    its eval space adds it again. Exits with 1 if an evaluation is damaged.
    """
    done = salvage_all(db, target)
    if as_json:
        lost = [{"name": error.name, "problem": error.what} for error in done.lost]
        print_json({**done.copied._asdict(), "lost": lost, "lost_count": done.lost_count})
    else:
        for error in done.lost:
            line("lost ", escaped(f"{error.name!r}: {error.what}"))
        if done.lost_count > len(done.lost):
            line(f"and {done.lost_count - len(done.lost)} more")
        saved = f"{counted(done.copied.evaluations)} and {counted(done.copied.attempts, 'attempt')}"
        line(f"{saved} saved to {escaped(database_name(target))}, {done.lost_count} lost or damaged")
    return 1 if done.lost_count else 0
