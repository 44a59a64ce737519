"""Copies of a script, killed and stopped at random or at a chosen commit, and a close look at what is left.

Owns the scripts that the copies run, the driver that ends them, and the checks. Invariant: the checks believe only what was
written outside of speval, a log with one line for each execution and what each copy has printed, and compare the database,
read as anybody can, with that. Nothing in speval knows of it: kills at a chosen commit come from a script that wraps methods.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from random import Random
from typing import Any

from speval import load_evals, speval

MARK = "SPEVAL_TESTS_MARK"  # in the environment of every process of a round, so that those left behind are found
FINISH_WITHIN = 90.0  # seconds the copies may take to complete everything once nobody kills them any more

# One copy. What it has been given goes to its output line by line; each execution of its function to a log that all share.
COPY = """
import asyncio, json, os, secrets, sys, time
from speval import as_completed

options = json.loads(sys.argv[1])
count = options.pop("count")
log = os.path.abspath("executions")
lengths = [0.001, 0.003, 0.01, 0.02, 0.05, 0.15, 0.3]

def begun(number):
    token = secrets.token_hex(8)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.write(file, f"{number} {os.getpid()} {time.time()} {token}\\n".encode())
    os.close(file)
    return {"number": number, "square": number**2, "token": token}

def blocking(args):
    result = begun(args["number"])
    time.sleep(args["seconds"])
    return result

async def waiting(args):
    result = begun(args["number"])
    await asyncio.sleep(args["seconds"])
    return result

function = waiting if options["executor"] == "coroutine" else blocking
space = [{"number": n, "seconds": lengths[n * 31 % 97 % 7]} for n in range(count)]
for e in as_completed(function, space, "runs.db", max_attempts=100_000, progress=False, **options):
    print(json.dumps([e["name"], e["status"], e["result"], e["attempts"]]), flush=True)
"""

# Forks a child for each kill, since an interpreter that has imported everything already is soon at its first commit.
POINTS = """
import functools, itertools, json, logging, os, shutil, signal, sqlite3, sys, threading
from speval import speval
from speval.stores.sqlite_file import SqliteFile

scenario = json.loads(sys.argv[1])
logging.disable(logging.WARNING)

def arm(kind, point, side):
    seen = {"write": itertools.count(1), "close": itertools.count(1)}
    about = threading.local()

    def step(label, call):
        now = "close" if label == "close" else "write"
        here = next(seen[now]) == point and now == kind
        if here:
            os.write(1, (json.dumps({"label": label}) + "\\n").encode())
        if here and side == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = call()
        if here and side == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def method(name, original):
        return lambda self, *args: step(name, functools.partial(original, self, *args))

    for name in ("_create", "_journal_mode"):
        setattr(SqliteFile, name, method(name, getattr(SqliteFile, name)))

    class Connection(sqlite3.Connection):
        def close(self):
            step("close", super().close)

    sqlite3.connect = functools.partial(sqlite3.connect, factory=Connection)

    transaction, patiently = SqliteFile._transaction, SqliteFile._patiently

    def labelled(self, begin, patience, work, *args, **kwargs):
        about.label = f"commit of {work.__name__.strip('_<>')}" if begin != "BEGIN" else None
        return transaction(self, begin, patience, work, *args, **kwargs)

    def counted(self, patience, statement):
        call = functools.partial(patiently, self, patience, statement)
        return step(about.label, call) if statement == "COMMIT" and about.label else call()

    SqliteFile._transaction, SqliteFile._patiently = labelled, counted

def note(db, args):
    file = os.open(f"{db}.executions", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.write(file, f"{args}\\n".encode())
    os.close(file)
    return {"number": args, "square": args**2}

def run(db):
    async def waiting(args):
        return note(db, args)

    options = scenario["options"]
    function = waiting if options["executor"] == "coroutine" else functools.partial(note, db)
    speval(function, range(scenario["count"]), db, max_attempts=100_000, progress=False, **options)

def kill_at(kind, point):
    db = f"{scenario['side']}-{kind}-{point}.db"
    for suffix in ("", "-wal"):
        if scenario["begin_with"] and os.path.exists(scenario["begin_with"] + suffix):
            shutil.copy(scenario["begin_with"] + suffix, db + suffix)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            arm(kind, point, scenario["side"])
            run(db)
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"db": db, "point": point, "code": code}), flush=True)
    return code

if scenario["points"]:
    for point in scenario["points"]:
        kill_at("write", point)
else:
    for kind in ("write", "close"):
        ended = 0  # by itself; how many commits a run has differs a little from run to run
        for point in itertools.count(1):
            ended = ended + 1 if kill_at(kind, point) != -signal.SIGKILL else 0
            if ended == 2:
                break
"""


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


def rows(db: Path, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Return what a query brings, with nothing of speval."""
    with closing(sqlite3.connect(db, timeout=30)) as connection:
        return connection.execute(sql, parameters).fetchall()


def marked(mark: str) -> list[int]:
    """Return the processes that are alive of those started with the mark, and of those that they have started."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in environment.read_bytes():  # that of a dead one is empty
                found.append(int(environment.parent.name))
        except OSError:
            continue  # it has just ended, or is somebody else's
    return found


def left_behind(mark: str) -> list[int]:
    """Return the marked processes that don't end by themselves, though all that they worked for have ended."""
    deadline = time.monotonic() + 10
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def end_marked(mark: str) -> None:
    """End what is left of the marked processes."""
    for pid in marked(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# Kills and stops at random moments


@dataclass
class Copy:
    """One process of the script, and where its output goes."""

    process: subprocess.Popen[bytes]
    concurrency: int
    lease: float
    output: Path
    errors: Path
    stopped_until: float | None = None
    was_stopped: bool = False
    has_the_lock: bool = False
    was_killed: bool = False

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None


class Round:
    """Copies at work on one database, and somebody who kills them.

    Args:
        folder: An empty one, for the database and all else.
        random: Decides everything that is left to chance.
        count: Evaluations.
        copies: How many are to be alive, beside stopped ones.
        executors: What a copy may run its function with.
        stops: The share of stops among kills and stops.
    """

    def __init__(
        self,
        folder: Path,
        random: Random,
        *,
        count: int = 600,
        copies: int = 4,
        executors: tuple[str, ...] = ("coroutine", "thread", "process"),
        stops: float = 0.3,
    ) -> None:
        self.folder = folder
        self.db = folder / "runs.db"
        self.mark = secrets.token_hex(8)
        self.figures = Figures(rounds=1, evaluations=count)
        self._random = random
        self._count = count
        self._wanted = copies
        self._executors = executors
        self._stops = stops
        self._copies: list[Copy] = []
        (folder / "at_work.py").write_text(COPY)

    def run(self, times: int) -> Figures:
        """Kill and stop copies so many times, or until all is done; let the others finish, and check everything."""
        try:
            self._fill_up()
            while self.figures.kills + self.figures.stops < times and not self._is_over():
                time.sleep(min(1.0, self._random.expovariate(6.0)))
                self._continue(time.monotonic())
                self._disturb()
                self._fill_up()
            self._finish()
            self._check()
            return self.figures
        finally:
            self.close()

    def close(self) -> None:
        """End every process of the round."""
        for copy in self._copies:
            if copy.is_alive:
                copy.process.kill()
            copy.process.wait()
        end_marked(self.mark)

    def _fill_up(self) -> None:
        while sum(copy.is_alive and copy.stopped_until is None for copy in self._copies) < self._wanted:
            if self._is_over():
                return
            number = len(self._copies)
            options = {
                "count": self._count,
                "executor": self._random.choice(self._executors),
                "concurrency": self._random.randint(1, 8),
                "lease": round(self._random.uniform(1.0, 2.0), 2),
            }
            output, errors = self.folder / f"{number}.out", self.folder / f"{number}.err"
            with output.open("wb") as out, errors.open("wb") as err:
                process = subprocess.Popen(
                    [sys.executable, "at_work.py", json.dumps(options)],
                    cwd=self.folder,
                    env=os.environ | {MARK: self.mark},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                )
            self._copies.append(Copy(process, options["concurrency"], options["lease"], output, errors))

    def _is_over(self) -> bool:
        """Tell whether a copy has ended by itself: nothing is left to do then, or something went wrong."""
        return any(not copy.is_alive and not copy.was_killed for copy in self._copies)

    def _disturb(self) -> None:
        alive = [copy for copy in self._copies if copy.is_alive]
        # As long as one is stopped that has the write lock, there is nothing to disturb but itself.
        if frozen := [copy for copy in alive if copy.has_the_lock]:
            alive = frozen if self._random.random() < 0.1 else []
        if not alive:
            return
        # Most of the stopped ones live on, to try and record what others have been given meanwhile.
        running = [copy for copy in alive if copy.stopped_until is None]
        victim = self._random.choice(alive if self._random.random() < 0.1 or not running else running)
        if victim.stopped_until is None and self._random.random() < self._stops:
            self._stop(victim)
            return
        # Now and then all at once: the next start finds nobody to ask.
        for copy in alive if self._random.random() < 0.05 else [victim]:
            copy.was_killed = True
            copy.process.kill()
            copy.process.wait()
            self.figures.kills += 1

    def _stop(self, victim: Copy) -> None:
        victim.process.send_signal(signal.SIGSTOP)
        victim.was_stopped = True
        victim.stopped_until = time.monotonic() + victim.lease * self._random.uniform(1.1, 1.6)
        self.figures.stops += 1
        victim.has_the_lock = self._is_locked()
        self.figures.stops_with_the_lock += victim.has_the_lock

    def _is_locked(self) -> bool:
        """Tell whether nobody gets the write lock just now, because the stopped one has it."""
        if not self.db.exists():
            return False
        try:
            with closing(sqlite3.connect(self.db, timeout=0.3, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
        except sqlite3.OperationalError:
            return True
        return False

    def _continue(self, now: float) -> None:
        for copy in self._copies:
            if copy.stopped_until is not None and copy.stopped_until <= now and copy.is_alive:
                copy.process.send_signal(signal.SIGCONT)
                copy.stopped_until, copy.has_the_lock = None, False

    def _finish(self) -> None:
        deadline = time.monotonic() + FINISH_WITHIN
        while any(copy.is_alive for copy in self._copies):
            now = time.monotonic()
            self._continue(now)
            if now > deadline:
                self.figures.problems.append(f"copies did not end within {FINISH_WITHIN} s")
                return
            self._fill_up()  # the last ones may all have been killed
            time.sleep(0.02)
        if not self._is_over():
            self._fill_up()
            self._finish()

    # What is left

    def _check(self) -> None:
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
        sql = """
        SELECT s.id - 1, s.released, s.ahead = 2, count(a.seq) FROM states AS s
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
        "an evaluation has no state": ("SELECT id FROM evaluations WHERE id NOT IN (SELECT id FROM states) LIMIT 5", []),
        "the number of states is wrong": ("SELECT count(*) FROM states", [(count,)]),
        "a state is not that of a completed evaluation": (
            "SELECT * FROM states WHERE status <> 2 OR worker IS NOT NULL OR ahead NOT IN (0, 1, 2) OR forgiven <> 0 LIMIT 5",
            [],
        ),
        "a state does not point to its last attempt, completed": (
            """
            SELECT s.* FROM states AS s LEFT JOIN attempts AS a
            ON a.seq = s.last AND a.evaluation = s.id AND a.attempt = s.attempt AND a.outcome = 'completed'
            WHERE a.seq IS NULL OR a.result IS NULL LIMIT 5
            """,
            [],
        ),
        "an evaluation has not exactly one completed attempt": (
            """
            SELECT s.id, count(a.seq) FROM states AS s LEFT JOIN attempts AS a
            ON a.evaluation = s.id AND a.outcome = 'completed' GROUP BY s.id HAVING count(a.seq) <> 1 LIMIT 5
            """,
            [],
        ),
        "an attempt is neither recorded nor released": (
            """
            SELECT s.id, s.attempt, s.released, count(a.seq) FROM states AS s LEFT JOIN attempts AS a ON a.evaluation = s.id
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


def storm(folder: Path, *, times: int, seed: int, per_round: int = 40, **options: Any) -> Iterator[Figures]:
    """Yield the figures of round after round, until copies have been killed or stopped so many times."""
    random = Random(seed)
    done = number = 0
    while done < times:
        number += 1
        one = folder / f"round {number}"
        one.mkdir()
        figures = Round(one, random, **options).run(min(per_round, times - done))
        done += figures.kills + figures.stops
        if not figures.problems:
            shutil.rmtree(one)
        yield figures


# Kills before and after a chosen commit


@dataclass
class Scenario:
    """What is done in the copy that is killed.

    Attributes:
        count: Evaluations.
        options: Those of the call.
        begin_with: A database to begin with, copied for each kill.
        points: Kill at these steps only; None: at each, until the run ends by itself.
    """

    count: int
    options: dict[str, Any] = field(default_factory=lambda: {"executor": "coroutine", "concurrency": 4, "lease": 1.0})
    begin_with: Path | None = None
    points: list[int] | None = None


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
