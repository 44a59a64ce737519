"""What the tests share: databases, scripts run as users run them, and a look at what is left behind."""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pyte
import pytest

from speval.clock import Clock
from speval.stores.sqlite.checksum import of_attempt, of_evaluation
from speval.url import PostgresUrl

from .postgres_server import Server

pytest.register_assert_rewrite("tests.model")  # its asserts are those of a test

# A commit waits for the disk. No test cuts the power, so memory serves as well where the system offers enough of it.
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4e9:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # where tmp_path is
    tempfile.tempdir = str(MEMORY)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run more workers than there are cores: many tests wait for a lease, a backoff or a process."""
    given = os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS")
    return int(given) if given else 2 * (psutil.cpu_count() or 1)


REQUIRED = frozenset(filter(None, os.environ.get("SPEVAL_REQUIRE", "").split(",")))  # packages whose tests must not be skipped


def needs(package: str, is_there: bool, reason: str) -> pytest.MarkDecorator:
    """Skip a test for want of a package, but not where ``SPEVAL_REQUIRE`` names it: there it fails."""
    return pytest.mark.skipif(not is_there and package not in REQUIRED, reason=reason)


WAIT = 60.0  # seconds a condition may take on a busy machine before a test fails


def wait_for(condition: Callable[..., Any], what: str = "", within: float = WAIT) -> Any:
    """Return the condition's value as soon as it is true."""
    deadline = time.monotonic() + within
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s: {what or condition}")
        time.sleep(0.01)


def rows(db: Path | str, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Return what a query brings, as anybody with the sqlite3 shell, or psql, would see it."""
    if isinstance(db, str):
        with psycopg.connect(server_url(db)) as server:
            server.execute(f"SET search_path = {PostgresUrl.parse(db).schema}")
            return server.execute(sql.replace("?", "%s"), parameters or None).fetchall()
    connection = sqlite3.connect(f"file:{db}?mode=ro", uri=True, timeout=10)
    try:
        return connection.execute(sql, parameters).fetchall()
    finally:
        connection.close()


def server_url(url: str) -> str:
    """Return a URL without what only speval knows."""
    return url.partition("?namespace=")[0]


def exists(db: Path | str) -> bool:
    """Tell whether a database has been made, as far as its tables."""
    try:
        return bool(rows(db, "SELECT count(*) FROM workers"))
    except (sqlite3.Error, psycopg.Error):
        return False


def content(db: Path | str) -> object:
    """Return all that is in a database."""
    if isinstance(db, Path):
        return db.read_bytes()
    tables = ("meta", "evaluations", "queue", "running", "attempts", "workers", "spaces", "unlisted")
    return {table: rows(db, f"SELECT * FROM {table} ORDER BY 1") for table in tables}


def signed(db: Path) -> None:
    """Give all rows the checksums of what stands in them, as anybody can who has read how they are made."""
    with closing(sqlite3.connect(db, timeout=10)) as connection, connection:
        for id, name, args in connection.execute("SELECT id, name, args FROM evaluations").fetchall():
            connection.execute("UPDATE evaluations SET crc = ? WHERE id = ?", (of_evaluation(id, name, args), id))
        for row in connection.execute("SELECT * FROM attempts").fetchall():
            connection.execute("UPDATE attempts SET crc = ? WHERE seq = ?", (of_attempt(row[:12]), row[0]))


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
        self.database = "runs.db"  # what "runs.db" in a script stands for
        self.processes: list[subprocess.Popen[str]] = []

    def write(self, code: str, name: str = "script.py") -> Path:
        path = self.folder / name
        path.write_text(textwrap.dedent(code).replace('"runs.db"', repr(self.database)))
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


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="speval-test-", dir="/var/tmp"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server for all tests that want one; each test uses another namespace."""
    server = Server()
    try:
        server.start()
        yield server
    finally:
        server.close()


_namespaces = itertools.count(1)


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test uses."""
    return f"test_{os.getpid()}_{next(_namespaces)}"


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


@pytest.fixture(params=["sqlite", "postgres"])
def anywhere(request: pytest.FixtureRequest, db: Path) -> Path | str:
    """A database of each kind, as a user names it."""
    if request.param == "sqlite":
        return db
    return str(request.getfixturevalue("postgres").url(namespace=request.getfixturevalue("namespace")))


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, db: Path, clock: MovableClock) -> Iterator[Any]:
    """A database of each kind, whose time is moved by the test."""
    from .databases import PostgresPlace, ServerClock, SqlitePlace

    if request.param == "sqlite":
        yield SqlitePlace(db, clock)
        return
    place = PostgresPlace(request.getfixturevalue("postgres"), request.getfixturevalue("namespace"), ServerClock())
    yield place
    place.close()


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # what a shell starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes that tests start and interrupt inherit it


# Begins a script that becomes another user, who may not be able to read what it would import later.
IMPORT_ALL = """
import importlib, pkgutil
import encodings.idna, stringprep
import speval
for module in pkgutil.walk_packages(speval.__path__, "speval."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


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


class Terminal:
    """A program in a real terminal of its own, and what a person sees there."""

    def __init__(self, command: list[str], folder: Path, *, columns: int = 100, lines: int = 30) -> None:
        self.screen = pyte.HistoryScreen(columns, lines, history=10_000)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._master = master
        self._read = threading.Thread(target=self._follow, name="terminal", daemon=True)
        # TERM is what pyte understands; a terminal inherited from whoever runs the tests would be another one.
        own = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PYTHONUNBUFFERED", "PYTHONIOENCODING")
        env = {k: v for k, v in os.environ.items() if k not in own}
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=env | {"TERM": "xterm-256color"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._read.start()

    def _follow(self) -> None:
        with suppress(OSError):  # the other end is closed
            while data := os.read(self._master, 65536):
                self.raw += data
                self._stream.feed(data)

    def text(self) -> str:
        """Return what is on the screen and what has scrolled out of it."""
        above = ["".join(line[x].data for x in range(self.screen.columns)).rstrip() for line in list(self.screen.history.top)]
        return "\n".join([*above, *(line.rstrip() for line in list(self.screen.display))])

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Return where a pattern is on the screen, as soon as it is there."""
        found: re.Match[str] = wait_for(lambda: re.search(pattern, self.text()), f"{pattern!r} in\n{self.text()}")
        return found

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def end(self) -> int:
        """Return the exit code, when the program has ended and all it wrote is on the screen."""
        code = self.process.wait(WAIT)
        self._read.join(WAIT)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._read.join(5)
        os.close(self._master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*command: str, **options: Any) -> Terminal:
        opened.append(Terminal(list(command), tmp_path, **options))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()
