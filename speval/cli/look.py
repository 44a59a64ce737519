"""The subcommands that only read: status, ls, show, best, doctor.

Owns what they print. Invariant: they change nothing and block no worker.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
import platform
from collections.abc import Iterable, Iterator
from typing import Any

import click

from .. import __version__
from ..database import Database
from ..escape import rate, span
from ..flat import flattened
from ..model import Attempt, Cause, Evaluation, Overview, Status, counted
from .format import STYLES, Cell, brief, columns, escaped, failure, instant, line, print_json, spelled
from .params import as_json, database, filters, named

__all__ = ["best", "causes_text", "counts_text", "doctor", "ls", "progress_text", "show", "status"]


@click.command()
@database
@click.option("--exit-code", is_flag=True, help="Exit with 1 unless every evaluation is completed.")
@as_json
def status(db: str, exit_code: bool, as_json: bool) -> int:
    """Count evaluations by status, and list the workers and what they run."""
    with Database(db) as opened:
        seen = opened.status()
    if as_json:
        print_json(dataclasses.asdict(seen) | {"settings": seen.settings._asdict(), "eta": eta(seen)})
    else:
        line(*counts_text(seen))
        line(*progress_text(seen))
        for worker in seen.workers:
            since = span(seen.at - worker.started_at)
            runs = ", ".join(f"{escaped(r.name)} ({span(max(0.0, seen.at - r.since))})" for r in worker.runs)
            more = worker.running - len(worker.runs)
            style = STYLES.get(worker.state, "")
            line(
                f"worker {escaped(worker.worker)} ", (worker.state, style), f", started {since} ago, runs {runs or 'nothing'}",
                f" and {more} more" if more > 0 else "",
            )  # fmt: skip
        for last in seen.failures:
            line("failed ", (escaped(last.name), STYLES["failed"]), f" {failure(last.cause, last.type, last.message)}")
    return 1 if exit_code and seen.completed < seen.total else 0


def eta(seen: Overview) -> float | None:
    """Return the seconds until everything has ended at the present rate, or None without an estimate."""
    return seen.open / seen.rate if seen.open and seen.rate and not seen.settings.paused else None


def causes_text(seen: Overview) -> str:
    """Return the number of failed evaluations per cause."""
    return ", ".join(f"{count} {cause}" for cause, count in sorted(seen.causes.items()))


def counts_text(seen: Overview, *, with_causes: bool = True) -> list[Cell]:
    """Return the number of evaluations per status."""
    parts: list[Cell] = [f"{counted(seen.total)}: ", (f"{seen.completed} completed", STYLES["completed"])]
    if seen.failed:
        causes = f" ({causes_text(seen)})" if with_causes else ""
        parts += [", ", (f"{seen.failed} failed{causes}", STYLES["failed"])]
    if seen.in_progress:
        parts += [", ", (f"{seen.in_progress} in progress", STYLES["in_progress"])]
    if seen.pending:
        parts += [", ", (f"{seen.pending} pending", STYLES["pending"])]
    return parts


def progress_text(seen: Overview) -> list[Cell]:
    """Return the number of workers, the rate, the time left, and the settings."""
    alive = sum(worker.state == "alive" for worker in seen.workers)
    parts: list[Cell] = [counted(alive, "worker") if alive else "no worker"]
    if seen.rate is not None:
        parts.append(f", {rate(seen.rate)}")
    if (left := eta(seen)) is not None:
        parts.append(f", {span(left)} left")
    if seen.settings.paused:
        parts += [", ", ("paused", STYLES["paused"])]
    if seen.settings.concurrency is not None:
        parts.append(f", concurrency set to {seen.settings.concurrency}")
    return parts


@click.command()
@database
@filters
@click.option("--limit", "-n", type=click.IntRange(min=0), help="The maximum number to list. [default: all]")
@click.option("--names", "only_names", is_flag=True, help="Print names only.")
@as_json
def ls(
    db: str,
    status: Status | None,
    cause: Cause | None,
    pattern: str | None,
    limit: int | None,
    only_names: bool,
    as_json: bool,
) -> None:
    """List evaluations in eval-space order, one per line."""
    with Database(db) as opened:
        found = opened.evaluations(status=status, cause=cause, pattern=pattern, limit=limit)
        if as_json:
            for evaluation in found:
                print_json(evaluation)
        elif only_names:
            for evaluation in found:
                line(escaped(evaluation["name"]))
        else:
            head = ("name", "status", "attempts", "took", "args", "result")
            columns(head, (_row(e) for e in found), right=(2, 3), keep=(0, 1, 2, 3))


def _row(e: Evaluation) -> tuple[Cell, ...]:
    error = e["error"]
    outcome = "" if e["status"] != "completed" else brief(e["result"])
    if error is not None:
        outcome = failure(error["cause"], error["type"], error["message"])
    return (
        escaped(e["name"]),
        (e["status"], STYLES[e["status"]]),
        str(e["attempts"]),
        span(e["duration"]),
        brief(e["args"]),
        (outcome, STYLES["failed"] if error else ""),
    )


@click.command()
@database
@named(many=False)
@as_json
def show(db: str, name: str, as_json: bool) -> None:
    """Show one evaluation: args, result, and every attempt with its worker, times, cause and traceback."""
    with Database(db) as opened:
        evaluation = opened.evaluation(name)
        attempts = opened.attempts(name)
    if as_json:
        print_json(dict(evaluation) | {"attempts": [dataclasses.asdict(attempt) for attempt in attempts]})
        return
    line(("name      ", "bold"), escaped(evaluation["name"]))
    line(("status    ", "bold"), (evaluation["status"], STYLES[evaluation["status"]]))
    line(("updated   ", "bold"), instant(evaluation["updated"]))
    _value("args", evaluation["args"])
    if evaluation["status"] == "completed":
        _value("result", evaluation["result"])
    for attempt in attempts:
        _attempt(attempt)


def _value(name: str, value: Any) -> None:
    written = spelled(value)
    if len(written) > 100:
        written = escaped(json.dumps(value, ensure_ascii=False, indent=2), lines=True)
    for i, part in enumerate(written.split("\n")):
        line((f"{name if i == 0 else '':10}", "bold"), part)


def _attempt(attempt: Attempt) -> None:
    outcome = attempt.outcome or "in progress"
    style = STYLES["completed" if outcome == "completed" else "failed" if attempt.outcome else "in_progress"]
    line()
    line((f"attempt {attempt.number} ", "bold"), (outcome, style))
    line("  worker    ", escaped(attempt.worker or "unknown"))
    line("  started   ", instant(attempt.started_at) or "never")
    if attempt.ended_at is not None:
        line(
            "  ended     ", instant(attempt.ended_at), f", ran {span(attempt.duration)}" if attempt.duration is not None else ""
        )
    if attempt.error is not None:
        error = attempt.error
        told = error["traceback"].rstrip("\n") or (
            f"{error['type']}: {error['message']}" if error["type"] else error["message"]
        )
        if error["message"].partition("\n")[0] not in told:
            line("  message   ", failure("exception", error["type"], error["message"]))
        for part in escaped(told, lines=True).split("\n"):
            line("    ", (part, STYLES["failed"]))


@click.command()
@database
@click.argument("key", default="result")
@click.option("--min", "order", flag_value="min", help="The smallest values are the best.")
@click.option("--max", "order", flag_value="max", help="The largest values are the best.")
@click.option("--number", "-n", type=click.IntRange(min=1), default=1, show_default=True, help="The number to print.")
@as_json
def best(db: str, key: str, order: str | None, number: int, as_json: bool) -> int:
    """Print the completed evaluations with the best value of KEY.

    KEY is a key of the result (loss, scores.f1), or a column of `speval export` (result.loss, duration). Without KEY, the
    result itself must be a number.
    """
    if order is None:
        raise click.UsageError("pass --min or --max")
    seen = 0
    keys: dict[str, None] = {}

    def numbers() -> Iterator[tuple[float, Evaluation]]:
        nonlocal seen
        with Database(db) as opened:
            for evaluation in opened.evaluations(status="completed"):
                seen += 1
                row = flattened(evaluation)
                value = row.get(f"result.{key}", row.get(key))
                if isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
                    yield value, evaluation
                elif len(keys) < 50:
                    keys.update(dict.fromkeys(k for k in row if k.startswith("result")))

    choose = heapq.nsmallest if order == "min" else heapq.nlargest
    found = choose(number, numbers(), key=lambda pair: pair[0])
    if not found:
        if not seen:
            raise click.ClickException("no evaluation is completed yet")
        there = f"; the columns are {', '.join(escaped(k) for k in keys)}" if keys else ""
        raise click.ClickException(f"{counted(seen, 'completed evaluation')}, but {key!r} is never a number{there}")
    if as_json:
        for value, evaluation in found:
            print_json({"value": value, **evaluation})
    else:
        rows = ((brief(value), escaped(e["name"]), brief(e["args"]), brief(e["result"])) for value, e in found)
        columns((escaped(key), "name", "args", "result"), rows, right=(0,), keep=(0, 1))
    return 0


@click.command()
@database
@click.option("--quick", is_flag=True, help="Don't read the whole database to find damage.")
@as_json
def doctor(db: str, quick: bool, as_json: bool) -> int:
    """Check the filesystem, journal, schema, integrity and workers of a database.

    Exits with 1 if a problem stops speval from working or has destroyed data.
    """
    with Database(db) as opened:
        health = opened.check(integrity=not quick)
    facts = {"speval": __version__, "python": platform.python_version()} | dict(health.facts)
    if as_json:
        print_json({"facts": facts, "findings": [dataclasses.asdict(finding) for finding in health.findings]})
    else:
        for name, value in facts.items():
            line((f"{name:14}", "bold"), "-" if value is None else escaped(str(value)))
        _findings((finding.is_error, finding.problem, finding.fix) for finding in health.findings)
    return 1 if any(finding.is_error for finding in health.findings) else 0


def _findings(findings: Iterable[tuple[bool, str, str]]) -> None:
    found = list(findings)
    if not found:
        line(("no problems found", STYLES["completed"]))
    for is_error, problem, fix in found:
        line(("error: " if is_error else "hint: ", STYLES["failed" if is_error else "paused"]), escaped(f"{problem}; {fix}"))
