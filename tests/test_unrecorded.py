"""Results that can't be recorded: whatever takes the database away, they are kept and come back with the next start."""

import asyncio
import json
import logging
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from speval import aio
from speval.engine.side_files import keep
from speval.errors import DatabaseError
from speval.model import Claim, Outcome
from speval.stores.base import Ended, TakenIn
from speval.stores.late import Adopted, note_refused
from speval.url import PostgresUrl

from .conftest import WAIT, exists, rows, server_url, wait_for
from .test_faults import DELETED, elsewhere

# Each call is written down before it ends: what was paid for.
PAID = """
import sys
from speval import speval

async def ask(x):
    import asyncio, os
    if x >= 20:
        await asyncio.sleep(600)
    while not os.path.exists("go"):
        await asyncio.sleep(0.01)
    with open("paid.txt", "a") as file:
        file.write(f"{x}\\n")
    return f"answer {x}"

try:
    print(speval(ask, range(30), "runs.db", concurrency=30, progress=False))
except KeyboardInterrupt:
    sys.exit("interrupted")
"""
AGAIN = """
from speval import speval

async def ask(x):
    with open("paid.txt", "a") as file:
        file.write(f"{x}\\n")
    return f"answer {x}"

speval(ask, range(30), "runs.db", concurrency=30, progress=False)
"""


def side_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.unrecorded-*"))


def answers(db) -> dict[str, str]:
    return {name: json.loads(result) for name, result in rows(db, "SELECT name, result FROM evals WHERE result IS NOT NULL")}


class Locked:
    """Another program that keeps a database locked."""

    def __init__(self, db) -> None:
        if isinstance(db, str):
            self._connection: Any = psycopg.connect(server_url(db))
            self._connection.execute(f"LOCK TABLE {PostgresUrl.parse(db).schema}.running IN ACCESS EXCLUSIVE MODE")
        else:
            self._connection = sqlite3.connect(db, isolation_level=None, timeout=30)
            self._connection.execute("BEGIN IMMEDIATE")

    def close(self) -> None:
        self._connection.rollback()
        self._connection.close()


@pytest.fixture
def interrupted(anywhere, scripts, tmp_path):
    """A run that was interrupted while its database was locked, and that database."""
    scripts.database = anywhere if isinstance(anywhere, str) else "runs.db"
    process = scripts.start(scripts.write(PAID))
    wait_for(lambda: exists(anywhere) and len(rows(anywhere, "SELECT name FROM evals WHERE status = 'in_progress'")) == 30)
    lock = Locked(anywhere)
    try:
        (tmp_path / "go").touch()
        paid = tmp_path / "paid.txt"
        wait_for(lambda: paid.exists() and len(paid.read_text().split()) == 20, "20 answers")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT)
    finally:
        lock.close()
    assert process.returncode == 1
    assert err.endswith("interrupted\n")
    return anywhere, err, paid


def test_answers_that_a_locked_database_does_not_take_before_a_ctrl_c_are_paid_once(interrupted, scripts, tmp_path):
    db, err, paid = interrupted
    (path,) = side_files(tmp_path)
    assert f"20 results kept in {path}" in err
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {json.loads(line["result"]) for line in lines} == {f"answer {n}" for n in range(20)}
    assert "secret" not in path.name
    err = scripts.run(AGAIN).stderr
    assert "20 results of an earlier run recorded, from" in err or isinstance(db, str)  # a server had taken them all the same
    assert answers(db) == {str(n): f"answer {n}" for n in range(30)}
    assert sorted(map(int, paid.read_text().split())) == list(range(30))
    assert not side_files(tmp_path)


def test_copies_that_start_together_or_die_before_they_remove_the_file_record_it_once(interrupted, scripts, tmp_path):
    db, _, _ = interrupted
    (path,) = side_files(tmp_path)
    shutil.copy(path, tmp_path / "copy")
    script = scripts.write(AGAIN, "again.py")
    for process in [scripts.start(script) for _ in range(3)]:
        process.communicate(timeout=WAIT)
        assert process.returncode == 0
    # As when the one that took it in was killed between its commit and the removal.
    shutil.move(tmp_path / "copy", path)
    assert scripts.run(AGAIN).returncode == 0
    assert not side_files(tmp_path)
    assert rows(db, "SELECT count(*) FROM attempts WHERE outcome = 'completed'") == [(30,)]
    assert len(answers(db)) == 30


def test_a_second_ctrl_c_does_not_cost_what_waits_for_a_locked_database(db, scripts, tmp_path):
    process = scripts.start(
        scripts.write(PAID.replace("except KeyboardInterrupt:", "except KeyboardInterrupt:\n    print('out')"))
    )
    wait_for(lambda: exists(db) and len(rows(db, "SELECT name FROM evals WHERE status = 'in_progress'")) == 30)
    lock, paid = Locked(db), tmp_path / "paid.txt"
    try:
        (tmp_path / "go").touch()
        wait_for(lambda: paid.exists() and len(paid.read_text().split()) == 20, "20 answers")
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):  # where both come as one, the one is enough
            process.wait(0.2)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=WAIT)[1]
    finally:
        lock.close()
    lines = [line for path in side_files(tmp_path) for line in path.read_text().splitlines()]
    assert len(lines) == 20, err
    scripts.run(AGAIN)
    assert sorted(map(int, paid.read_text().split())) == list(range(30))
    assert answers(db) == {str(n): f"answer {n}" for n in range(30)}


async def test_a_second_deletion_of_the_file_keeps_all_again_beside_the_first_rescue(db, tmp_path):
    for time in (1, 2):

        async def function(args, time=time):
            if args == 10 + 10 * time:
                elsewhere(DELETED, db)
            return [time, args]

        with pytest.raises(DatabaseError, match=r"was deleted while in use; all recorded data is in .*rescued") as caught:
            await aio.speval(function, range(40), db)
        assert "kept in" in str(caught.value)
    stored = {}
    for name in (f"{db}.rescued", f"{db}.rescued-2"):
        stored[name] = {e["name"]: e["result"][0] for e in await aio.load_evals(name, status="completed")}
    assert set(stored[f"{db}.rescued"].values()) == {1}
    assert 2 in stored[f"{db}.rescued-2"].values()
    os.rename(f"{db}.rescued-2", db)
    called = []
    summary = await aio.speval(lambda args: called.append(args), range(40), db, executor="thread")
    assert summary.completed == 40
    assert 30 not in called


RESTORED = "import sqlite3; a = sqlite3.connect(sys.argv[2]); b = sqlite3.connect(sys.argv[1], timeout=60); a.backup(b)"
EXECUTED = "import sqlite3; c = sqlite3.connect(sys.argv[1], timeout=60); c.executescript(sys.argv[2]); c.close()"
DELETE_SOME = (
    "BEGIN IMMEDIATE; DELETE FROM fresh WHERE first > 20; UPDATE fresh SET last = 20 WHERE last > 20;"
    "DELETE FROM claimed WHERE first > 20; UPDATE claimed SET last = 20 WHERE last > 20;"
    "DELETE FROM attempts WHERE evaluation > 20; DELETE FROM evaluations WHERE id > 20; COMMIT"
)


@pytest.mark.parametrize("how", ["restored", "deleted", "attempts deleted"])
@pytest.mark.parametrize("call", ["speval", "as_completed"])
async def test_a_file_whose_evaluations_others_take_away_ends_the_run_with_an_error(db, tmp_path, how, call):
    await aio.speval(str, range(3), db, executor="thread")
    shutil.copy(db, tmp_path / "old.db")
    arguments = {
        "restored": (RESTORED, db, tmp_path / "old.db"),
        "deleted": (EXECUTED, db, DELETE_SOME),
        "attempts deleted": (EXECUTED, db, "DELETE FROM attempts"),
    }[how]

    async def function(args):
        if args == 30:
            elsewhere(*arguments)
        return args

    with pytest.raises(DatabaseError, match=r"holds [0-9]+ of the 100 evaluations of the eval space at the end"):
        if call == "speval":
            await aio.speval(function, range(100), db)
        else:
            async for _ in aio.as_completed(function, range(100), db):
                pass
    if how != "attempts deleted":
        assert (await aio.speval(str, range(100), db, executor="thread")).completed == 100


TRUNCATED = "TRUNCATE {0}.evaluations, {0}.queue, {0}.running, {0}.attempts"


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("DROP SCHEMA {0} CASCADE", "the schema was changed or dropped while in use"),
        (TRUNCATED, "holds 0 of the 100 evaluations"),
        ("TRUNCATE {0}.attempts", "holds [0-9]+ of the 100 evaluations"),
        ("DELETE FROM {0}.queue WHERE id > 50; DELETE FROM {0}.evaluations WHERE id > 50", "of the 100 evaluations"),
    ],
    ids=["dropped", "truncated", "attempts truncated", "deleted"],
)
async def test_a_schema_that_others_drop_or_empty_ends_the_run_and_what_was_computed_is_kept(
    postgres, namespace, tmp_path, monkeypatch, sql, message
):
    monkeypatch.chdir(tmp_path)
    url = postgres.url(namespace=namespace)
    gone = sql.format(PostgresUrl.parse(url).schema)

    async def function(args):
        if args == 20:
            await asyncio.sleep(0.05)
            code = "import psycopg; psycopg.connect(sys.argv[1], autocommit=True).execute(sys.argv[2])"
            elsewhere(code, server_url(url), gone)
        return args

    with pytest.raises(DatabaseError, match=message):
        await aio.speval(function, range(100), url, concurrency=3)
    if "TRUNCATE {0}.att" in sql:
        return
    kept = [json.loads(line)["name"] for path in side_files(tmp_path) for line in path.read_text().splitlines()]
    if "queue" not in sql or "TRUNCATE" in sql:
        assert "20" in kept
    assert all("@" not in path.name for path in side_files(tmp_path))
    called = []
    summary = await aio.speval(lambda args: called.append(str(args)), range(100), url, executor="thread")
    assert summary.completed == 100
    assert not side_files(tmp_path)
    assert not set(kept) & set(called)


# The files


def result(name="a", value="1") -> Ended:
    return Ended(Claim(1, 1, 1, name, '"args"', 7), Outcome(None, value, None, 5.5, 0.25), False)


def test_no_file_is_overwritten_and_none_that_was_refused_is_mixed_up_with_a_new_one(tmp_path):
    base = tmp_path / "runs.db"
    (tmp_path / "runs.db.unrecorded-2.jsonl.refused").touch()
    paths = [keep(base, [result(str(n))])[0] for n in range(3)]
    assert [path.name for path in paths] == [f"runs.db.unrecorded-{n}.jsonl" for n in (1, 3, 4)]
    assert [json.loads(path.read_text())["name"] for path in paths] == ["0", "1", "2"]


async def test_where_the_folder_takes_no_file_it_goes_to_the_temporary_one_and_comes_back(db, tmp_path, monkeypatch, caplog):
    await aio.speval(str, ["args"], db.with_name("other.db"), executor="thread")
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    path, text = keep(tmp_path / "gone" / "runs.db", [result("0", '"kept"')])
    assert path is not None
    assert (tmp_path / "temp") in path.parents
    assert str(path) in text
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    path, text = keep(tmp_path / "gone" / "runs.db", [result(str(n)) for n in range(5)])
    assert path is None
    assert text.startswith("5 results lost ('0', '1', '2', ...), no folder takes a file: ")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    (tmp_path / "gone").mkdir()
    called = []
    await aio.speval(lambda args: called.append(args), ["args"], tmp_path / "gone" / "runs.db", executor="thread")
    assert called == []
    (e,) = await aio.load_evals(tmp_path / "gone" / "runs.db")
    assert (e["status"], e["result"]) == ("completed", "kept")


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\x00",
        b"[]",
        b"[" * 100_000,
        b"{}",
        b'{"evaluation": 1e400}',
        b'{"evaluation": 1, "name": "0", "args": "1", "attempt": 99999999999999999999, "charged": 1, "worker": 1}',
        json.dumps({"evaluation": 1, "name": "0", "args": '"args"', "attempt": 1, "charged": 1, "worker": 1, "started_at": "x",
                    "duration": 1, "cause": None, "result": "no json", "error": None, "again": False}).encode(),
    ],
    ids=["bytes", "list", "deep", "empty", "infinite", "large", "wrong types"],
)  # fmt: skip
async def test_lines_that_speval_has_not_written_are_named_and_kept_and_the_others_recorded(db, tmp_path, caplog, line):
    path, _ = keep(db, [result("1")])
    with path.open("ab") as file:
        file.write(line + b"\n")
    with path.open("ab") as file:
        file.write(json.dumps({}).encode())  # torn
    called = []
    await aio.speval(lambda args: called.append(args), ["x", "args"], db, executor="thread")
    assert called == ["x"]
    assert "2 lines in" in caplog.text
    assert [path.name for path in side_files(tmp_path)] == [f"{path.name}.refused"]


async def test_a_link_or_a_pipe_of_that_name_is_left_alone(db, tmp_path, caplog):
    target = tmp_path / "target"
    target.write_text("{}\n")
    (tmp_path / "runs.db.unrecorded-1.jsonl").symlink_to(target)
    os.mkfifo(tmp_path / "runs.db.unrecorded-2.jsonl")
    assert (await aio.speval(str, [1], db, executor="thread")).completed == 1
    assert caplog.text.count("could not be recorded now, and stay there") == 2
    assert target.read_text() == "{}\n"
    assert len(side_files(tmp_path)) == 2


# A file without its -wal


KILLED = '''
import os, signal, subprocess, sys
from speval import speval

LOOK = """
import sqlite3, sys
c = sqlite3.connect("file:runs.db?immutable=1", uri=True)  # without the -wal
sys.exit(not c.execute("SELECT count(*) FROM workers").fetchone()[0])
"""

def function(x):
    if x == 5:
        while subprocess.run([sys.executable, "-c", LOOK], stderr=subprocess.DEVNULL).returncode:
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    return x

speval(function, range(30), "runs.db", executor="thread", progress=False)
'''


def doctor(path: Path) -> str:
    command = [sys.executable, "-m", "speval", "doctor", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT).stdout


def test_a_copy_without_the_wal_of_a_killed_run_has_the_space_and_the_doctor_says_what_is_missing(db, scripts, tmp_path):
    assert scripts.run(KILLED).returncode == -signal.SIGKILL
    half, whole = tmp_path / "half.db", tmp_path / "whole.db"
    shutil.copy(db, half)
    shutil.copy(db, whole)
    shutil.copy(f"{db}-wal", f"{whole}-wal")
    assert "its -wal is missing" not in doctor(whole)
    text = doctor(half)
    assert "its -wal is missing, and worker" in text
    assert "copy both files" in text
    assert rows(half, "SELECT count(*) FROM evaluations") == [(30,)]


async def test_a_start_on_such_a_copy_from_another_machine_warns(db, scripts, tmp_path, caplog):
    assert scripts.run(KILLED).returncode == -signal.SIGKILL
    half = tmp_path / "half.db"
    shutil.copy(db, half)
    with closing(sqlite3.connect(half)) as connection, connection:
        connection.execute("UPDATE workers SET machine = 'another', lease = 0.2")
    await aio.speval(str, range(30), half, executor="thread")
    assert "its -wal is missing, and worker" in caplog.text
    caplog.clear()
    await aio.speval(str, range(30), half, executor="thread")
    assert "-wal" not in caplog.text


# What is said


async def test_equal_failures_are_told_a_few_times_and_counted_at_the_end(db, caplog):
    async def function(args):
        if args == 7:
            raise KeyError("another")
        raise ValueError(f"no {args}")

    await aio.speval(function, range(100), db, concurrency=10)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert sum("failed in attempt" in line for line in lines) == 11
    assert "and 89 more failed alike: ValueError: no N" in lines
    assert any("KeyError: 'another'" in line for line in lines)


async def test_a_call_that_waits_because_of_a_pause_says_so_and_how_to_go_on(place, caplog):
    store = place.store()
    await store.open()
    await store.close()
    control = place.control("write")
    control.set_paused(True)
    running = asyncio.create_task(aio.speval(str, [1], place.argument, executor="thread"))
    while "paused: " not in caplog.text:
        await asyncio.sleep(0.01)
    assert "paused: this call starts nothing new until `speval resume " in caplog.text
    control.set_paused(False)
    control.close()
    assert (await asyncio.wait_for(running, WAIT)).completed == 1
    assert caplog.text.count("paused: ") == 1


def test_a_result_whose_token_the_database_refuses_waits_for_the_next_start():
    ended = [Ended(Claim(i, 1, 1, str(i), "1", 7), Outcome(None, '"x"', None, 1.0, 1.0), False) for i in range(3)]
    adopted = [Adopted(one._replace(claim=one.claim._replace(attempt=2)), 0, False) for one in ended]
    claims = [one.claim for one in ended]
    taken = TakenIn(recorded=claims.copy())
    note_refused(taken, adopted, [])
    assert taken == TakenIn(recorded=claims)
    note_refused(taken, adopted, [adopted[1].ended.claim])
    assert taken.recorded == [claims[0], claims[2]]
    assert taken.waits == [(claims[1], "the database has refused its token")]


async def test_a_side_file_stays_while_the_database_refuses_what_is_in_it(db, monkeypatch, caplog):
    await aio.speval(asyncio.sleep, [0], db)
    lost = Ended(Claim(1, 1, 1, "0", "0", 7), Outcome(None, '"x"', None, 1.0, 1.0), False)
    with closing(sqlite3.connect(db)) as connection:
        is_known = connection.execute("SELECT id FROM evaluations").fetchall() == [(1,)]
    assert is_known
    path, _ = keep(db, [lost])
    with monkeypatch.context() as patched:
        patched.setattr("speval.stores.late.judge", lambda ended, standing: Adopted(ended, 0, False))
        patched.setattr("speval.stores.sqlite.late.end", lambda c, ended, now: [one.claim for one in ended])
        await aio.speval(asyncio.sleep, [0], db)
    assert path.exists()
    assert "'0': the database has refused its token" in caplog.text
