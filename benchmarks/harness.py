"""How everything here is measured: fresh processes in a fresh folder, by turns, and the median of each.

Owns the parent's half of a measurement and the shape of what comes of it. Invariant: what is compared was measured by turns in
one run, and a candidate that fails has a reason instead of a figure.
"""

import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Appended, so that an environment with another speval in it measures that one.
_START = f"import sys; sys.path.append({str(ROOT)!r}); from benchmarks.child import main; main()"
_WITHIN = 600.0  # seconds one measurement may take

Figures = dict[str, Any]


class Failed(Exception):
    """A candidate did not do what it should."""


class Child:
    """A process that is ready to do what is measured.

    Args:
        function: ``module:name`` of what prepares it.
        folder: Where it runs.
        python: Its interpreter; this one by default.
        keywords: What the function is given.
    """

    def __init__(self, function: str, folder: Path, *, python: str = sys.executable, **keywords: Any) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        command = [python, "-c", _START, function, json.dumps(keywords)]
        # What leads this interpreter to its packages is not for another.
        env = {name: value for name, value in os.environ.items() if python == sys.executable or name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True
        )

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._stderr):
            assert stream is not None
            stream.close()

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def told(self) -> Figures:
        """Return the next line of figures; the first says that it is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            told: Figures = json.loads(line)
            return told
        self.process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        raise Failed((lines or [f"it ended with {self.process.returncode} and said nothing"])[-1][:200])


def measured(
    function: str, *, folder: Path | None = None, python: str = sys.executable, copies: int = 1, **keywords: Any
) -> Figures:
    """Return the figures of so many processes that begin at the same time.

    Returns:
        ``seconds`` from the word to the last one's end and ``cpu`` of all together; of one alone, all it has told.
    """
    with ExitStack() as stack:
        where = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        children = [
            stack.enter_context(Child(function, where, python=python, copies=copies, copy=copy, **keywords))
            for copy in range(copies)
        ]
        for child in children:
            child.told()
        started = time.perf_counter()
        for child in children:
            child.go()
        figures = [child.told() for child in children]
        if copies == 1:
            return figures[0]
        return {"seconds": time.perf_counter() - started, "cpu": sum(f["cpu"] for f in figures)}


def by_turns(rounds: int, work: dict[str, Callable[[], Figures]]) -> dict[str, Figures]:
    """Do each so many times, by turns.

    Returns:
        The medians of each one's figures, or ``why_not`` of one that has failed.
    """
    told: dict[str, list[Figures]] = {name: [] for name in work}
    failed: dict[str, Figures] = {}
    for number in range(rounds):
        for name, one in work.items():
            if name in failed:
                continue
            _show(f"{number + 1}/{rounds} {name}")
            try:
                told[name].append(one())
            except Failed as error:
                failed[name] = {"why_not": str(error)}
    _show("")
    return {name: failed.get(name) or medians(figures) for name, figures in told.items()}


def _show(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def medians(figures: Sequence[Figures]) -> Figures:
    return {key: statistics.median(f[key] for f in figures) for key in figures[0]}


def machine() -> Figures:
    """Return what the figures depend on, the load of the minute before included."""
    system = f"{platform.system()} {platform.release()}"
    versions = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    at, load = datetime.now(UTC).date().isoformat(), round(os.getloadavg()[0], 1)
    return {"at": at, "system": system, "cores": os.cpu_count(), "load": load, **versions}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; columns whose heads begin with a space are numbers."""
    lines = [f"| {' | '.join(cell.strip() for cell in head)} |"]
    lines.append(f"| {' | '.join('--:' if cell.startswith(' ') else '---' for cell in head)} |")
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def per_second(count: int, figures: Figures) -> float | None:
    """Return evaluations per second, or None of what has failed."""
    return count / figures["seconds"] if "seconds" in figures else None


def shown(number: float | None, digits: int = 3) -> str:
    """Return a number as people read it."""
    if number is None:
        return ""
    if number >= 1000:
        return f"{float(f'{number:.{digits}g}'):,.0f}"
    return f"{float(f'{number:.{digits}g}'):g}"
