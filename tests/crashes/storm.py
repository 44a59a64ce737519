"""Copies at work on one database, and somebody who kills and stops them at random moments."""

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
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from .checks import Checks, Figures
from .processes import FINISH_WITHIN, MARK, end_marked
from .victims import COPY


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
        executors: tuple[str, ...] = ("coroutine", "thread", "process", "pool"),
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
            self.check()
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
            options: dict[str, Any] = {
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

    def check(self) -> None:
        """Compare what is left with what it has to be; what is wrong is among the figures' problems then."""
        Checks(self.folder, self.mark, self._count, self._copies, self.figures).run()


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
