"""Files with invalid claims: evaluations of holders that do not exist never block a run."""

import sqlite3
from contextlib import closing

import pytest

from speval import DatabaseError, aio, load_evals, speval
from speval.host import this_process
from speval.stores import make_control
from speval.stores.sqlite.checksum import of_evaluation
from speval.stores.sqlite.file import SqliteFile
from speval.stores.sqlite.lease import SqliteLeaseKeeping
from speval.stores.sqlite.states import STATES

from .conftest import MovableClock, rows
from .crashes import inconsistencies

CLAIMED = "DELETE FROM fresh; INSERT INTO claimed SELECT id, id, {0}, {1}, 0.0 FROM evaluations WHERE id > 3"
RUNNING = "DELETE FROM fresh; INSERT INTO running SELECT id, 1 - {2}, 0, 0, 0, {1}, {2}, {0}, 0.0 FROM evaluations WHERE id > 3"
HELD_BY = {
    "no worker": ("NULL", 0, 0),
    "a worker that is not there": ("42", 0, 0),
    "several workers that are not there": ("id", 0, 0),
    "a text": ("'some\nbody'", 0, 0),
    "bytes": ("x'00ff'", 0, 0),
    "a fraction": ("0.5", 0, 0),
    "a worker that has left": ("(SELECT id FROM workers WHERE ended_at IS NOT NULL LIMIT 1)", 0, 0),
    "a worker that is not there, in a backoff": ("42", 0, 1),
    "no worker, claimed ahead": ("NULL", 1, 0),
}
DAMAGE = {
    f"{who}, {name}": sql.format(*how)
    for who, how in HELD_BY.items()
    for name, sql in (("claimed", CLAIMED), ("running", RUNNING))
    if how[2] == 0 or name == "running"
}
DAMAGE["a range of a worker that is not there"] = "DELETE FROM fresh; INSERT INTO claimed VALUES (4, 10, 42, 0, 0.0)"
DAMAGE["a range that has no end"] = f"DELETE FROM fresh; INSERT INTO claimed VALUES (4, {2**62}, 42, 0, 0.0)"
NOT_THERE = CLAIMED.format("42", 0)


def held_by(db, damage):
    """Make a database of ten evaluations, of which those behind the third are held as the damage says."""
    speval(str, range(3), db)
    with closing(sqlite3.connect(db)) as connection:
        for n in range(3, 10):
            row = (n + 1, n, str(n))
            connection.execute("INSERT INTO evaluations VALUES (?, ?, ?, ?)", (*row, of_evaluation(*row)))
        connection.execute("INSERT INTO fresh VALUES (4, 10, 0.0)")
        connection.executescript(damage)
        connection.commit()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_held_by_nobody_who_is_there_is_taken_back_at_once(db, caplog, damage):
    held_by(db, damage)
    summary = speval(str, range(10), db)
    assert (summary.completed, summary.recorded) == (10, 7)
    assert inconsistencies(db, 10) == []
    assert summary.seconds < 15  # of a lease of 30
    assert "pending again" in caplog.text
    assert all(line.isprintable() for line in caplog.text.splitlines())


def test_what_is_held_by_nobody_uses_up_its_attempts_like_any_other(db):
    held_by(db, NOT_THERE)
    summary = speval(str, range(10), db, max_attempts=1)
    assert (summary.completed, summary.failed, summary.causes) == (3, 7, {"lost": 7})
    error = load_evals(db, status="failed")[0]["error"]
    assert "?:?:00000000002a is not an active worker of this database" in error["message"]


def test_a_row_that_says_it_is_completed_keeps_its_result_whoever_is_said_to_hold_it(db):
    speval(str, range(5), db)
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("INSERT INTO claimed VALUES (1, 2, 42, 0, 0.0)")
        connection.execute("INSERT INTO running VALUES (3, 2, 0, 0, 0, 0, 0, (SELECT id FROM workers), 0.0)")
        connection.execute("UPDATE workers SET ended_at = NULL, dead = 1")
        connection.commit()
    assert speval(str, range(6), db).recorded == 1
    assert [e["result"] for e in load_evals(db)] == [str(n) for n in range(6)]


@pytest.mark.parametrize(
    "damage",
    ["lease = 'text'", "lease = x'00'", "pid = 'text'", "pid = 1 << 62", "machine = x'ff'", "beat = 'text'", "start = 0.5"],
)
def test_a_worker_described_as_no_worker_would_is_not_waited_for(db, damage, monkeypatch):
    here = this_process()
    held_by(db, NOT_THERE)
    with closing(sqlite3.connect(db)) as connection:
        # A worker of this machine that has died, as everything but the damaged column says.
        connection.execute(
            "INSERT INTO workers (id, host, pid, machine, start, lease, started_at, last_seen)"
            " VALUES (42, 'h', ?, ?, '1', 1, 0, 0)",
            (2**22 + 1, here.machine),
        )
        connection.execute(f"UPDATE workers SET {damage} WHERE id = 42")
        connection.commit()
    assert speval(str, range(10), db).completed == 10


def test_a_file_that_never_had_the_worker_is_healed_in_pieces_while_others_work(db, monkeypatch):
    monkeypatch.setattr("speval.stores.liveness._BOUND", 3)
    held_by(db, NOT_THERE + "; UPDATE claimed SET worker = NULL WHERE first > 7")
    keeping = SqliteLeaseKeeping(db, MovableClock())
    writes = []
    file = keeping._opened()
    monkeypatch.setattr(file, "write", lambda work, *args: writes.append(work.__name__) or SqliteFile.write(file, work, *args))
    try:
        reclaimed = keeping.reclaim(1, 3)
        assert (sorted(reclaimed.workers), reclaimed.pending, reclaimed.failed) == (["?:?:00000000002a", "?:?:None"], 7, [])
        assert len(writes) == 4
        # Of the healed file there is nothing to say, and nothing is written to it.
        assert keeping.reclaim(1, 3).workers == []
        assert len(writes) == 4
    finally:
        keeping.close()


def test_looking_for_what_nobody_holds_costs_the_same_whatever_is_held(db):
    """Counted in steps of SQLite's machine, since a busy one has no other clock to trust."""
    speval(str, [], db)
    keeping = SqliteLeaseKeeping(db, MovableClock())
    connection = keeping._opened().connection
    ticks = []

    def steps() -> int:
        ticks.clear()
        connection.set_progress_handler(lambda: ticks.append(1), 10)
        keeping._opened().read(keeping._look, 1)
        connection.set_progress_handler(None, 0)
        return len(ticks)

    try:
        before = steps()
        connection.executescript(
            """
            INSERT INTO workers (id, host, pid, machine, start, lease, started_at, last_seen)
            VALUES (7, 'h', 1, 'm', '', 1, 0, 0), (8, 'h', 1, 'm', '', 1, 0, 0);
            WITH RECURSIVE n (id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n WHERE id < 20000)
            INSERT INTO running SELECT id, 1, 0, 0, 0, 0, 0, 7 + id % 2, 0.0 FROM n;
            WITH RECURSIVE n (id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n WHERE id < 20000)
            INSERT INTO claimed SELECT 3 * id, 3 * id, 7 + id % 2, 0, 0.0 FROM n;
            """
        )
        assert steps() < before + 50
    finally:
        keeping.close()


def behind_the_index(db, index, statement):
    """Execute a statement that the index does not hear of."""
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        (sql,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (index,)).fetchone()

    def set_sql(text):
        with closing(sqlite3.connect(db, isolation_level=None)) as connection:
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (text, index))

    set_sql(sql.partition(" WHERE ")[0] + " WHERE 1 = 2")
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute(statement)
    set_sql(sql)


@pytest.mark.parametrize(
    "statement",
    ["INSERT INTO fresh VALUES (2, 3, 0.0)", "INSERT INTO queue VALUES (2, 1, 0, 0, 0, 0.0)"],
    ids=["fresh", "queue"],
)
def test_what_has_a_result_and_is_marked_pending_as_well_is_an_error_and_keeps_its_result(db, statement):
    held_by(db, statement)
    with pytest.raises(DatabaseError, match=r"runs\.db: the file contains invalid data"):
        speval(str, range(10), db)
    assert rows(db, "SELECT count(*) FROM attempts WHERE evaluation = 2") == [(1,)]


def test_a_range_that_goes_on_over_what_is_claimed_is_an_error(db):
    held_by(db, "UPDATE fresh SET last = 12; INSERT INTO claimed VALUES (7, 9, (SELECT id FROM workers), 0, 0.0)")
    with pytest.raises(DatabaseError, match=r"runs\.db: "):
        speval(str, range(10), db)


def test_an_index_that_does_not_know_what_has_ended_is_found_by_the_doctor(db):
    speval(str, range(10), db)
    behind_the_index(db, "attempts_final", "UPDATE attempts SET evaluation = 77 WHERE evaluation = 5")
    with make_control(db) as control:
        assert any(finding.is_error for finding in control.check().findings)


def test_a_pending_evaluation_without_args_is_an_error_and_not_an_endless_wait(db):
    held_by(db, "")
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("DELETE FROM evaluations WHERE id = 5")
        connection.execute("DELETE FROM meta WHERE key = 'space'")
        connection.commit()
    with pytest.raises(DatabaseError, match=r"runs\.db: damaged: evaluations marked pending could not be claimed"):
        speval(str, lambda ended: iter(()), db)


def test_an_index_that_says_one_is_held_that_is_not_makes_nobody_wait(db):
    held_by(db, "INSERT INTO running VALUES (2, 1, 0, 0, 0, 0, 0, 42, 0.0)")
    behind_the_index(db, "running_worker", "DELETE FROM running WHERE id = 2")
    try:
        assert speval(str, range(10), db).completed == 10
    except DatabaseError as error:
        assert "damaged" in str(error)  # noqa: PT017 - either will do


async def test_one_whose_own_row_is_gone_goes_on_as_another_worker(db, caplog):
    async def function(args):
        if args == 0:
            with closing(sqlite3.connect(db, timeout=30)) as connection:
                connection.execute("DELETE FROM workers")
                connection.commit()
        return args

    summary = await aio.speval(function, range(20), db, concurrency=2, lease=1.0)
    assert summary.completed == 20
    assert rows(db, f"SELECT count(*) FROM {STATES} WHERE worker IS NOT NULL") == [(0,)]
