"""What may happen to the file, the disk and the clock under a run: a clear error, or it goes on when the cause is gone."""

import asyncio
import os
import re
import sqlite3
import stat
import subprocess
import sys
from collections import Counter
from contextlib import aclosing, closing, suppress
from itertools import cycle
from pathlib import Path

import pytest

from speval import aio
from speval.clock import Clock
from speval.errors import DatabaseError, DatabaseUnavailableError
from speval.stores.sqlite.store import SqliteStore

from .conftest import WAIT, rows


def elsewhere(code: str, *arguments: object) -> None:
    """Do something to a file from another process: to open and close it in this one would drop its locks."""
    subprocess.run([sys.executable, "-c", f"import os, sys; {code}", *map(str, arguments)], check=True)


LOOKED_INTO = "import sqlite3; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM evals').fetchall(); c.close()"
MAINTAINED = "import sqlite3; c = sqlite3.connect(sys.argv[1], timeout=60); c.execute('VACUUM'); c.execute({}); c.close()"
DELETED = "os.unlink(sys.argv[1])"
REPLACED = "open(sys.argv[1] + '.new', 'wb').close(); os.replace(sys.argv[1] + '.new', sys.argv[1])"


@pytest.mark.parametrize("how", [DELETED, REPLACED], ids=["deleted", "replaced"])
async def test_a_wal_file_that_is_deleted_or_replaced_under_a_run_ends_it_and_all_that_was_reported_is_kept(db, how):
    seen = {}

    async def function(args):
        if args == 60:
            elsewhere(how, f"{db}-wal")
        return args

    with pytest.raises(DatabaseError, match=r"has lost its -wal file.* all recorded data is in .*rescued: rename it"):
        async with aclosing(aio.as_completed(function, range(5000), db, lease=1.0)) as evaluations:
            async for e in evaluations:
                seen[e["name"]] = e["result"]
    rescued = Path(f"{db}.rescued")
    assert stat.S_IMODE(rescued.stat().st_mode) == 0o600
    stored = {e["name"]: e["result"] for e in await aio.load_evals(rescued, status="completed")}
    assert len(stored) >= 50
    assert seen.items() <= stored.items()
    rescued.rename(again := db.with_name("again.db"))
    called = []
    summary = await aio.speval(lambda args: called.append(args), range(5000), again, executor="thread")
    assert (summary.completed, len(called)) == (5000, 5000 - len(stored))


async def test_a_plain_copy_made_in_this_process_drops_its_locks_and_what_comes_of_it_is_noticed(db):
    """As ``shutil.copy`` makes it: the next one that closes the database, in any program, takes itself for the last one.

    Newer releases of SQLite ask for a lock on the ``-shm`` too before they delete the ``-wal``: nothing comes of it there.
    """
    seen, was_deleted = set(), []
    log = Path(f"{db}-wal")

    async def function(args):
        if args == 60:
            before = log.stat().st_ino
            db.read_bytes()
            elsewhere(LOOKED_INTO, db)
            was_deleted.append(not log.exists() or log.stat().st_ino != before)
        return args

    async def run():
        async with aclosing(aio.as_completed(function, range(5000), db)) as evaluations:
            async for e in evaluations:
                seen.add(e["name"])

    ended = None
    try:
        await run()
    except DatabaseError as error:
        ended = str(error)
    if ended is not None:
        assert was_deleted == [True]
        assert re.search(r"has lost its -wal file.* all recorded data is in .*rescued: rename it", ended)
        assert seen <= {e["name"] for e in await aio.load_evals(f"{db}.rescued", status="completed")}
    else:
        assert was_deleted == [False]
        assert len(seen) == 5000
        assert seen == {e["name"] for e in await aio.load_evals(db, status="completed")}


@pytest.mark.parametrize("pragma", ["wal_checkpoint(TRUNCATE)", "optimize", "journal_mode = delete"])
async def test_a_look_a_vacuum_or_a_checkpoint_from_elsewhere_is_no_fault(db, pragma):
    async def function(args):
        if args == 60:
            elsewhere(LOOKED_INTO, db)
            with suppress(subprocess.CalledProcessError):  # the journal mode is refused
                elsewhere(MAINTAINED.format(repr(f"PRAGMA {pragma}")), db)
        return args

    assert (await aio.speval(function, range(500), db)).completed == 500
    assert rows(db, "PRAGMA journal_mode") == [("wal",)]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (DELETED, "was deleted while in use"),
        (REPLACED, "was replaced by another file while in use"),
        ("os.truncate(sys.argv[1], 0)", "was emptied while in use"),
    ],
    ids=["deleted", "replaced", "emptied"],
)
async def test_who_only_waits_notices_what_becomes_of_the_file_too(db, code, message):
    started = asyncio.Event()

    async def function(args):
        started.set()
        await asyncio.sleep(600)

    running = asyncio.create_task(aio.speval(function, [1], db))  # nothing to write for a third of 30 s
    await started.wait()
    elsewhere(code, db)
    with pytest.raises(DatabaseError, match=message):
        await asyncio.wait_for(running, WAIT)


@pytest.mark.parametrize("table", ["workers", "running"])
async def test_a_database_that_breaks_for_good_ends_a_run_that_has_nothing_to_write(db, table):
    """Only the lease's thread meets the damage: the run would wait for its evaluation, or for others, for ever."""
    started = asyncio.Event()

    async def function(args):
        started.set()
        await asyncio.sleep(600)

    running = asyncio.create_task(aio.speval(function, [1], db, lease=1.0))
    await started.wait()
    with closing(sqlite3.connect(db, timeout=30)) as connection:
        connection.execute(f"ALTER TABLE {table} RENAME TO something_else")
    with pytest.raises(DatabaseError, match=r"runs\.db: "):
        await asyncio.wait_for(running, WAIT)


async def test_a_database_that_becomes_read_only_ends_the_run_and_keeps_what_was_recorded(db, monkeypatch):
    stores, seen = [], set()
    original = SqliteStore.register

    async def register(self, lease):
        stores.append(self)
        return await original(self, lease)

    monkeypatch.setattr(SqliteStore, "register", register)

    async def function(args):
        if args == 100:
            connection, file = stores[0]._opened()
            # A disk that goes read-only, as far as SQLite is concerned.
            await connection.run(lambda: file.connection.execute("PRAGMA query_only = ON"))
        return args

    with pytest.raises(DatabaseError, match=r"runs\.db: can't be written to"):
        async with aclosing(aio.as_completed(function, range(500), db, lease=1.0)) as evaluations:
            async for e in evaluations:
                seen.add(e["name"])
    assert seen <= {e["name"] for e in await aio.load_evals(db, status="completed")}
    monkeypatch.undo()
    assert (await aio.speval(str, range(500), db, executor="thread")).completed == 500


DAMAGE = """
import os, random, sys
path, how, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
random.seed(seed)
size = os.path.getsize(path)
fd = os.open(path, os.O_RDWR)
if how == "cut":
    os.ftruncate(fd, random.randrange(size))
for _ in range({"cut": 0, "bytes": 100, "pages": 5}[how]):
    os.pwrite(fd, random.randbytes(1 if how == "bytes" else 4096), random.randrange(size))
"""


@pytest.mark.parametrize("how", ["bytes", "pages", "cut"])
@pytest.mark.parametrize("suffix", ["", "-wal"])
async def test_whatever_is_overwritten_or_cut_off_under_a_run_it_ends_and_what_comes_after_is_named(db, suffix, how):
    seeds = cycle(range(100))

    async def function(args):
        if args % 100 == 60:
            elsewhere(DAMAGE, f"{db}{suffix}", how, next(seeds))
        return "x" * 3000

    async def used(call):
        try:
            await asyncio.wait_for(call, WAIT)
        except DatabaseError as error:
            assert str(error).startswith(str(db))  # noqa: PT017
            assert str(error).isprintable()  # noqa: PT017

    await used(aio.speval(function, range(300), db, concurrency=5, lease=1.0))
    await used(aio.load_evals(db))
    await used(aio.speval(str, range(300), db, executor="thread", lease=1.0))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own; a function makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)

    if sys.platform != "linux" or os.geteuid() != 0 or mount("size=1m").returncode:
        pytest.skip("may not mount a disk")
    try:
        yield folder, lambda size: mount(f"remount,size={size}")
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


async def test_on_a_disk_that_is_full_results_wait_for_room_and_none_is_lost(small_disk, caplog):
    folder, resize = small_disk
    db, calls, seen = folder / "runs.db", [], Counter()

    async def function(args):
        calls.append(args)
        return "x" * 20_000

    async def run():
        async with aclosing(aio.as_completed(function, range(300), db, lease=1.0)) as evaluations:
            async for e in evaluations:
                seen[e["name"]] += 1

    running = asyncio.create_task(run())
    while "kept, to be written as soon as possible" not in caplog.text:
        await asyncio.sleep(0.01)
    assert "the disk is full; free some space, no result is lost" in caplog.text
    while "what can be stopped is stopped" not in caplog.text:  # longer than its lease
        await asyncio.sleep(0.01)
    # What was reported is there already, and can be read although nothing can be written.
    assert set(seen) <= {e["name"] for e in await aio.load_evals(db, status="completed")}
    with pytest.raises(DatabaseUnavailableError, match="the disk is full"):
        await aio.speval(function, ["x" * 10_000] * 300, db.with_name("another.db"))
    resize("100m")
    await running
    assert seen == {str(n): 1 for n in range(300)}
    assert sorted(calls) == list(range(300))


async def test_a_start_on_a_full_disk_is_an_error_that_says_so(small_disk):
    folder, resize = small_disk
    with (folder / "fill").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    db = folder / "runs.db"
    with pytest.raises(DatabaseError, match=r"runs\.db: .*disk"):
        await aio.speval(str, range(10), db, executor="thread")
    resize("100m")
    assert (await aio.speval(str, range(10), db, executor="thread")).completed == 10


async def test_a_wall_clock_that_jumps_by_hours_costs_no_attempt_no_duration_and_no_pause(db, monkeypatch):
    wall, jumps = Clock.wall, cycle([0, 7200, -36_000, 1e9, -1e9, 86_400])
    monkeypatch.setattr(Clock, "wall", lambda self: wall(self) + next(jumps))
    calls = []

    async def function(args):
        calls.append(args)
        if calls.count(args) == 1 and args % 10 == 0:
            raise OSError
        await asyncio.sleep(0.01)
        return args

    summaries = await asyncio.gather(
        *(aio.speval(function, range(100), db, concurrency=2, retry_on=OSError, backoff=0.05) for _ in range(2))
    )
    assert {s.completed for s in summaries} == {100}
    assert sum(s.recorded for s in summaries) == 100
    assert sorted(calls) == sorted([*range(100), *range(0, 100, 10)])
    assert all(0 <= e["duration"] < 30 for e in await aio.load_evals(db))
    assert rows(db, "SELECT count(*) FROM attempts WHERE outcome = 'lost'") == [(0,)]
