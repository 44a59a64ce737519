"""The subcommand run: a call of ``speval()`` from the command line.

Owns its arguments and options. Invariant: the options are those of the call, with the same defaults.
"""

from __future__ import annotations

import builtins
import dataclasses
from typing import Any, Literal

import click

from ..model import Durability, OnChanged
from ..sync import speval
from .format import line, print_json
from .inputs import load_object, load_space
from .log import show_warnings
from .params import as_json, database

__all__ = ["run"]


class _Failures(click.ParamType):  # type: ignore[type-arg]
    """A number of failures, or a fraction of the eval space."""

    name = "count or fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        try:
            if str(value).endswith("%"):
                return float(str(value)[:-1]) / 100
            return int(value) if str(value).isdecimal() else float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a count (10) nor a fraction (0.1 or 10%)", param, ctx)


class _ExceptionType(click.ParamType):  # type: ignore[type-arg]
    """An exception type: the name of a builtin one, or module:Name."""

    name = "type"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> type[Exception]:
        found = load_object(value, "exception type") if ":" in value else getattr(builtins, value, None)
        if not isinstance(found, type) or not issubclass(found, Exception):
            self.fail(f"{value!r} does not name an exception type; write ConnectionError or module:Name", param, ctx)
        return found


@click.command()
@click.argument("func", metavar="FUNC")
@database
@click.option("--space", "source", metavar="SPACE", required=True, help="The eval space, see above.")
@click.option("--name", "name_key", metavar="KEY", help="Use this key of the args as the name of an evaluation.")
@click.option("--timeout", "-t", type=float, metavar="SECONDS", help="The time limit of one attempt. [default: no limit]")
@click.option("--concurrency", "-j", type=int, default=1, show_default=True, metavar="N", help="Evaluations to run at once.")
@click.option("--executor", type=click.Choice(["auto", "coroutine", "thread", "process"]), default="auto", show_default=True)
@click.option("--max-attempts", type=int, default=3, show_default=True, metavar="N", help="Attempts per evaluation.")
@click.option("--retry-on", type=_ExceptionType(), multiple=True, metavar="TYPE", help="Try again after this exception.")
@click.option("--backoff", type=float, default=1.0, show_default=True, metavar="SECONDS", help="Wait before attempt 2.")
@click.option(
    "--lease",
    type=float,
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="A worker that does not renew for this time is dead.",
)
@click.option(
    "--on-changed", type=click.Choice(["error", "keep", "rerun"]), default="error", show_default=True,
    help="What to do with names that are stored with different args.",
)  # fmt: skip
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait for evaluations that other workers run.")
@click.option("--max-failures", type=_Failures(), metavar="N", help="Stop after N failures, or at a fraction (10%).")
@click.option(
    "--durability", type=click.Choice(["process", "power"]), default="process", show_default=True,
    help="What a recorded result survives: a killed process, or a power failure.",
)  # fmt: skip
@click.option("--progress/--no-progress", default=None, help="Show a progress bar. [default: on a terminal]")
@as_json
def run(
    func: str,
    db: str,
    *,
    source: str,
    name_key: str | None,
    timeout: float | None,
    concurrency: int,
    executor: Literal["auto", "coroutine", "thread", "process"],
    max_attempts: int,
    retry_on: tuple[type[Exception], ...],
    backoff: float,
    lease: float,
    on_changed: OnChanged,
    wait: bool,
    max_failures: int | float | None,
    durability: Durability,
    progress: bool | None,
    as_json: bool,
) -> int:
    """Evaluate FUNC over an eval space, as speval() does. Run the command again to continue.

    FUNC is module:function or file.py:function: a plain or async function of one argument.

    SPACE is a file of JSON lines (.jsonl, each line the args of one evaluation), a table (.csv, a column for each argument), a
    grid ("grid:lr=0.1,0.01;depth=2,4"), or module:name of an eval space or of a function that returns one.

    Exits with 1 when an evaluation failed or is unfinished.
    """
    function = load_object(func, "function")
    if not callable(function):
        raise click.ClickException(f"{func} is not a function")
    show_warnings()
    summary = speval(
        function,
        load_space(source, name_key),
        db,
        timeout,
        concurrency=concurrency,
        executor=executor,
        max_attempts=max_attempts,
        retry_on=retry_on,
        backoff=backoff,
        lease=lease,
        on_changed=on_changed,
        wait=wait,
        max_failures=max_failures,
        durability=durability,
        progress=progress,
    )
    if as_json:
        names = [field.name for field in dataclasses.fields(summary)]
        print_json({name: getattr(summary, name) for name in names} | {"causes": dict(summary.causes)})
    else:
        line(str(summary))
    return 0 if summary.completed == summary.total else 1
