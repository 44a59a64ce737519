"""Kills before and after a chosen commit, one after the other, and what one call makes of what they leave."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speval import load_evals, speval

from .checks import inconsistencies
from .processes import FINISH_WITHIN, MARK, end_marked, left_behind, rows
from .victims import POINTS


@dataclass
class Scenario:
    """What is done in the copy that is killed.

    Attributes:
        count: Evaluations.
        options: Those of the call.
        begin_with: A database to begin with, copied for each kill.
        points: Kill at these steps only; None: at each, until the run ends by itself.
        only: The label of the steps that count; None: all of them.
    """

    count: int
    options: dict[str, Any] = field(default_factory=lambda: {"executor": "coroutine", "concurrency": 4, "lease": 1.0})
    begin_with: Path | None = None
    points: list[int] | None = None
    only: str | None = None


@dataclass
class Kill:
    """A copy that has killed itself before or after a step."""

    db: Path
    side: str
    point: int
    label: str

    def __str__(self) -> str:
        return f"killed {self.side} {self.label} (step {self.point})"


def kill_at_each_step(folder: Path, scenario: Scenario) -> list[Kill]:
    """Run a scenario again and again, killed at one step after the other, each in a database of its own."""
    (folder / "points.py").write_text(POINTS)
    processes = {}
    kills = []
    mark = secrets.token_hex(8)
    try:
        for side in ("before", "after"):
            given = {
                "side": side,
                "count": scenario.count,
                "options": scenario.options,
                "begin_with": None if scenario.begin_with is None else str(scenario.begin_with),
                "points": scenario.points,
                "only": scenario.only,
            }
            processes[side] = subprocess.Popen(
                [sys.executable, "points.py", json.dumps(given)],
                cwd=folder,
                env=os.environ | {MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
            )
        for side, process in processes.items():
            out, _ = process.communicate(timeout=FINISH_WITHIN)
            label = ""
            for line in map(json.loads, out.splitlines()):
                label = line.get("label", label)
                if line.get("code") == -signal.SIGKILL:
                    kills.append(Kill(folder / line["db"], side, line["point"], label))
                elif "code" in line:
                    assert line["code"] == 0, f"the run ended with {line['code']} {side} step {line['point']}"
            assert process.returncode == 0
        assert not left_behind(mark)
        return kills
    finally:
        for process in processes.values():
            process.kill()
        end_marked(mark)  # the children that they have forked
        for process in processes.values():
            process.communicate()


def recorded(db: Path) -> dict[str, str]:
    """Return the results that a killed copy has left, as text by name."""
    if not db.exists() or not rows(db, "SELECT 1 FROM sqlite_master WHERE name = 'evals'"):
        return {}
    return dict(rows(db, "SELECT CAST(name AS TEXT), result FROM evals WHERE status = 'completed'"))


def faults_after(kill: Kill, count: int) -> list[str]:
    """Let one call complete what a killed copy has left, and return what is wrong then."""
    before = recorded(kill.db)
    log = Path(f"{kill.db}.executions")
    executed = Counter(log.read_text().split() if log.exists() else ())
    again: Counter[str] = Counter()

    def function(args: int) -> dict[str, int]:
        again[str(args)] += 1
        return {"number": args, "square": args**2}

    summary = speval(function, range(count), kill.db, lease=1.0, max_attempts=100_000, progress=False)
    faults = inconsistencies(kill.db, count)
    if summary.completed != count:
        faults.append(f"not completed: {summary}")
    right = {str(n): {"number": n, "square": n**2} for n in range(count)}
    results = {e["name"]: e["result"] for e in load_evals(kill.db)}
    if results != right:
        faults.append(f"wrong results: {[name for name in right if results.get(name) != right[name]][:5]}")
    if twice := [name for name in again if name in before or again[name] > 1]:
        faults.append(f"evaluated though recorded, or twice: {twice[:5]}")
    if twice := [name for name in executed if executed[name] > 1]:
        faults.append(f"executed twice by the copy that was killed: {twice[:5]}")
    after = recorded(kill.db)
    if changed := [name for name in before if after.get(name) != before[name]]:
        faults.append(f"recorded before the kill and changed by now: {changed[:5]}")
    if missing := [str(n) for n in range(count) if not (again[str(n)] or executed[str(n)] or str(n) in before)]:
        faults.append(f"has a result and was never executed: {missing[:5]}")
    return [f"{kill}: {fault}" for fault in faults]


def held_by_a_dead_copy(folder: Path, count: int) -> Path:
    """Return a database whose first evaluations are held by a copy that was killed when it had claimed them."""
    kills = kill_at_each_step(folder, Scenario(count, points=list(range(1, 12))))
    return next(kill.db for kill in kills if kill.side == "after" and kill.label == "commit of record")


def old_database(db: Path, count: int) -> None:
    """Make a half finished database as speval 0.1.1 does."""
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("CREATE TABLE evals (name TEXT, status TEXT, updated INTEGER, result TEXT, args TEXT)")
        for n in range(count):
            status = ["completed", "in_progress", "pending"][n % 3]
            result = json.dumps({"number": n, "square": n**2}) if status == "completed" else None
            connection.execute("INSERT INTO evals VALUES (?, ?, ?, ?, ?)", (str(n), status, 1_500_000_000 + n, result, str(n)))
        connection.commit()
