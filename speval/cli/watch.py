"""The subcommand watch: a live picture of all workers.

Owns the picture and how often it is drawn. Invariant: reading takes at most 2 % of the time, for a database of any size, and
the command exits when every evaluation has ended.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import TYPE_CHECKING

import click

from ..database import Database
from ..escape import span
from ..model import Failure, Overview, WorkerView
from .format import STYLES, console, escaped, failure, instant, line, print_json, text
from .look import counts_text, eta, progress_text
from .params import as_json, database, database_name

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

__all__ = ["picture", "watch"]

_SHARE = 0.02  # the fraction of the time spent reading the database
_FAILURES = 5
_HIGHEST = 200  # lines of the last picture, which stays in the terminal
_RUNS = 20  # the maximum number of running evaluations to name per worker


@click.command()
@database
@click.option(
    "--interval", "-i", type=click.FloatRange(min=0.05), default=0.5, show_default=True, help="Seconds between updates."
)
@click.option("--keep", is_flag=True, help="Continue until Ctrl-C, also when every evaluation has ended.")
@as_json
def watch(db: str, interval: float, keep: bool, as_json: bool) -> int:
    """Watch all workers live: progress, failures, rate, time left, and what each worker runs.

    Exits when every evaluation has ended. It only reads the database, so it works from any terminal. In a pipe it prints a
    line after each change.
    """
    with Database(db) as opened:
        if as_json:
            last = _follow_json(opened, interval, keep)
        elif sys.stdout.isatty() and not console().is_dumb_terminal:
            last = _follow_live(database_name(db), opened, interval, keep)
        else:
            last = _follow_lines(opened, interval, keep)
    return 0 if last.completed == last.total else 1


def _is_over(seen: Overview, keep: bool) -> bool:
    return not keep and seen.total > 0 and seen.open == 0


class _Looks:
    """Reads the overview at intervals, which grow when reading is slow."""

    def __init__(self, opened: Database, interval: float) -> None:
        self._database = opened
        self._interval = interval
        self._took = 0.0

    def look(self) -> Overview:
        started = time.monotonic()
        seen = self._database.status(failures=_FAILURES, runs=_RUNS)
        self._took = time.monotonic() - started
        return seen

    def pause(self) -> None:
        time.sleep(max(self._interval, self._took / _SHARE))


def _follow_json(opened: Database, interval: float, keep: bool) -> Overview:
    looks = _Looks(opened, interval)
    while True:
        seen = looks.look()
        print_json(dataclasses.asdict(seen) | {"settings": seen.settings._asdict(), "eta": eta(seen)})
        sys.stdout.flush()
        if _is_over(seen, keep):
            return seen
        looks.pause()


def _follow_lines(opened: Database, interval: float, keep: bool) -> Overview:
    looks = _Looks(opened, interval)
    before: object = None
    while True:
        seen = looks.look()
        now = (seen.pending, seen.in_progress, seen.completed, seen.failed, seen.settings, len(seen.workers))
        if now != before:
            parts = [instant(seen.at), "  ", *counts_text(seen), "; ", *progress_text(seen)]
            line(*parts)
            sys.stdout.flush()
        before = now
        if _is_over(seen, keep):
            return seen
        looks.pause()


def _follow_live(db: str, opened: Database, interval: float, keep: bool) -> Overview:
    from rich.live import Live

    out = console()
    looks = _Looks(opened, interval)
    seen = looks.look()
    try:
        # Use the alternate screen, so that the window can change its size; the last picture stays in the terminal.
        with Live(picture(db, seen, out.width, out.height), console=out, screen=True, auto_refresh=False) as live:
            while not _is_over(seen, keep):
                looks.pause()
                seen = looks.look()
                live.update(picture(db, seen, out.width, out.height), refresh=True)
    finally:
        out.print(picture(db, seen, out.width, _HIGHEST))
    return seen


def picture(db: str, seen: Overview, width: int, height: int) -> Group:
    """Return the picture of one overview, at most ``width`` by ``height``."""
    from rich.console import Group

    counts = text(" ", *counts_text(seen))
    if counts.cell_len > width:
        counts = text(" ", *counts_text(seen, with_causes=False))
    lines = [_title(db, seen, width), _bar(seen, width), counts, text(" ", *progress_text(seen))]
    # Workers get up to two thirds of the lines.
    failures = _failures(seen.failures[: max(1, height // 3 - len(lines) + 1)], seen.at)
    room = height - 1 - len(lines) - (len(failures) + 1 if failures else 0)
    lines += _workers(seen, width, max(3, room))
    if failures:
        lines += [text(), *failures]
    return Group(*lines[: max(1, height - 1)])


def _title(db: str, seen: Overview, width: int) -> Text:
    clock = instant(seen.at)[-8:]
    title = text(" ", (escaped(db), "bold"))
    title.truncate(max(1, width - len(clock) - 2), overflow="ellipsis")
    title.pad_right(width - title.cell_len - len(clock) - 1)
    return text().append_text(title).append(clock, "dim")


def _bar(seen: Overview, width: int) -> Text:
    """Return the bar: completed, failed, in progress."""
    share = f"{_percent(seen)} %"
    room = max(4, width - 3 - 6)
    total = max(1, seen.total)
    ends = [round(room * part / total) for part in _running_sums(seen.completed, seen.failed, seen.in_progress)]
    # A status with at least one evaluation gets at least one character.
    # A damaged file can contain counts that do not fit together.
    failed = min(room, max(ends[1] - ends[0], 1 if seen.failed else 0))
    held = min(room - failed, max(ends[2] - ends[1], 1 if seen.in_progress else 0))
    done = max(0, min(ends[0], room - failed - held))
    bar = text(
        " ", ("━" * done, STYLES["completed"]), ("━" * failed, STYLES["failed"]), ("━" * held, STYLES["in_progress"]),
        ("━" * max(0, room - done - failed - held), "bright_black"),
    )  # fmt: skip
    return bar.append(f"{share:>6}")


def _percent(seen: Overview) -> int:
    """Return the percentage that has ended, rounded down: 100 means everything."""
    return (seen.completed + seen.failed) * 100 // seen.total if seen.total else 0


def _running_sums(*parts: int) -> list[int]:
    sums = [0]
    for part in parts:
        sums.append(sums[-1] + part)
    return sums[1:]


def _workers(seen: Overview, width: int, room: int) -> list[Text]:
    if not seen.workers:
        return []
    label = max(len(_label(worker)) for worker in seen.workers)
    lines = [text(), text((f" {'worker':{label}}  {'state':6}  {'for':>9}  runs", "bold"))]
    # If not all workers fit, show dead ones and busy ones first.
    shown_first = sorted(seen.workers, key=lambda w: (w.state == "alive", not w.running, w.started_at))
    fits = shown_first[: room - 2] if len(seen.workers) <= room - 2 else shown_first[: max(1, room - 3)]
    lines += [_worker(worker, seen.at, label, width) for worker in sorted(fits, key=lambda w: (w.started_at, w.worker))]
    if len(fits) < len(seen.workers):
        lines.append(text((f" and {len(seen.workers) - len(fits)} more", "dim")))
    return lines


def _label(worker: WorkerView) -> str:
    return escaped(f"{worker.host}:{worker.pid}")


def _worker(worker: WorkerView, at: float, label: int, width: int) -> Text:
    state = (f"{worker.state:6}", STYLES.get(worker.state, ""))
    row = text(f" {_label(worker):{label}}  ", state, f"  {span(max(0.0, at - worker.started_at)):>9}  ")
    if not worker.running:
        waits = "waits" if not worker.held else f"holds {worker.held} for their backoff"
        return row.append(waits if not worker.ahead else f"{worker.ahead} claimed ahead", "dim")
    left = width - row.cell_len
    for i, run in enumerate(worker.runs):
        part = text((escaped(run.name), STYLES["in_progress"]), (f" {span(max(0.0, at - run.since))}", "dim"))
        more = worker.running - i - 1
        reserved = len(f"  and {more} more") if more else 0
        if i and part.cell_len + 2 + reserved > left:
            return row.append(f"  and {more + 1} more", "dim")
        if i:
            row.append("  ")
            left -= 2
        else:
            part.truncate(max(8, left - reserved), overflow="ellipsis")
        row.append_text(part)
        left -= part.cell_len
    more = worker.running - len(worker.runs)
    return row.append(f"  and {more} more", "dim") if more > 0 else row


def _failures(failures: tuple[Failure, ...], at: float) -> list[Text]:
    if not failures:
        return []
    lines = [text((" last failures", "bold"))]
    name = min(24, max(len(escaped(f.name)) for f in failures))
    for last in failures:
        label = text((escaped(last.name), STYLES["failed"]))
        label.truncate(name, overflow="ellipsis", pad=True)
        ago = span(max(0.0, at - last.ended_at))
        told = failure(last.cause, last.type, last.message)
        lines.append(text(" ").append_text(label).append(f"  {ago:>9} ago  ", "dim").append(told))
    return lines
