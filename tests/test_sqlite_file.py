"""The file: recognised before it is touched, made private, migrated in one transaction, refused by name."""

import os
import pwd
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from speval import aio, speval
from speval.errors import (
    DatabaseError,
    DatabaseLockedError,
    DatabaseMissingError,
    EvaluationDamagedError,
    ForeignDatabaseError,
    NewerSchemaError,
    OptionError,
    SpevalError,
)
from speval.stores import make_control
from speval.stores.sqlite.file import SqliteFile
from speval.stores.sqlite.schema import APPLICATION_ID, SCHEMA
from speval.stores.sqlite.states import STATES

from .conftest import IMPORT_ALL, Scripts, rows, signed


def double(args):
    return args * 2


def old_database(path: Path, *, names=("0", "1", "2", "3", "4")) -> None:
    """Make a half finished database as speval 0.1.1 does."""
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE evals (\n    name TEXT, status TEXT, updated INTEGER, result TEXT, args TEXT\n)")
    states = ["completed", "in_progress", "completed", "pending", "pending"]
    for i, (name, status) in enumerate(zip(names, states, strict=True)):
        result = f'{{"v": {i}, "nan": NaN}}' if status == "completed" else None
        connection.execute("INSERT INTO evals VALUES (?,?,?,?,?)", (name, status, 1.5e9 + i, result, f'{{"x": {i}}}'))
    connection.commit()
    connection.close()


def everything(db: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(db.parent.iterdir()) if path.is_file()}


# Databases of speval 0.1.1


async def test_a_half_finished_database_of_0_1_1_goes_on(db):
    old_database(db)
    called = []
    summary = await aio.speval(lambda args: called.append(args["x"]) or {"v": args["x"]}, [{"x": i} for i in range(6)], db)
    assert sorted(called) == [1, 3, 4, 5]
    assert (summary.completed, summary.total) == (6, 6)
    evaluations = await aio.load_evals(db)
    assert [e["name"] for e in evaluations] == ["0", "1", "2", "3", "4", "5"]
    assert [e["result"]["v"] for e in evaluations] == [0, 1, 2, 3, 4, 5]
    assert [e["attempts"] for e in evaluations] == [1, 1, 1, 1, 1, 1]
    assert evaluations[0]["updated"] == 1.5e9


async def test_a_database_of_0_1_1_with_names_of_its_own_goes_on(db):
    names = ("a", "b", "07", "7", "x y")
    old_database(db, names=names)
    summary = await aio.speval(lambda args: args, {name: {"x": i} for i, name in enumerate(names)}, db)
    assert summary.completed == 5
    assert [e["name"] for e in await aio.load_evals(db)] == list(names)


async def test_reading_a_database_of_0_1_1_changes_nothing(db):
    old_database(db)
    before = everything(db)
    evaluations = await aio.load_evals(db)
    assert [e["status"] for e in evaluations] == ["completed", "in_progress", "completed", "pending", "pending"]
    assert evaluations[2]["result"]["v"] == 2
    assert evaluations[1]["args"] == {"x": 1}
    assert len(await aio.load_evals(db, status="pending")) == 2
    assert everything(db) == before


async def test_a_migration_that_fails_changes_nothing(db, monkeypatch):
    old_database(db)
    original = sqlite3.complete_statement
    seen = []

    def break_late(statement):
        seen.append(statement)
        if "DROP TABLE" in statement:
            raise RuntimeError("interrupted")
        return original(statement)

    monkeypatch.setattr("speval.stores.sqlite.file.sqlite3.complete_statement", break_late)
    with pytest.raises(RuntimeError, match="interrupted"):
        await aio.speval(double, [1], db)
    monkeypatch.undo()
    assert len(seen) > 10
    assert rows(db, "SELECT name FROM sqlite_master") == [("evals",)]
    assert len(await aio.load_evals(db)) == 5


async def test_the_classic_query_works(db):
    await aio.speval(double, {"a": 1, "7": [2]}, db)
    assert rows(db, "select name, status, result, args from evals") == [
        ("a", "completed", "2", "1"),
        ("7", "completed", "[2,2]", "[2]"),
    ]
    assert rows(db, "select typeof(name), typeof(updated) from evals") == [("text", "real")] * 2


def test_an_old_copy_that_still_runs_cannot_write_any_more(db):
    old_database(db)
    SqliteFile(db, "write").close()
    # What it has in progress is free for others.
    assert rows(db, f"SELECT status FROM {STATES} ORDER BY id") == [(2,), (0,), (2,), (0,), (0,)]
    connection = sqlite3.connect(db)
    with pytest.raises(sqlite3.OperationalError, match="view"):
        connection.execute("UPDATE evals SET status = 'completed' WHERE name = '1'")
    connection.close()


# What is not ours


def garbage(path):
    path.write_bytes(b"This is a text file, and quite a long one. " * 200)


def short_garbage(path):
    path.write_bytes(b"hello")


def png(path):
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20)


def someone_elses(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT)")
    connection.execute("INSERT INTO customers VALUES (1, 'ours')")
    connection.commit()
    connection.close()


def someone_elses_evals(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE evals (name TEXT, score REAL)")
    connection.commit()
    connection.close()


def someone_elses_beside_evals(path):
    old_database(path)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE notes (text)")
    connection.commit()
    connection.close()


def with_another_application_id(path):
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA application_id = 12345")
    connection.execute("CREATE TABLE t (x)")
    connection.commit()
    connection.close()


FOREIGN = [
    garbage,
    short_garbage,
    png,
    someone_elses,
    someone_elses_evals,
    someone_elses_beside_evals,
    with_another_application_id,
]


@pytest.mark.parametrize("make", FOREIGN)
@pytest.mark.parametrize("call", ["speval", "load_evals", "retry"])
async def test_a_foreign_file_is_refused_and_left_byte_for_byte(db, make, call):
    make(db)
    before = everything(db)
    with pytest.raises(ForeignDatabaseError, match=r"runs\.db: this is not a speval database but"):
        await (aio.speval(double, [1], db) if call == "speval" else getattr(aio, call)(db))
    assert everything(db) == before


async def test_a_newer_schema_is_refused_saying_what_to_install(db):
    await aio.speval(double, [1], db)
    connection = sqlite3.connect(db)
    connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    connection.execute("UPDATE meta SET value = '7.5' WHERE key = 'release'")
    connection.commit()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    before = everything(db)
    for call in (aio.speval(double, [1], db), aio.load_evals(db), aio.retry(db)):
        with pytest.raises(NewerSchemaError, match=r"pip install 'speval>=7\.5'"):
            await call
    assert everything(db) == before


# Names and folders


@pytest.mark.parametrize("name", [":memory:", "", "mysql://user:secret@host/db", "file:runs.db", "a\0b"])
async def test_what_is_no_file_name_is_refused_without_repeating_a_password(name):
    for call in (aio.speval(double, [1], name), aio.load_evals(name), aio.retry(name)):
        with pytest.raises(OptionError, match="db=") as caught:
            await call
        assert "secret" not in str(caught.value)


async def test_reading_or_retrying_a_missing_database_names_it_and_makes_none(tmp_path):
    for call in (aio.load_evals, aio.retry):
        with pytest.raises(DatabaseMissingError, match=r"nowhere\.db"):
            await call(tmp_path / "nowhere.db")
    assert list(tmp_path.iterdir()) == []


async def test_a_file_that_another_copy_is_just_making_reads_as_empty(db):
    db.touch()
    assert await aio.load_evals(db) == []
    assert db.read_bytes() == b""
    with pytest.raises(ForeignDatabaseError, match="an empty file"):
        await aio.retry(db)
    assert (await aio.speval(double, [1], db)).completed == 1


async def test_a_folder_is_refused(tmp_path):
    for call in (aio.speval(double, [1], tmp_path), aio.load_evals(tmp_path)):
        with pytest.raises(DatabaseError, match="is a folder"):
            await call


async def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DatabaseError, match="can't be created in"):
        await aio.speval(double, [1], tmp_path / "file" / "runs.db")


async def test_missing_folders_are_made(tmp_path):
    await aio.speval(double, [1], tmp_path / "a" / "b" / "runs.db")
    assert len(await aio.load_evals(str(tmp_path / "a" / "b" / "runs.db"))) == 1


@pytest.mark.parametrize("name", ["with space.db", "50%.db", "what?.db", "#1.db", "ünï.db", "a&b=c.db", "semi;colon.db"])
async def test_any_file_name_is_taken_as_it_is(tmp_path, name):
    await aio.speval(double, [1], tmp_path / name)
    assert [e["result"] for e in await aio.load_evals(tmp_path / name)] == [2]
    assert {p.name for p in tmp_path.iterdir()} == {name}


async def test_a_database_is_private_whatever_the_umask(db):
    modes = {}

    async def function(args):
        modes.update({path.name: stat.S_IMODE(path.stat().st_mode) for path in db.parent.iterdir()})

    before = os.umask(0)
    try:
        await aio.speval(function, [1], db)
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("runs.db", "runs.db-wal", "runs.db-shm"), 0o600)


def test_the_file_says_whose_it_is(db):
    SqliteFile(db, "create").close()
    assert rows(db, "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert rows(db, "PRAGMA user_version") == [(SCHEMA,)]
    assert rows(db, "PRAGMA journal_mode") == [("wal",)]


UNPRIVILEGED = f"""{IMPORT_ALL}
import os, sys, json
# As root, permissions mean nothing; nobody has them.
if os.geteuid() == 0:
    os.setegid(65534); os.seteuid(65534)
call, db = sys.argv[1:]
try:
    if call == "speval":
        speval.speval(abs, [1], db)
    else:
        print([e["result"] for e in speval.load_evals(db)])
except speval.SpevalError as error:
    print(type(error).__name__, error)
"""


OWNER = pwd.getpwuid(os.geteuid()).pw_name


def test_a_folder_that_cannot_be_written_to_is_named(open_folder, scripts: Scripts):
    open_folder.chmod(0o555)
    done = scripts.run(UNPRIVILEGED, "speval", str(open_folder / "runs.db"))
    fix = f"{open_folder} belongs to {OWNER} and has mode 555; `chmod {'u' if os.geteuid() else 'o'}+w {open_folder}`"
    assert done.stdout.startswith(
        f"DatabaseError {open_folder}/runs.db: can't be created in {open_folder}: Permission denied; {fix}"
    ), done.stderr
    assert list(open_folder.iterdir()) == []


LOOKS = f"""{IMPORT_ALL}
import os, sys
from speval import Database
if os.geteuid() == 0:
    os.setegid(65534); os.seteuid(65534)
with Database(sys.argv[1]) as db:
    for _ in sys.stdin:
        seen, health = db.status(), db.check()
        found = [finding.problem for finding in health.findings if finding.is_error]
        print(seen.completed, seen.settings.concurrency, found, health.facts["writable"], health.facts["journal"], flush=True)
"""


def test_whoever_may_only_read_sees_what_others_record_later_and_is_told_no_error(open_folder):
    db = open_folder / "runs.db"
    speval(double, [1, 2], db, executor="thread", progress=False)
    db.chmod(0o644)
    open_folder.chmod(0o555)
    command = [sys.executable, "-c", LOOKS, str(db)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as reader:

        def look() -> str:
            print(file=reader.stdin)
            return reader.stdout.readline().strip()

        assert look() == "2 None [] False unknown without write permission"
        open_folder.chmod(0o755)
        with closing(sqlite3.connect(db, isolation_level=None)) as writer:
            writer.execute("INSERT INTO meta VALUES ('concurrency', '3')")
            open_folder.chmod(0o555)
            assert look() == "2 3 [] False wal"  # it is in the -wal alone
        open_folder.chmod(0o755)
        speval(double, [1, 2, 3], db, executor="thread", progress=False)
        open_folder.chmod(0o555)
        assert look().startswith("3 3 [] False")
        reader.stdin.close()


def test_who_watches_an_empty_file_sees_what_the_first_copy_makes_of_it(db):
    db.touch()
    with make_control(db) as control:
        assert control.overview().total == 0
        speval(double, [1, 2], db, executor="thread", progress=False)
        assert control.overview().completed == 2
        speval(double, [1, 2, 3], db, executor="thread", progress=False)
        assert control.overview().completed == 3


async def test_a_database_in_a_folder_that_cannot_be_written_to_can_be_read(open_folder, scripts: Scripts):
    await aio.speval(double, [1, 2], open_folder / "runs.db")
    (open_folder / "runs.db").chmod(0o444)
    open_folder.chmod(0o555)
    done = scripts.run(UNPRIVILEGED, "load", str(open_folder / "runs.db"))
    assert done.stdout == "[2, 4]\n", done.stderr
    done = scripts.run(UNPRIVILEGED, "speval", str(open_folder / "runs.db"))
    assert "DatabaseError" in done.stdout
    assert "can't be written to" in done.stdout


async def test_a_damaged_database_is_named(db):
    await aio.speval(double, range(1000), db)
    data = bytearray(db.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    db.write_bytes(data)
    with pytest.raises(DatabaseError, match=r"runs\.db"):
        await aio.load_evals(db)


# Waiting for locks


def test_a_lock_that_stays_is_an_error_that_names_the_file(db):
    SqliteFile(db, "create").close()
    blocker = sqlite3.connect(db, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    file = SqliteFile(db, "write", patience=0.05)
    try:
        with pytest.raises(DatabaseLockedError, match=r"runs\.db: another program has locked the database"):
            file.write(lambda c: c.execute("DELETE FROM meta"))
        assert file.read(lambda c: c.execute("SELECT count(*) > 0 FROM meta").fetchone()) == (1,)  # readers don't wait
        blocker.execute("ROLLBACK")
        file.write(lambda c: c.execute("DELETE FROM meta"))
    finally:
        file.close()
        blocker.close()


def test_a_transaction_that_raises_is_rolled_back(db):
    file = SqliteFile(db, "create")

    def half(connection):
        connection.execute("INSERT INTO meta VALUES ('half', 1)")
        raise KeyboardInterrupt("half way")

    try:
        with pytest.raises(KeyboardInterrupt):
            file.write(half)
        assert not file.connection.in_transaction
        assert file.read(lambda c: c.execute("SELECT * FROM meta WHERE key = 'half'").fetchall()) == []
    finally:
        file.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the mount table")
def test_a_local_disk_is_not_taken_for_a_network(db):
    file = SqliteFile(db, "create")
    assert file.network is None
    file.close()


def test_without_a_wal_every_commit_is_synchronous(db, monkeypatch):
    monkeypatch.setattr("speval.stores.sqlite.file.filesystem", lambda path: "nfs4")
    file = SqliteFile(db, "create")
    assert file.connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert file.connection.execute("PRAGMA synchronous").fetchone() == (2,)
    file.close()


def test_all_agree_on_the_journal_mode_also_who_sees_a_local_disk(db, monkeypatch):
    SqliteFile(db, "create").close()
    monkeypatch.setattr("speval.stores.sqlite.file.filesystem", lambda path: "nfs4")
    SqliteFile(db, "create").close()
    monkeypatch.undo()
    for mode in ("create", "write"):
        file = SqliteFile(db, mode)
        assert file.connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert file.connection.execute("PRAGMA synchronous").fetchone() == (2,)
        file.close()


# A stranger's database


class Tripwire:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


async def test_opening_a_strangers_database_executes_nothing(db, tmp_path):
    import pickle

    tripped = tmp_path / "tripped"
    hostile = [
        pickle.dumps(Tripwire(tripped)),
        f"__import__('pathlib').Path({str(tripped)!r}).touch()",
        f"!!python/object:{tripped}",
    ]
    for number, value in enumerate(hostile):
        path = tmp_path / f"{number}.db"
        await aio.speval(double, {"victim": 1}, path)
        connection = sqlite3.connect(path)
        connection.execute("UPDATE attempts SET result = ?", (value,))
        connection.commit()
        connection.close()
        signed(path)
        assert await aio.load_evals(path) == []
        with (
            make_control(path) as control,
            pytest.raises(EvaluationDamagedError, match=r"'victim' is damaged: .* are not JSON"),
        ):
            control.evaluation("victim")
        connection = sqlite3.connect(path)
        connection.execute("UPDATE evaluations SET args = ?", (value,))
        connection.execute("UPDATE attempts SET final = 0")
        connection.execute("INSERT INTO queue VALUES (1, 1, 0, 1, 0, 0.0)")
        connection.commit()
        connection.close()
        signed(path)
        summary = await aio.speval(double, {"victim": 1}, path, on_changed="keep")
        assert summary.failed == 1
    assert not tripped.exists()


async def test_a_strangers_triggers_may_not_reach_outside_of_the_database(db):
    await aio.speval(double, range(3), db)
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("CREATE TRIGGER hostile AFTER UPDATE ON attempts BEGIN SELECT load_extension('x'); END")
    with pytest.raises(DatabaseError, match=r"runs\.db: it has a trigger \('hostile'\)"):
        await aio.speval(double, range(5), db)


HOSTILE = "\x1b]0;owned\x07\x9b2J\r\x7f"


async def test_what_a_stranger_has_written_reaches_the_terminal_as_something_to_read(db, tmp_path, caplog):
    caplog.set_level("DEBUG")
    texts = []

    async def refused(call):
        with pytest.raises(SpevalError) as caught:
            await call
        texts.append(str(caught.value))
        assert "owned" in texts[-1]

    def write(path, *statements):
        with closing(sqlite3.connect(path)) as connection:
            for statement in statements:
                connection.execute(statement, {"it": HOSTILE} if ":it" in statement else {})
            connection.commit()

    async def make(name):
        await aio.speval(double, {"a": 1}, tmp_path / name)
        return tmp_path / name

    write(tmp_path / "foreign.db", f'CREATE TABLE "{HOSTILE}" (x)')
    await refused(aio.load_evals(tmp_path / "foreign.db"))
    write(newer := await make("newer.db"), "UPDATE meta SET value = :it WHERE key = 'release'", "PRAGMA user_version = 99")
    await refused(aio.load_evals(newer))
    # JSON allows these two.
    write(changed := await make("changed.db"), """UPDATE evaluations SET args = '"' || char(0x9b, 0x7f) || 'owned"'""")
    await refused(aio.speval(double, {"a": 2}, changed))
    write(no_json := await make("no json.db"), "UPDATE attempts SET result = :it", "UPDATE evaluations SET name = :it")
    signed(no_json)
    assert await aio.load_evals(no_json) == []
    write(no_text := await make("no text.db"), "UPDATE attempts SET result = CAST(x'22ff1b5b326a' AS TEXT)")
    with pytest.raises(DatabaseError, match="damaged: a text value is not valid UTF-8"):
        await aio.load_evals(no_text)

    def dead(path):
        write(
            path,
            "UPDATE workers SET host = :it, ended_at = NULL, dead = 1",
            "DELETE FROM fresh",
            "UPDATE attempts SET final = 0",
            "INSERT INTO claimed VALUES (1, 1, (SELECT id FROM workers), 0, 0.0)",
        )

    dead(held := await make("held.db"))
    signed(held)
    texts.append(str((await aio.load_evals(held))[0]["worker"]))
    assert (await aio.speval(double, {"a": 1}, held, executor="coroutine")).completed == 1
    write(held, "UPDATE attempts SET outcome = :it")
    texts.append(str(await aio.speval(double, {"a": 1}, held)))
    texts += [record.getMessage() for record in caplog.records]
    assert sum("owned" in text for text in texts) >= 8
    assert [text for text in texts if not text.replace("\n", "").isprintable()] == []


# The file under us


async def test_a_symbolic_link_is_followed_to_a_database_and_to_nothing_else(tmp_path):
    target, link = tmp_path / "real.db", tmp_path / "link.db"
    link.symlink_to(target)
    with pytest.raises(DatabaseError, match="symbolic link to"):
        await aio.speval(double, [1], link)
    assert not target.exists()
    await aio.speval(double, [1], target)
    assert (await aio.speval(double, [1, 2], link)).recorded == 1
    garbage(target)
    before = target.read_bytes()
    with pytest.raises(ForeignDatabaseError):
        await aio.speval(double, [1], link)
    assert target.read_bytes() == before


@pytest.mark.parametrize("how", ["deleted", "replaced by another file"])
async def test_a_file_deleted_or_replaced_under_a_run_ends_it_and_keeps_what_was_recorded(db, how):
    async def function(args):
        if args == 60:
            if how == "deleted":
                db.unlink()
            else:
                other = db.with_name("other")
                other.write_text("something else")
                other.replace(db)
            for name in ("-wal", "-shm"):
                Path(f"{db}{name}").unlink()
        return args

    with pytest.raises(DatabaseError, match=f"was {how} while in use; all recorded data is in .*rescued: rename it"):
        await aio.speval(function, range(5000), db, lease=1.0)  # this process lives on, so its claims wait for the lease
    rescued = Path(f"{db}.rescued")
    assert stat.S_IMODE(rescued.stat().st_mode) == 0o600
    assert db.exists() is (how != "deleted")
    completed = await aio.load_evals(rescued, status="completed")
    assert len(completed) >= 50
    rescued.rename(tmp := db.with_name("again.db"))
    summary = await aio.speval(double, range(5000), tmp)
    assert (summary.completed, summary.recorded) == (5000, 5000 - len(completed))


async def test_a_full_disk_keeps_results_until_there_is_room(db, monkeypatch, caplog):
    import asyncio

    from speval.stores.sqlite.store import SqliteStore

    # As small as the file is now, for the worker's connection; its pragma holds for one connection only.
    calls, stores = [], []
    original = SqliteStore.register

    async def register(self, lease):
        stores.append(self)
        worker = await original(self, lease)
        self._file.connection.execute("PRAGMA max_page_count = 1")
        return worker

    monkeypatch.setattr(SqliteStore, "register", register)

    async def function(args):
        calls.append(args)
        return "x" * 2000

    running = asyncio.create_task(aio.speval(function, range(300), db))
    while "the disk is full" not in caplog.text:
        await asyncio.sleep(0.01)
    connection, file = stores[0]._opened()
    await connection.run(lambda: file.connection.execute("PRAGMA max_page_count = 100000").fetchone())
    assert (await running).completed == 300
    assert sorted(calls) == list(range(300))


async def test_a_disk_full_while_seeding_is_an_error_and_what_was_there_stays(db, monkeypatch):
    from speval.errors import DatabaseUnavailableError

    await aio.speval(double, range(10), db)
    original = SqliteFile._prepare

    def prepare(self, durability):
        original(self, durability)
        self.connection.execute("PRAGMA max_page_count = 1")

    monkeypatch.setattr(SqliteFile, "_prepare", prepare)
    with pytest.raises(DatabaseUnavailableError, match="the disk is full; free some space, no result is lost"):
        await aio.speval(double, range(100_000), db)
    monkeypatch.undo()
    assert [e["result"] for e in (await aio.load_evals(db))[:10]] == [2 * i for i in range(10)]
    assert (await aio.speval(double, range(20), db)).recorded == 10
