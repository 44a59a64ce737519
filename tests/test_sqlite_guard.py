"""What is looked at before SQLite has a file: its names, what lies beside it, who forked whom, SQLite itself."""

import asyncio
import os
import sqlite3
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from speval import aio
from speval.errors import DatabaseError, ForeignDatabaseError, NewerSchemaError
from speval.stores import make_control
from speval.stores.sqlite.file import SqliteFile
from speval.stores.sqlite.mount import filesystem, is_mount_point
from speval.stores.sqlite.schema import SCHEMA
from speval.stores.sqlite.states import STATES

from .conftest import WAIT, Scripts, rows


def double(args):
    return args * 2


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


async def refused(db: Path, match: str) -> None:
    """See that a file is refused to those who write and to those who read, and left as it is."""
    before = contents(db.parent)
    for call in (aio.speval(double, [1, 2, 3], db), aio.load_evals(db), aio.retry(db)):
        with pytest.raises(DatabaseError, match=match):
            await call
    for mode in ("read", "write"):
        with pytest.raises(DatabaseError, match=match):
            make_control(db, mode)
    assert contents(db.parent) == before


# One file, one name


async def test_a_file_with_a_second_name_is_refused_by_either_before_anything_is_written(db):
    await aio.speval(double, [1, 2], db)
    other = db.with_name("other.db")
    os.link(db, other)
    for name in (db, other):
        await refused(name, rf"{name.name}: the file has 2 names \(hard links\).*remove the others")
    other.unlink()
    assert (await aio.speval(double, [1, 2], db)).completed == 2


async def test_a_second_name_given_under_a_run_is_told_and_lets_no_copy_in(db, caplog):
    other = db.with_name("other.db")

    async def function(args):
        if args == 60:
            os.link(db, other)
        if args == 120:
            await refused_quietly(other)
        return args

    async def refused_quietly(name):
        with pytest.raises(DatabaseError, match="has 2 names"):
            await aio.load_evals(name)

    assert (await aio.speval(function, range(200), db, concurrency=1)).completed == 200
    assert caplog.text.count("has a second name (a hard link)") == 1
    assert rows(other, "PRAGMA integrity_check") == [("ok",)]


@pytest.fixture
def mounted(tmp_path):
    """Mounts one thing at another, as long as the test runs."""
    places = []

    def mount(*arguments: str | Path) -> None:
        if sys.platform != "linux" or os.geteuid() != 0:
            pytest.skip("may not mount")
        if subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode:
            pytest.skip("may not mount")
        places.append(arguments[-1])

    yield mount
    for place in reversed(places):
        subprocess.run(["umount", "-l", str(place)], check=True)


async def test_a_file_that_is_mounted_by_itself_is_refused(db, mounted):
    await aio.speval(double, [1, 2], db)
    inside = db.parent / "a container's"
    inside.mkdir()
    (inside / "runs.db").touch()
    mounted("--bind", db, inside / "runs.db")
    assert is_mount_point(inside / "runs.db")
    await refused(inside / "runs.db", r"runs\.db: the file is mounted without its folder.*mount its folder instead of the file")
    assert (await aio.speval(double, [1, 2, 3], db)).completed == 3


async def test_a_folder_that_is_mounted_is_as_good_as_any(db, mounted):
    await aio.speval(double, [1, 2], db)
    inside = db.parent / "inside"
    inside.mkdir()
    mounted("--bind", db.parent, inside)
    assert (await aio.speval(double, [1, 2, 3], inside / "runs.db")).recorded == 1


async def test_behind_a_symbolic_link_the_loss_of_the_wal_is_noticed_all_the_same(tmp_path):
    real, link = tmp_path / "real" / "y.db", tmp_path / "link.db"
    await aio.speval(double, [1], real)
    link.symlink_to("real/y.db")

    async def function(args):
        if args == 60:
            code = "import os, sys; os.unlink(sys.argv[1])"
            subprocess.run([sys.executable, "-c", code, f"{real}-wal"], check=True)
        return args

    with pytest.raises(DatabaseError, match=r"real/y\.db: has lost its -wal file.* is in .*real/y\.db\.rescued"):
        await aio.speval(function, range(1, 5000), link, on_changed="keep")
    assert len(await aio.load_evals(f"{real}.rescued", status="completed")) >= 50


async def test_a_run_goes_on_in_its_file_when_the_link_to_its_folder_leads_elsewhere(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    link = tmp_path / "current"
    link.symlink_to("one")

    async def function(args):
        if args == 60:
            (tmp_path / "next").symlink_to("other")
            (tmp_path / "next").replace(link)
        return args

    assert (await aio.speval(function, range(200), link / "runs.db")).completed == 200
    assert list((tmp_path / "other").iterdir()) == []


# What lies beside it


def journal_naming(victim: Path, pages: int) -> bytes:
    """Return a journal that changes no page and names a super-journal, as SQLite would write it."""
    magic, name = bytes.fromhex("d9d505f920a163d7"), os.fsencode(victim)
    head = magic + struct.pack(">IIIII", 0, 0x1234, pages, 512, 4096)
    name_at_end = struct.pack(">I", 0x40000000 // 4096 + 1) + name + struct.pack(">II", len(name), sum(name)) + magic
    return head.ljust(512, b"\0") + name_at_end


async def test_a_journal_that_makes_sqlite_delete_another_file_is_refused(db):
    await aio.speval(double, [1, 2], db)
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("PRAGMA journal_mode = delete")
    victim = db.with_name("thesis.tex")
    victim.write_text("my only copy")
    journal = Path(f"{db}-journal")
    journal.write_bytes(journal_naming(victim, db.stat().st_size // 4096))
    await refused(db, r"runs\.db: .*runs\.db-journal names another file, which SQLite would delete")
    assert victim.read_text() == "my only copy"


async def test_a_journal_that_is_put_beside_a_run_with_rollback_journals_is_refused_too(db, monkeypatch):
    monkeypatch.setattr("speval.stores.sqlite.file.filesystem", lambda path: "nfs4")
    victim = db.with_name("thesis.tex")
    victim.write_text("my only copy")
    file = SqliteFile(db, "create")
    try:
        Path(f"{db}-journal").write_bytes(journal_naming(victim, db.stat().st_size // 4096))
        for use in (file.read, file.write):
            with pytest.raises(DatabaseError, match="names another file"):
                use(lambda c: c.execute("SELECT * FROM meta").fetchall())
    finally:
        file.close()
    assert victim.exists()


async def test_a_journal_or_wal_of_a_stranger_is_refused_unless_he_may_write_to_the_database_anyway(db):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    await aio.speval(double, [1, 2], db)
    for suffix in ("-journal", "-wal"):
        stranger = Path(f"{db}{suffix}")
        stranger.write_bytes(bytes(1000))
        os.chown(stranger, 65534, 65534)
        await refused(db, rf"runs\.db{suffix} belongs to another user \(nobody\)")
        stranger.unlink()
    journal = Path(f"{db}-journal")
    for mode, owner in ((0o666, 0), (0o600, 65534)):
        journal.write_bytes(bytes(1000))  # SQLite sees nothing in it to roll back
        os.chown(journal, 65534, 65534)
        db.chmod(mode)
        os.chown(db, owner, owner)
        assert len(await aio.load_evals(db)) == 2


@pytest.mark.parametrize("suffix", ["-journal", "-wal", "-shm"])
@pytest.mark.parametrize("kind", ["symbolic link", "dangling link", "hard link", "pipe", "folder"])
async def test_what_lies_beside_a_database_must_lead_nowhere_else(db, suffix, kind):
    await aio.speval(double, [1, 2], db)
    victim, beside = db.with_name("victim"), Path(f"{db}{suffix}")
    victim.write_bytes(b"")
    if kind == "symbolic link":
        beside.symlink_to(victim)
    elif kind == "dangling link":
        beside.symlink_to(db.with_name("to be made"))
    elif kind == "hard link":
        os.link(victim, beside)
    elif kind == "pipe":
        os.mkfifo(beside)  # to open it would wait for ever
    else:
        beside.mkdir()
    expected = {"hard link": "has other names", "pipe": "is not an ordinary file", "folder": "is not an ordinary file"}
    match = rf"runs\.db: .*runs\.db{suffix} {expected.get(kind, 'is a symbolic link')}"
    if kind != "pipe":
        await refused(db, match)
    else:
        with pytest.raises(DatabaseError, match=match):
            await aio.load_evals(db)
    assert not db.with_name("to be made").exists()


async def test_a_pipe_or_a_device_is_not_a_database(tmp_path):
    os.mkfifo(tmp_path / "pipe.db")
    for path in (tmp_path / "pipe.db", Path(os.devnull)):
        for call in (aio.speval(double, [1], path), aio.load_evals(path)):
            with pytest.raises(ForeignDatabaseError, match="a device, a pipe or a socket"):
                await asyncio.wait_for(call, WAIT)


# The filesystem


async def test_a_filesystem_that_is_not_known_to_be_local_is_treated_as_shared(db, monkeypatch, caplog):
    monkeypatch.setattr("speval.stores.sqlite.file.filesystem", lambda path: "fakeowner")
    assert (await aio.speval(double, [1, 2], db)).completed == 2
    assert rows(db, "PRAGMA journal_mode") == [("delete",)]
    assert caplog.text.count("is on a network filesystem (fakeowner), or on what may be one") == 1


async def test_where_others_use_the_write_ahead_log_a_copy_that_must_not_says_so_and_does_not_wait_for_ever(db, monkeypatch):
    other = SqliteFile(db, "create")
    try:
        monkeypatch.setattr("speval.stores.sqlite.file.filesystem", lambda path: "fakeowner")
        monkeypatch.setattr("speval.stores.sqlite.file._PATIENCE", 0.05)
        with pytest.raises(
            DatabaseError, match="other workers use its write-ahead log, which loses data on fakeowner; stop them first"
        ):
            await aio.speval(double, [1], db)
    finally:
        other.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the mount table")
def test_the_filesystem_is_told_by_the_mount_that_a_file_is_in(tmp_path, mounted):
    inside = tmp_path / "in side"
    inside.mkdir()
    mounted("-t", "tmpfs", "tmpfs", inside)
    (inside / "runs.db").touch()
    assert filesystem(inside / "runs.db") == "tmpfs"
    assert not is_mount_point(inside / "runs.db")
    assert filesystem(Path("/proc/self/status")) == "proc"


# SQLite and the schema

OLD = """
import sqlite3, sys
import speval
if sys.argv[1] == "version":
    sqlite3.sqlite_version, sqlite3.sqlite_version_info = "3.34.1", (3, 34, 1)
elif sys.argv[1] == "threads":
    sqlite3.threadsafety = 0
else:
    connect = sqlite3.connect
    def without_json(name, **options):
        connection = connect(name, **options)
        connection.set_authorizer(lambda action, one, *more: 1 if "json_each" in (one, *more) else 0)
        return connection
    sqlite3.connect = without_json
for call in (lambda: speval.speval(abs, [1], "runs.db"), lambda: speval.load_evals("runs.db")):
    try:
        print(call())
    except speval.DatabaseError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("lacks", "told"),
    [
        ("version", "its SQLite is 3.34.1, and speval needs 3.35 or later; use a Python that includes a newer one"),
        ("threads", "was built without threads; use a Python"),
        ("json", "was built without JSON functions; use a Python"),
    ],
)
def test_a_sqlite_that_is_too_old_or_lacks_something_is_told_before_a_file_is_made(scripts: Scripts, lacks, told):
    out = scripts.run(OLD, lacks)
    assert out.stdout.count(told) == 2, out
    assert not (scripts.folder / "runs.db").exists()


async def test_a_run_ends_when_a_newer_release_has_changed_the_file_under_it(db):
    async def function(args):
        if args == 60:
            with closing(sqlite3.connect(db, timeout=WAIT)) as connection:
                connection.execute("UPDATE meta SET value = '7.5' WHERE key = 'release'")
                connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
                connection.commit()
        return args

    with pytest.raises(NewerSchemaError, match=r"pip install 'speval>=7\.5'"):
        await aio.speval(function, range(2000), db)
    (completed,) = rows(db, f"SELECT count(*) FROM {STATES} WHERE status = 2")[0]
    assert 50 <= completed < 2000
    assert rows(db, "SELECT count(*) FROM attempts") == [(completed,)]


async def test_who_only_reads_notices_a_newer_release_too(db):
    await aio.speval(double, [1], db)
    file = SqliteFile(db, "write")
    try:
        with closing(sqlite3.connect(db)) as connection:
            connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
        with pytest.raises(NewerSchemaError):
            file.read(lambda c: None)
    finally:
        file.close()


# Forks

FORKED = """
import os, sys, traceback
from pathlib import Path
from speval import load_evals, speval
from speval.stores import make_control

def told(call):
    try:
        print("in the fork:", call(), flush=True)
    except Exception as error:
        print("in the fork:", type(error).__name__, error, flush=True)

speval(abs, range(3), "runs.db", executor="thread")
control = make_control(Path("runs.db").absolute())
if os.fork() == 0:
    told(lambda: control.overview())
    told(lambda: load_evals("runs.db"))
    told(lambda: speval(abs, range(5), "runs.db", executor="thread"))
    told(lambda: speval(abs, range(2), "other.db", executor="thread").completed)
    control.close()
    os._exit(0)
os.wait()
print(control.overview().completed, flush=True)
control.close()
if os.fork() == 0:
    told(lambda: len(load_evals("runs.db")))
    os._exit(0)
os.wait()
"""


def test_a_fork_of_a_process_that_has_a_database_open_gets_a_clear_error_and_does_no_harm(scripts: Scripts):
    done = scripts.run(FORKED)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "runs.db: process " in lines[0]
    assert all("DatabaseError runs.db: the file was open in process" in line for line in lines[1:3]), lines
    assert all("'spawn'" in line for line in lines[:3])
    assert lines[3:] == ["in the fork: 2", "3", "in the fork: 3"]


def test_a_fork_made_within_a_call_can_not_use_it_and_the_call_goes_on(scripts: Scripts):
    code = """
    import os
    from speval import load_evals, speval

    def function(args):
        if os.fork() == 0:
            try:
                load_evals("runs.db")
            except Exception as error:
                os.write(1, f"{type(error).__name__}\\n".encode())
            os._exit(0)
        os.wait()
        return args

    print(speval(function, range(5), "runs.db", executor="thread").completed)
    """
    done = scripts.run(code)
    assert done.stdout.splitlines() == ["DatabaseError"] * 5 + ["5"], done.stderr


# Waiting


async def test_a_copy_that_starts_waits_for_a_lock_as_long_as_one_that_runs_and_says_so(db, monkeypatch, caplog):
    await aio.speval(double, [1], db)
    monkeypatch.setattr("speval.stores.sqlite.file._PATIENCE", 0.01)
    monkeypatch.setattr("speval.stores.sqlite.file._SILENCE", 0.1)
    with closing(sqlite3.connect(db, isolation_level=None)) as blocker:
        blocker.execute("PRAGMA locking_mode = EXCLUSIVE")
        blocker.execute("BEGIN EXCLUSIVE")
        running = asyncio.create_task(aio.speval(double, [1, 2], db))
        while "waiting for a lock of another program; find it with `fuser" not in caplog.text:
            assert not running.done()
            await asyncio.sleep(0.01)
        blocker.execute("ROLLBACK")
    assert (await running).completed == 2
    assert caplog.text.count("waiting for a lock of another program") == 1


async def test_a_copy_that_waits_for_a_lock_at_its_start_can_be_cancelled(db, monkeypatch, caplog):
    await aio.speval(double, [1], db)
    monkeypatch.setattr("speval.stores.sqlite.file._SILENCE", 0.01)
    with closing(sqlite3.connect(db, isolation_level=None)) as blocker:
        blocker.execute("BEGIN IMMEDIATE")
        running = asyncio.create_task(aio.speval(double, [1, 2], db))
        while "waiting for a lock" not in caplog.text:
            assert not running.done()
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait({running}, timeout=WAIT)
        assert running.cancelled()
