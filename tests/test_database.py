"""``speval.Database``: everything that people do with a database from Python, on both kinds of database."""

import gc
import itertools
import sqlite3
import subprocess
import sys
import threading
import tracemalloc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import speval
from speval import Database, aio, load_evals, retry
from speval.errors import (
    DatabaseMissingError,
    DatabaseNotEmptyError,
    InProgressError,
    OptionError,
    StoreClosedError,
    UnknownNameError,
)
from speval.model import Outcome, Settings
from speval.spaces.eager import Space
from speval.stores import control as shared
from speval.stores.base import Ended, Record

from .conftest import IMPORT_ALL
from .databases import findings

MEGABYTE = 1_000_000


def shaky(args):
    if args == 3:
        raise ValueError("three")
    return {"double": args * 2}


@pytest.fixture
async def filled(place):
    """A database with eight completed evaluations, a failed one and a pending one."""
    await aio.speval(shaky, range(9), place.checked, executor="thread", progress=False)
    store = place.store()
    await store.open()
    await store.extend([("late", "9")], "error")
    await store.close()
    return place.argument


async def evaluated(place, results):
    """Store results without calling anything."""
    store, space = place.store(), Space()
    await store.open()
    try:
        list(space.fill(range(len(results))))
        await store.seed(space, "error")
        worker = await store.register(30.0)
        for claim in (await store.record(Record(worker, idle=len(results)))).claims:
            ended = Ended(claim, Outcome(None, results[int(claim.name)], None, 1.0, 1.0), False)
            await store.record(Record(worker, [ended]))
        await store.leave(worker)
    finally:
        space.close()
        await store.close()


def names(evaluations):
    return [e["name"] for e in evaluations]


# Opening and closing


def test_it_says_what_it_is_and_how_it_stands(filled, place):
    shown = str(place.checked)
    with Database(filled) as db:
        assert repr(db).endswith("open to read>")
        db.pause()
        assert repr(db).endswith("open to write>")
    assert repr(db).endswith(" closed>")
    assert shown.rpartition("/")[2] in repr(db)
    db.close()


def test_a_password_is_not_shown(postgres, filled, place):
    if isinstance(filled, str):
        with Database(filled) as db:
            assert "password" not in repr(db)
            assert repr(db).startswith("<Database 'postgresql://")


def test_what_is_not_there_is_named_at_once_and_not_made(place):
    place.missing()
    with pytest.raises(DatabaseMissingError, match="does not exist"):
        Database(place.argument)


def test_every_method_of_a_closed_one_says_so_by_the_name_of_the_database(filled):
    db = Database(filled)
    reading = db.evaluations()
    db.close()
    calls: list[Callable[[], object]] = [db.status, db.evaluations, db.check, db.retry, db.pause, db.resume, db.compact]
    calls += [lambda: next(reading), lambda: db.evaluation("0"), lambda: db.attempts("0"), lambda: db.drop(["0"])]
    calls += [lambda: db.set(concurrency=1), lambda: db.unset("concurrency"), lambda: db.copy("other.db")]
    for call in calls:
        with pytest.raises(StoreClosedError, match="closed"):
            call()


def test_one_that_is_not_closed_warns_and_is_closed(filled):
    db = Database(filled)
    shown = repr(db)
    opened = weakref.ref(db._reading)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del db
        gc.collect()
    assert [str(w.message) for w in caught] == [f"unclosed {shown}; use it in a with statement, or close() it"]
    assert caught[0].category is ResourceWarning
    assert opened() is None


def test_one_that_could_not_be_opened_warns_of_nothing(tmp_path):
    with pytest.raises(DatabaseMissingError):
        Database(tmp_path / "none.db")
    gc.collect()  # a ResourceWarning would be an error here


# Looking


def test_status_counts_everything_and_names_the_last_failures(filled):
    with Database(filled) as db:
        seen = db.status()
        assert (seen.completed, seen.failed, seen.in_progress, seen.pending, seen.total) == (8, 1, 0, 1, 10)
        assert seen.causes == {"exception": 1}
        assert [f.name for f in seen.failures] == ["3"]
        assert (seen.settings, seen.workers) == (Settings(), ())
        assert db.status(failures=0).failures == ()


def test_evaluations_are_an_iterator_in_order_with_filters(filled):
    with Database(filled) as db:
        assert iter(db.evaluations()) is not None
        assert names(db.evaluations()) == [*map(str, range(9)), "late"]
        assert names(db.evaluations(status="pending")) == ["late"]
        assert names(db.evaluations(cause="exception")) == ["3"]
        assert names(db.evaluations(cause="timeout")) == []
        assert names(db.evaluations(pattern="l?t*")) == ["late"]
        assert names(db.evaluations(status="completed", limit=2)) == ["0", "1"]
        assert list(db.evaluations()) == load_evals(filled)
        assert db.evaluation("4") == load_evals(filled)[4]


def test_wrong_filters_are_refused_at_once_by_name(filled):
    with Database(filled) as db:
        wrong: dict[str, Any] = {"status": "done", "cause": "bad luck", "pattern": 7, "limit": -1}
        for option, value in wrong.items():
            with pytest.raises(OptionError, match=rf"\b{option}="):
                db.evaluations(**{option: value})


def test_attempts_have_worker_times_and_outcome(filled):
    with Database(filled) as db:
        (attempt,) = db.attempts("3")
        assert (attempt.number, attempt.outcome, attempt.error["message"]) == (1, "exception", "three")
        assert attempt.worker == db.evaluation("3")["worker"]
        assert db.attempts("late") == []
        for call in (db.attempts, db.evaluation):
            with pytest.raises(UnknownNameError, match="no evaluation is named 'nobody'"):
                call("nobody")


async def test_large_results_take_a_few_pages_of_memory_however_many_there_are(place):
    count = 60
    await evaluated(place, [f'"{"x" * MEGABYTE}"'] * count)
    with Database(place.argument) as db:
        tracemalloc.start()
        try:
            assert sum(len(e["result"]) for e in db.evaluations()) == count * MEGABYTE
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert most < 25 * MEGABYTE


async def test_one_evaluation_at_a_time_is_decoded(place, monkeypatch):
    await evaluated(place, ["[" + ",".join(["{}"] * 1000) + "]"] * 30)
    decoded = []
    original = shared.Control._readable
    monkeypatch.setattr(shared.Control, "_readable", lambda self, row: decoded.append(1) or original(self, row))
    with Database(place.argument) as db:
        reading = db.evaluations()
        next(reading)
        next(reading)
        assert len(decoded) == 2


def test_writes_between_two_pages_are_seen_and_keep_nobody_waiting(filled, monkeypatch):
    monkeypatch.setattr(shared, "_PAGE", 3)
    with Database(filled) as db, Database(filled) as other:
        reading = db.evaluations()
        assert names(itertools.islice(reading, 3)) == ["0", "1", "2"]
        assert db.drop(["4"]) == 1
        assert other.drop(["5"]) == 1
        assert names(reading) == ["3", "6", "7", "8", "late"]
        assert names(db.evaluations()) == ["0", "1", "2", "3", "6", "7", "8", "late"]


def test_several_iterators_may_be_open_and_left_half_way(filled, monkeypatch):
    monkeypatch.setattr(shared, "_PAGE", 2)
    with Database(filled) as db:
        one, two = db.evaluations(), db.evaluations(status="completed")
        assert [next(one)["name"], next(two)["name"], next(one)["name"], next(two)["name"]] == ["0", "0", "1", "1"]
        del one
        gc.collect()
        assert names(two) == ["2", "4", "5", "6", "7", "8"]
        assert db.retry(["3"]) == 1  # nothing holds a lock


# Steering


def test_retry_by_names_by_status_and_by_filter(filled):
    with Database(filled) as db:
        assert db.retry(pattern="[3]") == 0
        assert db.retry(cause="timeout") == 0
        assert db.retry(cause="exception") == 1
        assert db.retry() == 0
        assert db.retry(["0", "late"], status="completed") == 1
        assert db.retry(status="completed", pattern="?") == 7
        assert db.status().pending == 10
        with pytest.raises(UnknownNameError):
            db.retry(["nobody"])
        for wrong in ({"names": "0"}, {"status": "pending"}, {"names": ["0"], "cause": "timeout"}):
            with pytest.raises(OptionError):
                db.retry(**wrong)
    assert retry(filled) == 0


def test_pause_resume_set_and_unset_are_stored_and_seen(filled):
    with Database(filled) as db, Database(filled) as other:
        db.pause()
        db.set(concurrency=7)
        assert other.status().settings == db.status().settings == Settings(paused=True, concurrency=7)
        db.resume()
        db.unset("concurrency")
        assert other.status().settings == Settings()
        wrong: list[Any] = [0, 1.5, True, "4", None]
        for value in wrong:
            with pytest.raises(OptionError, match=r"\bconcurrency="):
                db.set(concurrency=value)
        other_setting: Any = "speed"
        with pytest.raises(OptionError, match=r"\bsetting='speed'"):
            db.unset(other_setting)
        assert other.status().settings == Settings()


def test_drop_by_names_by_status_and_by_filter(filled):
    with Database(filled) as db:
        for wrong in ({}, {"names": ["0"], "status": "failed"}, {"names": "late"}, {"status": "in_progress"}):
            with pytest.raises(OptionError):
                db.drop(**wrong)
        with pytest.raises(UnknownNameError):
            db.drop(["0", "nobody"])
        assert db.status().total == 10
        assert db.drop(cause="exception") == 1
        assert db.drop(pattern="lat*", status="pending") == 1
        assert db.drop(["0", "1"]) == 2
        assert names(db.evaluations()) == ["2", "4", "5", "6", "7", "8"]
        assert db.drop(status="completed") == 6
        assert findings(db.check()) == []


async def test_what_a_worker_runs_is_not_dropped_by_a_filter_either(place):
    store, space = place.store(), Space()
    await store.open()
    list(space.fill(range(3)))
    await store.seed(space, "error")
    await store.record(Record(await store.register(30.0), idle=1))
    with Database(place.argument) as db:
        with pytest.raises(InProgressError, match="'0'"):
            db.drop(pattern="*")
        assert db.status().total == 3
    space.close()
    await store.close()


def test_a_copy_holds_everything_and_needs_an_empty_target(filled, tmp_path):
    target = tmp_path / "copied.db"
    with Database(filled) as db:
        assert db.copy(target) == (10, 9)
        with pytest.raises(DatabaseNotEmptyError):
            db.copy(target)
        with Database(target) as other:
            assert list(other.evaluations()) == list(db.evaluations())


def test_a_sound_database_has_nothing_to_complain_about_and_can_be_compacted(filled):
    with Database(filled) as db:
        health = db.check()
        assert (findings(health), health.facts["integrity"]) == ([], "ok")
        assert "integrity" not in db.check(integrity=False).facts
        assert db.compact().before > 0
        assert db.status().completed == 8


# SQLite only


READER = f"""{IMPORT_ALL}
import os, sys
from speval import Database, SpevalError
if os.geteuid() == 0:
    os.setegid(65534); os.seteuid(65534)
with Database(sys.argv[1]) as db:
    print(db.status().completed, [e["name"] for e in db.evaluations(status="failed")])
    for write in (db.pause, db.retry, lambda: db.drop(["0"])):
        try:
            write()
        except SpevalError as error:
            print(error)
    print(db.status().completed, repr(db).rpartition("' ")[2])
"""


def test_where_only_reading_is_possible_reading_works_and_writing_names_the_fix(open_folder):
    path = open_folder / "runs.db"
    speval.speval(shaky, range(4), path, executor="thread", progress=False)
    path.chmod(0o444)
    open_folder.chmod(0o555)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", READER, str(path)], capture_output=True, text=True)
    assert done.stderr == ""
    first, *refused, last = done.stdout.splitlines()
    assert (first, last) == ("3 ['3']", "3 open to read>")
    assert len(refused) == 3
    assert all(line.startswith(f"{path}: ") and "`chmod " in line for line in refused)
    assert path.read_bytes() == before


def test_one_of_0_1_1_is_read_as_it_is_and_migrated_by_the_first_write(tmp_path):
    path = tmp_path / "old.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE evals (name TEXT, status TEXT, updated INTEGER, result TEXT, args TEXT)")
    rows = [("0", "completed", 5, "2", "1"), ("1", "in_progress", 6, None, "3"), ("2", "pending", 7, None, "5")]
    connection.executemany("INSERT INTO evals VALUES (?, ?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with Database(path) as db:
        seen = db.status()
        assert (seen.completed, seen.in_progress, seen.pending) == (1, 1, 1)
        assert [e["status"] for e in db.evaluations()] == ["completed", "in_progress", "pending"]
        assert list(db.evaluations()) == load_evals(path)
        assert path.read_bytes() == before
        db.pause()
        assert (db.status().settings.paused, db.status().pending) == (True, 2)


def test_any_thread_may_use_it_when_no_other_does(filled):
    with Database(filled) as db:
        found = []
        thread = threading.Thread(target=lambda: found.append(names(db.evaluations())))
        thread.start()
        thread.join()
        assert found == [names(db.evaluations())]


def test_a_fork_leaves_the_connections_of_its_parent_alone(filled, place):
    place.as_made()
    script = f"""
import os, sys, warnings
from speval import Database
warnings.simplefilter("error")
db = Database({str(filled)!r})
if os.fork() == 0:
    try:
        del db
    finally:
        os._exit(0)
os.wait()
print(db.status().completed)
db.close()
"""
    done = subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("8\n", "")
