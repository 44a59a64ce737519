"""What comes around the evaluations: the import, the command's help, the first worker process, a call with a single evaluation.

Owns the table ``start``. Invariant: each is measured in a process that has done nothing else, an interpreter from its start to
its end in seconds of CPU, which do not depend on what else the machine runs.
"""

import asyncio
import compileall
import os
import resource
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from .harness import ROOT, Figures, by_turns, measured, table

# The CPU of an interpreter that runs each.
_CODES = {
    "bare": "pass",
    "import": "import speval",
    "names": "from speval import as_completed, load_evals, retry, speval",
    "help": "import sys; sys.argv[:] = ['speval', '--help']; from speval.cli import main; main()",
}
_CALLS = 40  # with a single evaluation each


def first_result(copies: int, copy: int) -> Callable[[], Figures]:
    """Prepare to make a process executor and to get one result from it."""
    import speval.aio  # noqa: F401 - a call has imported it by then
    from speval.clock import Clock
    from speval.executors import make_executor
    from speval.options import Options

    async def main() -> None:
        executor = make_executor(abs, Options(executor="process"), Clock())
        slot = executor.slot(0)
        await slot.call("0", "1", None)
        finish_at.append(time.perf_counter())
        await slot.close()
        await executor.close()

    finish_at: list[float] = []

    def run() -> Figures:
        started = time.perf_counter()
        asyncio.run(main())
        return {"seconds": finish_at[0] - started}

    return run


def one_call(copies: int, copy: int) -> Callable[[], Figures]:
    """Prepare calls with a single evaluation each, one after the other, on a database that is there."""
    from speval import speval

    def call(number: int) -> None:
        speval(abs, {f"evaluation {number}": number}, "calls.db", executor="thread", progress=False)

    call(-1)

    return partial(each, call)


def bare_sqlite(copies: int, copy: int) -> Callable[[], Figures]:
    """Prepare to open a database, commit one row and close it, as often; the disk takes most of that time."""

    def insert(number: int) -> None:
        connection = sqlite3.connect("bare.db", isolation_level=None)
        connection.execute("PRAGMA journal_mode = wal")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("CREATE TABLE IF NOT EXISTS results (number, result)")
        connection.execute("INSERT INTO results VALUES (?, ?)", (number, number))
        connection.close()

    insert(-1)

    return partial(each, insert)


def each(call: Callable[[int], None]) -> Figures:
    """Return the median of the seconds that calls take: a disk that is busy makes a few of them ten times as long."""
    seconds = []
    for number in range(_CALLS):
        started = time.perf_counter()
        call(number)
        seconds.append(time.perf_counter() - started)
    return {"each": statistics.median(seconds)}


def interpreter(code: str) -> Figures:
    """Return the seconds of CPU, and of the clock, that an interpreter takes to start, do this, and end."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - started, "cpu": cpu}


def measure(rounds: int, share: float, pythons: dict[str, str]) -> Figures:
    compileall.compile_dir(ROOT / "speval", quiet=1)  # as pip does where it installs a package
    calls = ("first_result", "one_call", "bare_sqlite")
    work: dict[str, Callable[[], Figures]] = {name: partial(interpreter, code) for name, code in _CODES.items()}
    work |= {name: partial(measured, f"benchmarks.start:{name}") for name in calls}
    return by_turns(rounds * 3, work)


def tables(found: Figures) -> dict[str, str]:
    texts = {
        "bare": ("a bare interpreter, start to end", "cpu"),
        "import": ("the same and `import speval`", "cpu"),
        "names": ("the same and `from speval import speval`", "cpu"),
        "help": ("`speval --help`", "cpu"),
        "first_result": ("making a process executor, to its first result", "seconds"),
        "one_call": ("a call with a single evaluation, in a thread, on a database that is there", "each"),
        "bare_sqlite": ("opening such a database with sqlite3, committing a row, closing it", "each"),
    }
    rows = []
    for key, (text, figure) in texts.items():
        unit = "ms of CPU" if figure == "cpu" else "ms"
        rows.append([text, f"{1000 * found[key][figure]:.0f} {unit}"])
    return {"start": table(["what", " median"], rows)}
