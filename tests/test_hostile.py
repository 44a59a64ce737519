"""Malicious files: opening one gives data or an error that names it, within seconds, and executes no code from it.

``SPEVAL_HOSTILE=N`` tries N random files more.
"""

import hashlib
import os
import resource
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from speval import SpevalError, aio, load_evals, retry, speval
from speval.cli.commands import speval as command
from speval.cli.watch import picture
from speval.errors import DatabaseError
from speval.options import checked_database
from speval.spaces.eager import Space
from speval.stores import make_control, make_store
from speval.stores.sqlite import contents as sqlite_contents

from .conftest import WAIT
from .hostile.files import DAMAGED, ENDLESS, ODD, REFUSED, flipped

FLIPS = 12 + int(os.environ.get("SPEVAL_HOSTILE", "0"))


def one(args):
    if args == 3:
        raise ValueError("no 3")
    return {"loss": args, "curve": [1, 2]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A database of ours with some of everything, in one file."""
    db = tmp_path_factory.mktemp("whole") / "whole.db"
    speval(one, {**{str(n): n for n in range(30)}, "a name": 5}, db, max_attempts=1, progress=False)
    retry(db, ["7", "8"], status="completed")
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")
    return db


@pytest.fixture
def fresh(whole, tmp_path) -> Callable[..., Path]:
    """Return what creates a malicious file, alone in a new folder."""
    made = []

    def make(change) -> Path:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        db = folder / "evil.db"
        shutil.copy(whole, db)
        change(db)
        made.append(db)
        return db

    return make


def call(*arguments: object) -> None:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert all(line.isprintable() for line in result.output.replace("\t", " ").splitlines())


def watch(db: Path) -> None:
    """Draw one picture of those that the subcommand draws until it is ended."""
    with make_control(checked_database(str(db)), "read") as control:
        picture(str(db), control.overview(failures=5, runs=20), 100, 40)


LOOKS: dict[str, Callable[[Path], object]] = {
    "load_evals": load_evals,
    "status": partial(call, "status"),
    "ls": partial(call, "ls", "--json"),
    "show": lambda db: call("show", db, "5"),
    "best": lambda db: call("best", db, "loss", "--min"),
    "export": partial(call, "export"),
    "doctor": partial(call, "doctor"),
    "watch": watch,
    "copy": lambda db: call("copy", db, db.with_name(f"copy of {db.stem}-{len(list(db.parent.iterdir()))}.db")),
}
CHANGES: dict[str, Callable[[Path], object]] = {
    "set": lambda db: call("set", db, "concurrency", 2),
    "unset": lambda db: call("unset", db, "concurrency"),
    "pause": partial(call, "pause"),
    "resume": partial(call, "resume"),
    "retry": partial(retry, status="failed"),
    "drop": lambda db: call("drop", db, "4", "--yes"),
    "drop all failed": lambda db: call("drop", db, "--status", "failed", "--yes"),
    "speval": lambda db: speval(one, range(30), db, wait=False, max_attempts=1, progress=False, on_changed="keep"),
}
ALL = LOOKS | CHANGES


def used(db: Path, does: Callable[[Path], object]) -> DatabaseError | None:
    """Use a file, and return the error that it was refused with."""
    try:
        does(db)
    except SpevalError as error:
        return error if isinstance(error, DatabaseError) else None
    return None


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_a_file_with_other_objects_than_our_tables_is_refused_before_it_is_read(fresh, change):
    db = fresh(change)
    before = hashlib.sha256(db.read_bytes()).digest()
    for name, does in ALL.items():
        if name != "doctor":
            error = used(db, does)
            assert error is not None, name
            assert error.db.endswith("evil.db"), name
    used(db, ALL["doctor"])
    assert hashlib.sha256(db.read_bytes()).digest() == before


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_any_content_of_our_tables_is_shown_or_refused_by_name(fresh, change):
    db = fresh(change)
    for does in ALL.values():
        used(db, does)


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_used_or_refused_by_name(fresh, change):
    looked_at = fresh(change)
    for does in LOOKS.values():
        used(looked_at, does)
    changed = fresh(change)
    for does in CHANGES.values():
        used(changed, does)


@pytest.mark.parametrize("seed", range(FLIPS))
def test_a_file_with_flipped_bits_is_used_or_refused_by_name(fresh, seed):
    db = fresh(partial(flipped, seed, 1 + seed % 20))
    for does in ALL.values():
        used(db, does)


@pytest.mark.parametrize("change", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize("name", ["status", "load_evals", "retry", "speval"])
def test_a_file_that_takes_forever_to_read_raises_an_error(fresh, change, name):
    used(fresh(change), ALL[name])


def test_endless_reading_raises_an_error(fresh):
    with pytest.raises(DatabaseError, match=r"evil\.db: reading takes longer than any file of this size"):
        watch(fresh(ENDLESS["b-tree of evaluations without end"]))


def test_ctrl_c_ends_a_running_statement(fresh):
    db = fresh(ENDLESS["b-tree of evaluations without end"])
    script = f"""
        import sys
        from pathlib import Path
        from speval.stores.sqlite import contents as sqlite_contents
        from speval.stores.sqlite.file import SqliteFile

        sqlite_contents._LEAST = 10**15  # as long as it takes for the signal to come
        file = SqliteFile(Path({str(db)!r}), "read")
        print("reading", flush=True)
        file.read(lambda c: c.execute("SELECT total(length(args)) FROM evaluations").fetchall())
    """
    lines = "\n".join(line.removeprefix(" " * 8) for line in script.splitlines())
    with subprocess.Popen([sys.executable, "-c", lines], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "reading\n"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=WAIT)
        finally:
            process.kill()
    assert "KeyboardInterrupt" in errors


async def test_a_large_space_may_be_stored_in_a_small_file(tmp_path, monkeypatch):
    """What a space needs is allowed besides what its file allows."""
    db = tmp_path / "runs.db"
    await aio.speval(str, range(2), db, progress=False)
    monkeypatch.setattr("speval.stores.sqlite.contents._LEAST", 100_000)
    space = Space()
    list(space.fill(range(30_000)))
    store = make_store(checked_database(str(db)), "write")
    await store.open()
    try:
        assert (await store.seed(space, "error")).new == 29_998
    finally:
        await store.close()
        space.close()


def test_a_kept_error_object_does_not_lock_the_file(fresh):
    db = fresh(ODD["results that are too deep"])
    kept = [used(db, LOOKS[name]) for name in ("ls", "show", "load_evals")]
    assert any(kept)
    with closing(sqlite3.connect(db, timeout=0)) as connection:
        connection.execute("BEGIN EXCLUSIVE")


async def test_extra_tables_of_users_are_allowed(tmp_path):
    db = tmp_path / "runs.db"
    await aio.speval(str, range(3), db)
    with closing(sqlite3.connect(db)) as connection:
        connection.executescript("CREATE TABLE notes (note); CREATE INDEX by_evaluation ON attempts (evaluation); ANALYZE;")
    assert (await aio.speval(str, range(5), db)).recorded == 2


def deep(db: Path, pages: int) -> None:
    """Make a table, one that no look reads, a tree as deep as there are pages: SQLite goes down it on its stack."""
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.executescript("PRAGMA page_size = 512; VACUUM")
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_sequence'").fetchone()
    content = db.read_bytes()
    whole, count = bytearray(content), len(content) // 512
    for below in [count + 1, *range(count + 2, count + pages + 1)]:
        page = struct.pack(">BHHHBI", 5, 0, 0, 512, 0, below).ljust(512, b"\0")
        if below == count + 1:
            whole[(root - 1) * 512 : root * 512] = page
        else:
            whole += page
    whole += content[(root - 1) * 512 : root * 512]
    whole[28:32] = struct.pack(">I", len(whole) // 512)
    db.write_bytes(whole)


def test_a_file_that_sqlite_itself_crashes_on_does_not_crash_the_doctor(fresh):
    db = fresh(partial(deep, pages=12_000))
    small = partial(resource.setrlimit, resource.RLIMIT_STACK, (2**20, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    arguments = [sys.executable, "-m", "speval", "doctor", str(db)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=WAIT, preexec_fn=small)
    assert (done.returncode, done.stderr) == (1, "")
    assert "SQLite crashes while it checks the file (SIGSEGV)" in done.stdout


def test_the_doctor_executes_no_code_of_other_tables(fresh):
    def change(db):
        with closing(sqlite3.connect(db, isolation_level=None)) as connection:
            connection.execute("CREATE TABLE strange (a, b AS (a), CHECK (length(hex(zeroblob(a * 1000))) > 0))")
            connection.execute("INSERT INTO strange VALUES (1)")
            # What takes longer than any value may be is an error where it is computed.
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute(
                "UPDATE sqlite_master SET sql = replace(sql, 'a * 1000', 'a * 2000000000') WHERE name = 'strange'"
            )

    db = fresh(change)
    with make_control(checked_database(str(db)), "read") as control:
        health = control.check()
    assert health.facts["integrity"] == "ok"
    with closing(sqlite3.connect(db)) as connection, pytest.raises(sqlite3.DataError, match="too big"):
        connection.execute("PRAGMA integrity_check").fetchall()


async def test_all_data_of_a_deleted_open_file_is_saved(tmp_path, monkeypatch):
    """Its size can't be asked for by its name any more, and what allows so many instructions is the size."""
    monkeypatch.setattr(sqlite_contents, "_LEAST", 1000)
    monkeypatch.setattr(sqlite_contents, "_LONG_STEP", 100)
    db = tmp_path / "runs.db"

    async def function(args):
        if args == 3000:
            for path in tmp_path.glob("runs.db*"):
                path.unlink()
        return args

    with pytest.raises(DatabaseError, match=r"was deleted while in use; all recorded data is in .*rescued"):
        await aio.speval(function, range(5000), db)
    assert len(load_evals(f"{db}.rescued", status="completed")) > 1000


async def test_a_reader_reads_values_larger_than_the_file_was_at_opening(tmp_path):
    db = tmp_path / "runs.db"
    await aio.speval(str, range(3), db)
    with make_control(db) as control:
        await aio.speval(lambda n: "x" * 3_000_000 if n == 3 else n, range(4), db, executor="thread")
        *_, last = control.evaluations()
        assert len(last["result"]) == 3_000_000
