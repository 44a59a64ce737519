"""What the tests share: databases, scripts run as users run them, and a look at what is left behind."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from speval.clock import Clock

from .postgres_server import Server

pytest.register_assert_rewrite("tests.model")  # its asserts are those of a test

WAIT = 60.0  # seconds a condition may take on a busy machine before a test fails


def wait_for(condition: Callable[[], Any], what: str = "", within: float = WAIT) -> Any:
    """Return the condition's value as soon as it is true."""
    deadline = time.monotonic() + within
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s: {what or condition}")
        time.sleep(0.01)


def rows(db: Path, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Return what a query brings, as anybody with the sqlite3 shell would see it."""
    connection = sqlite3.connect(f"file:{db}?mode=ro", uri=True, timeout=10)
    try:
        return connection.execute(sql, parameters).fetchall()
    finally:
        connection.close()


class MovableClock(Clock):
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.wall_now = 1_700_000_000.0
        self.slept = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.wall_now

    def boottime(self) -> float:
        return self.now + self.slept


class Scripts:
    """Runs scripts in interpreters of their own, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []

    def write(self, code: str, name: str = "script.py") -> Path:
        path = self.folder / name
        path.write_text(textwrap.dedent(code))
        return path

    def start(self, script: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        # -X dev would change timing; warnings as errors are what pytest itself runs with.
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options
        process = subprocess.Popen([sys.executable, str(script), *arguments], cwd=self.folder, text=True, **options)
        self.processes.append(process)
        return process

    def run(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(self.write(code), *arguments)
        out, err = process.communicate(timeout=WAIT)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.communicate()


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server for all tests that want one; each takes an eval space of its own there."""
    server = Server()
    try:
        server.start()
        yield server
    finally:
        server.close()


_spaces = itertools.count(1)


@pytest.fixture
def space() -> str:
    """The name of an eval space that no other test has."""
    return f"test_{os.getpid()}_{next(_spaces)}"


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, db: Path, clock: MovableClock) -> Iterator[Any]:
    """A database of each kind, whose time is moved by the test."""
    from .databases import PostgresPlace, ServerClock, SqlitePlace

    if request.param == "sqlite":
        yield SqlitePlace(db, clock)
        return
    place = PostgresPlace(request.getfixturevalue("postgres"), request.getfixturevalue("space"), ServerClock())
    yield place
    place.close()


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    scripts = Scripts(tmp_path)
    try:
        yield scripts
    finally:
        scripts.close()


def our_threads() -> set[threading.Thread]:
    """Return the threads of speval that are alive."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("speval")}


def open_files() -> list[str]:
    """Return what this process has open, on Linux."""
    names = []
    for link in Path("/proc/self/fd").iterdir() if sys.platform == "linux" else ():
        with suppress(FileNotFoundError):  # the one that lists them
            names.append(str(link.readlink()))
    return names


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a thread of speval or an open file of a database."""
    before = our_threads()
    yield
    if "leaves_threads" in request.keywords:
        return
    wait_for(lambda: not (our_threads() - before), "all threads to end", within=10)
    assert not [name for name in open_files() if ".db" in name]
