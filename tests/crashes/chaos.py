"""Copies at work on one database of either kind, and all that can end a process: KILL, STOP, INT once and twice, TERM.

Owns what is done to the copies and the look at what is left. Invariant: only what was written outside of speval is believed;
nothing depends on how a store keeps its rows, so the same rounds run on SQLite and on PostgreSQL.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from speval import DatabaseLockedError, DatabaseMissingError, load_evals

from ..conftest import rows
from .processes import MARK, end_marked, left_behind
from .victims import COPY

__all__ = ["Chaos", "Ways"]

END_WITHIN = 120.0  # seconds a copy may take to end by itself, or after a signal that it obeys
EXECUTORS = ("coroutine", "thread", "process")
# How often each way is taken. TERM ends a copy at once or in good order; either is right.
WAYS = {"kill": 4, "stop": 3, "interrupt": 4, "interrupt twice": 3, "terminate": 3, "kill all": 1}
RIGHT_CODES = {
    "kill": {-signal.SIGKILL},
    "interrupt": {-signal.SIGINT, 130, 0},  # 0: it had all but ended
    # 1: threads that are left behind go on, and code that they execute makes CPython forget why the program ends.
    "interrupt twice": {-signal.SIGINT, 130, 0, 1},
    "terminate": {-signal.SIGTERM, 128 + signal.SIGTERM, 0},
}
# Python itself dies of an interrupt while it starts, and shows one that arrives within an import as ignored: what we promise
# begins when all is imported.
BEGUN = """
open(f"begun.{os.getpid()}", "w").close()
"""
# What no copy may ever say, however it ends.
WRONG_WORDS = ("UnboundLocalError", "Event loop is closed", "never retrieved", "Fatal Python error")


@dataclass
class Victim:
    """One process of the script, where its output goes, and how it was ended."""

    process: subprocess.Popen[bytes]
    executor: str
    lease: float
    output: Path
    errors: Path
    way: str | None = None
    signalled_at: float = 0.0
    stopped_until: float | None = None
    was_stopped: bool = False


@dataclass
class Ways:
    """What was done, what came of it, and what is wrong."""

    rounds: int = 0
    done: Counter[str] = field(default_factory=Counter)
    evaluations: int = 0
    executions: int = 0
    seen: int = 0
    longest_end: float = 0.0  # seconds from an interrupt to the end of the copy
    problems: list[str] = field(default_factory=list)

    def __iadd__(self, other: Ways) -> Ways:
        self.rounds += other.rounds
        self.done += other.done
        self.evaluations += other.evaluations
        self.executions += other.executions
        self.seen += other.seen
        self.longest_end = max(self.longest_end, other.longest_end)
        self.problems += other.problems
        return self

    def __str__(self) -> str:
        done = ", ".join(f"{count} {way}" for way, count in self.done.most_common())
        return (
            f"{self.rounds} rounds: {done}; {self.evaluations} evaluations, {self.executions} executions "
            f"({self.executions / max(1, self.evaluations):.3f} each), {self.seen} results seen by copies, "
            f"longest end after an interrupt {self.longest_end:.2f} s, {len(self.problems)} problems"
        )


class Chaos:
    """One round: one database, copies at work on it, and what is done to them.

    Args:
        folder: An empty one, for all that is written.
        random: Decides everything that is left to chance.
        db: The database: a file in the folder, or a URL.
        count: Evaluations.
        copies: How many are to be alive, beside stopped ones.
    """

    def __init__(self, folder: Path, random: Random, db: Path | str, *, count: int = 400, copies: int = 4) -> None:
        self.folder = folder
        self.db = db
        self.ways = Ways(rounds=1, evaluations=count)
        self._mark = secrets.token_hex(8)
        self._random = random
        self._count = count
        self._wanted = copies
        self._victims: list[Victim] = []
        script = COPY.replace('"runs.db"', repr(str(db)))
        (folder / "at_work.py").write_text(script.replace("options = json", f"{BEGUN}options = json", 1))

    def run(self, times: int) -> Ways:
        """Signal copies so many times, or until all is done; let the others finish, and check everything."""
        try:
            self._fill_up()
            while self.ways.done.total() < times and not self._is_over():
                time.sleep(min(1.0, self._random.expovariate(6.0)))
                self._look_after()
                self._disturb()
                self._fill_up()
            self._finish()
            self._check()
            return self.ways
        finally:
            for victim in self._victims:
                if victim.process.poll() is None:
                    victim.process.kill()
                victim.process.wait()
            end_marked(self._mark)

    # What is done

    def _fill_up(self) -> None:
        while sum(v.process.poll() is None and not v.way and v.stopped_until is None for v in self._victims) < self._wanted:
            if self._is_over():
                return
            self._start()

    def _start(self) -> None:
        number = len(self._victims)
        executor, lease = self._random.choice(EXECUTORS), round(self._random.uniform(1.5, 3.0), 2)
        options = {"count": self._count, "executor": executor, "concurrency": self._random.randint(1, 6), "lease": lease}
        output, errors = self.folder / f"{number}.out", self.folder / f"{number}.err"
        with output.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "at_work.py", json.dumps(options)],
                cwd=self.folder,
                env=os.environ | {MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        self._victims.append(Victim(process, executor, lease, output, errors))

    def _is_over(self) -> bool:
        """Tell whether a copy has ended by itself: nothing is left to do then, or something went wrong."""
        return any(v.process.poll() is not None and v.way is None for v in self._victims)

    def _disturb(self) -> None:
        running = [v for v in self._victims if v.process.poll() is None and v.way is None and v.stopped_until is None]
        running = [v for v in running if (self.folder / f"begun.{v.process.pid}").exists()]
        if not running:
            return
        victim = self._random.choice(running)
        way = self._random.choices(list(WAYS), list(WAYS.values()))[0]
        self.ways.done[way] += 1
        if way == "stop":
            victim.process.send_signal(signal.SIGSTOP)
            victim.was_stopped = True
            victim.stopped_until = time.monotonic() + victim.lease * self._random.uniform(0.3, 1.6)
            return
        for one in running if way == "kill all" else [victim]:
            one.way = "kill" if way == "kill all" else way
            one.signalled_at = time.monotonic()
            if one.way == "kill":
                one.process.kill()
            elif one.way == "terminate":
                one.process.terminate()
            else:
                one.process.send_signal(signal.SIGINT)
                if one.way == "interrupt twice":
                    time.sleep(self._random.choice([0.0, 0.001, 0.01, 0.05, 0.2]))
                    one.process.send_signal(signal.SIGINT)

    def _look_after(self) -> None:
        """Let stopped ones go on, and notice how long the others take to end."""
        now = time.monotonic()
        for victim in self._victims:
            if victim.stopped_until is not None and victim.stopped_until <= now:
                victim.process.send_signal(signal.SIGCONT)
                victim.stopped_until = None
            if victim.way is None or victim.signalled_at == 0.0:
                continue
            took = now - victim.signalled_at
            if victim.process.poll() is not None:
                victim.signalled_at = 0.0
                if victim.way.startswith("interrupt"):
                    self.ways.longest_end = max(self.ways.longest_end, took)
                if victim.way == "interrupt":
                    self._check_given_back(victim)
            elif took > END_WITHIN:
                victim.signalled_at = 0.0
                self.ways.problems.append(f"{victim.process.pid} ({victim.executor}) hangs after {victim.way}")
                victim.way = "kill"
                victim.process.kill()

    def _finish(self) -> None:
        deadline = time.monotonic() + END_WITHIN
        while any(v.process.poll() is None for v in self._victims) or not self._is_over():
            self._look_after()
            self._fill_up()  # the last ones may all have been ended
            if time.monotonic() > deadline:
                alive = [f"{v.process.pid} {v.executor} {v.way}" for v in self._victims if v.process.poll() is None]
                self.ways.problems.append(f"copies did not end within {END_WITHIN:g} s: {alive}")
                return
            time.sleep(0.02)

    # What is left

    def _check(self) -> None:
        problems = self.ways.problems
        for victim in self._victims:
            self._check_end(victim)
        if left := left_behind(self._mark):
            problems.append(f"processes left behind: {left}")
        if side_files := sorted(path.name for path in self.folder.glob("*unrecorded*.jsonl")):
            problems.append(f"results that no start has taken in: {side_files}")
        executions = self._executions()
        results = {e["name"]: [e["status"], e["result"], e["attempts"]] for e in load_evals(self.db)}
        if len(results) != self._count:
            problems.append(f"{len(results)} evaluations are stored instead of {self._count}")
        for number in range(self._count):
            status, result, _ = results.get(str(number), [None, None, None])
            if status != "completed":
                problems.append(f"evaluation {number} is {status}")
            elif (result["number"], result["square"]) != (number, number**2) or result["token"] not in executions[number]:
                problems.append(f"evaluation {number} has a result that no execution brought: {result}")
        twice = "SELECT evaluation FROM attempts WHERE outcome = 'completed' GROUP BY evaluation HAVING count(*) > 1"
        same = "SELECT evaluation, attempt FROM attempts GROUP BY evaluation, attempt HAVING count(*) > 1"
        for what, sql in (("completed twice", twice), ("the same attempt twice", same)):
            if found := rows(self.db, sql):
                problems.append(f"{what}: {found[:5]}")
        self._check_outputs(results)

    def _check_given_back(self, victim: Victim) -> None:
        """See that a copy that was interrupted once holds nothing any more."""
        if any(v.stopped_until is not None for v in self._victims):
            return  # one of them may keep all others waiting, and only we let it go on
        try:
            in_progress = load_evals(self.db, status="in_progress")
        except (DatabaseMissingError, DatabaseLockedError):  # interrupted before it made one; a stopped copy has it alone
            return
        held = [e["name"] for e in in_progress if f":{victim.process.pid}:" in str(e["worker"])]
        if held:
            self.ways.problems.append(f"copy {victim.process.pid} ({victim.executor}) was interrupted and holds {held}")

    def _check_end(self, victim: Victim) -> None:
        code, errors = victim.process.returncode, victim.errors.read_text()
        who = f"copy {victim.process.pid} ({victim.executor}{', stopped before' if victim.was_stopped else ''})"
        if code not in RIGHT_CODES.get(victim.way or "", {0}):
            self.ways.problems.append(f"{who} ended with {code} after {victim.way}: {errors[-3000:]}")
        found = [word for word in WRONG_WORDS if word in errors]
        # A second interrupt may hit what Python itself does at exit.
        found += [part[:200] for part in errors.split("Exception ignored")[1:] if "speval" in part]
        if found:
            self.ways.problems.append(f"{who} says {found} after {victim.way}: {errors[-3000:]}")
        # A traceback is that of KeyboardInterrupt; that of a killed one may be of a worker that has lost its parent.
        if victim.way != "kill" and "Traceback" in errors and "KeyboardInterrupt" not in errors:
            self.ways.problems.append(f"{who} shows a traceback after {victim.way}: {errors[-3000:]}")

    def _executions(self) -> dict[int, set[str]]:
        """Return the tokens of the executions by evaluation."""
        executions: dict[int, set[str]] = {number: set() for number in range(self._count)}
        for line in (self.folder / "executions").read_text().splitlines():
            number, _pid, _time, token = line.split()
            executions[int(number)].add(token)
            self.ways.executions += 1
        return executions

    def _check_outputs(self, results: dict[str, list[object]]) -> None:
        """See that what was given to a copy is there as it was given."""
        for victim in self._victims:
            seen: Counter[str] = Counter()
            for line in victim.output.read_text().splitlines(keepends=True):
                if not line.endswith("\n"):
                    continue  # ended in the middle of it
                name, *rest = json.loads(line)
                seen[name] += 1
                if results.get(name) != rest:
                    self.ways.problems.append(f"evaluation {name} was seen as {rest} and is {results.get(name)}")
            self.ways.seen += seen.total()
            if seen and max(seen.values()) > 1:
                self.ways.problems.append(f"copy {victim.process.pid} was given one twice: {seen.most_common(3)}")
            if victim.way is None and len(seen) != self._count:
                self.ways.problems.append(f"copy {victim.process.pid} was given {len(seen)} evaluations")
