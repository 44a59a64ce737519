"""What was done to the copies of a round, what came of it, and whether that is as it has to be.

Invariant: only what was written outside of speval is believed.
"""

from __future__ import annotations

import json
import signal
import sqlite3
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speval import load_evals
from speval.stores.sqlite.states import HOMES, STATES

from .processes import left_behind, rows

if TYPE_CHECKING:
    from .storm import Copy


@dataclass
class Figures:
    """What was done to the copies, and what came of it."""

    rounds: int = 0
    kills: int = 0
    stops: int = 0
    stops_with_the_lock: int = 0  # for all others the database stood still then, and their leases ran out as well
    evaluations: int = 0
    executions: int = 0
    seen: int = 0  # results that copies had printed
    lost: int = 0  # results seen and not there, or not the same any more; evaluations without a result
    recorded_twice: int = 0
    attempts_lost: int = 0  # attempts recorded as lost with their worker
    not_charged: int = 0  # claimed ahead when their worker died
    problems: list[str] = field(default_factory=list)

    def __iadd__(self, other: Figures) -> Figures:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        return self

    def __str__(self) -> str:
        shown = {f.name.replace("_", " "): getattr(self, f.name) for f in fields(self) if f.name != "problems"}
        shown["executions per evaluation"] = f"{self.executions / max(1, self.evaluations):.3f}"
        shown["problems"] = len(self.problems)
        return "\n".join(f"{name}: {value}" for name, value in shown.items())


class Checks:
    """A look at what a round has left.

    Args:
        folder: Where it was.
        mark: The one of its processes.
        count: Evaluations.
        copies: All there were, ended by now.
        figures: Where what was found is added.
    """

    def __init__(self, folder: Path, mark: str, count: int, copies: list[Copy], figures: Figures) -> None:
        self.folder = folder
        self.db = folder / "runs.db"
        self.mark = mark
        self.figures = figures
        self._count = count
        self._copies = copies

    def run(self) -> None:
        problems = self.figures.problems
        for copy in self._copies:
            code, errors = copy.process.returncode, copy.errors.read_text()
            # A worker process may find its parent gone in the middle of an answer, and complain.
            if code != (-signal.SIGKILL if copy.was_killed else 0) or ("Traceback" in errors and not copy.was_killed):
                problems.append(f"copy {copy.process.pid} ended with {code}: {errors}")
        if left := left_behind(self.mark):
            problems.append(f"processes left behind: {left}")
        problems += inconsistencies(self.db, self._count)
        results = {e["name"]: [e["status"], e["result"], e["attempts"]] for e in load_evals(self.db)}
        self.figures.recorded_twice = len(
            rows(self.db, "SELECT 1 FROM attempts WHERE outcome = 'completed' GROUP BY evaluation HAVING count(*) > 1")
        )
        executions = self._executions()
        self._check_results(results, executions)
        self._check_outputs(results)
        self._check_executions(executions)

    def _executions(self) -> dict[int, list[str]]:
        """Return the tokens of the executions by evaluation."""
        executions: dict[int, list[str]] = {}
        for line in (self.folder / "executions").read_text().splitlines():
            number, _pid, _time, token = line.split()
            executions.setdefault(int(number), []).append(token)
        self.figures.executions = sum(len(tokens) for tokens in executions.values())
        return executions

    def _check_results(self, results: dict[str, list[Any]], executions: dict[int, list[str]]) -> None:
        for number in range(self._count):
            status, result, _ = results.get(str(number), [None, None, None])
            right = {"number": number, "square": number**2}
            if status != "completed" or not isinstance(result, dict):
                self.figures.lost += 1
                self.figures.problems.append(f"evaluation {number} is {status}")
            elif result | right != result or result["token"] not in executions.get(number, ()):
                self.figures.problems.append(f"evaluation {number} has a result that no execution brought: {result}")
        if len(results) != self._count:
            self.figures.problems.append(f"{len(results)} evaluations are stored instead of {self._count}")

    def _check_outputs(self, results: dict[str, list[Any]]) -> None:
        """See that what was given to a copy is there as it was given."""
        for copy in self._copies:
            seen: Counter[str] = Counter()
            for line in copy.output.read_text().splitlines(keepends=True):
                if not line.endswith("\n"):
                    continue  # killed in the middle of it
                name, *rest = json.loads(line)
                seen[name] += 1
                if results.get(name) != rest:
                    self.figures.lost += 1
                    self.figures.problems.append(f"evaluation {name} was seen as {rest} and is {results.get(name)}")
            self.figures.seen += seen.total()
            if seen and max(seen.values()) > 1:
                self.figures.problems.append(f"copy {copy.process.pid} was given an evaluation twice: {seen.most_common(3)}")
            if not copy.was_killed and len(seen) != self._count:
                self.figures.problems.append(f"copy {copy.process.pid} was given {len(seen)} evaluations")

    def _check_executions(self, executions: dict[int, list[str]]) -> None:
        """See that only what was in flight when its copy was killed or stopped was executed again."""
        # Released by a worker that lives means never begun; except in one that could not reach the database in time.
        may_release_running = self.figures.stops_with_the_lock > 0
        sql = f"""
        SELECT s.id - 1, s.released, s.suspect, count(a.seq) FROM {STATES} AS s
        LEFT JOIN attempts AS a ON a.evaluation = s.id AND a.outcome = 'lost' GROUP BY s.id
        """
        for number, released, not_charged, lost in rows(self.db, sql):
            again = released if may_release_running else not_charged
            self.figures.attempts_lost += lost
            self.figures.not_charged += not_charged
            times = len(executions.get(number, ()))
            if not 1 <= times <= 1 + lost + again:
                self.figures.problems.append(
                    f"evaluation {number} was executed {times} times: {lost} attempts lost, {not_charged} not charged, "
                    f"{released} released"
                )
        # What is charged when a worker dies is what it ran, never more than it may run at once.
        by_pid = {copy.process.pid: copy for copy in self._copies}
        sql = """
        SELECT w.pid, count(*) FROM attempts AS a JOIN workers AS w ON w.id = a.worker WHERE a.outcome = 'lost' GROUP BY w.id
        """
        for pid, lost in rows(self.db, sql):
            copy = by_pid[pid]
            if lost > copy.concurrency:
                self.figures.problems.append(f"{lost} attempts of {pid} were lost, and it ran {copy.concurrency} at once")
            if not (copy.was_killed or copy.was_stopped or self.figures.stops_with_the_lock):
                self.figures.problems.append(f"copy {pid} was neither killed nor stopped, and {lost} of its attempts were lost")


def inconsistencies(db: Path, count: int) -> list[str]:
    """Return what is wrong with a database in which everything has been completed, as plain SQL sees it."""
    found = []
    expected = {
        "the file is damaged": ("PRAGMA integrity_check", [("ok",)]),
        "a row points to nothing": ("PRAGMA foreign_key_check", []),
        "the number of evaluations is wrong": ("SELECT count(*), min(id), max(id) FROM evaluations", [(count, 1, count)]),
        "a name is out of order": ("SELECT id, name FROM evaluations WHERE name IS NOT id - 1 LIMIT 5", []),
        "an evaluation has no state": (f"SELECT id FROM {STATES} WHERE status IS NULL LIMIT 5", []),
        "the number of states is wrong": (HOMES, [(count,)]),
        "a state is not that of a completed evaluation": (
            f"SELECT * FROM {STATES} WHERE status <> 2 OR worker IS NOT NULL OR suspect NOT IN (0, 1) OR forgiven <> 0 LIMIT 5",
            [],
        ),
        "a worker holds something": (
            """
            SELECT first FROM claimed UNION ALL SELECT id FROM running UNION ALL SELECT id FROM queue UNION ALL
            SELECT first FROM fresh LIMIT 5
            """,
            [],
        ),
        "a state does not point to its last attempt, completed": (
            f"""
            SELECT s.* FROM {STATES} AS s LEFT JOIN attempts AS a
            ON a.seq = s.last AND a.evaluation = s.id AND a.attempt = s.attempt AND a.outcome = 'completed'
            WHERE a.seq IS NULL OR a.result IS NULL LIMIT 5
            """,
            [],
        ),
        "an evaluation has not exactly one completed attempt": (
            f"""
            SELECT s.id, count(a.seq) FROM {STATES} AS s LEFT JOIN attempts AS a
            ON a.evaluation = s.id AND a.outcome = 'completed' GROUP BY s.id HAVING count(a.seq) <> 1 LIMIT 5
            """,
            [],
        ),
        "an attempt is neither recorded nor released": (
            f"""
            SELECT s.id, s.attempt, s.released, count(a.seq) FROM {STATES} AS s LEFT JOIN attempts AS a ON a.evaluation = s.id
            GROUP BY s.id HAVING s.attempt <> s.released + count(a.seq) LIMIT 5
            """,
            [],
        ),
        "an attempt is recorded twice": (
            "SELECT evaluation, attempt FROM attempts GROUP BY evaluation, attempt HAVING count(*) > 1 LIMIT 5",
            [],
        ),
        "an attempt ended otherwise than completed or lost": (
            "SELECT * FROM attempts WHERE outcome NOT IN ('completed', 'lost') LIMIT 5",
            [],
        ),
    }
    for what, (sql, right) in expected.items():
        try:
            brought: Any = rows(db, sql)
        except sqlite3.Error as error:
            brought = error
        if brought != right:
            found.append(f"{what}: {brought}")
    return found
