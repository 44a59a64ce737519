"""Cancelling at any moment: no lock left, no claim kept, no thread alive, nothing charged."""

import asyncio
import gc
import os
import random
import sqlite3
import sys
import threading
from collections import Counter
from contextlib import closing, suppress
from typing import Any

import anyio
import pytest

from speval import ArgsChangedError, aio, as_completed, speval
from speval.stores.sqlite.states import STATES

from .conftest import exists, open_files, our_threads, rows, wait_for
from .test_process import children


async def quick(args):
    await asyncio.sleep(0)
    return args


def assert_nothing_held(db):
    """Fail if a lock, a claim or a live worker is left."""
    if isinstance(db, str):
        assert_nothing_held_on_the_server(db)
        return
    if not db.exists():
        return
    connection = sqlite3.connect(db, isolation_level=None, timeout=0)
    connection.execute("BEGIN IMMEDIATE")  # raises at once if anybody holds the lock
    connection.execute("ROLLBACK")
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if "evaluations" in tables:
        held = f"SELECT count(*) FROM {STATES} WHERE worker IS NOT NULL OR status IN (1, 4)"
        assert connection.execute(held).fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM workers WHERE ended_at IS NULL").fetchone() == (0,)
    connection.close()


def assert_nothing_held_on_the_server(url):
    """Fail if a connection, a claim or a live worker is left."""
    connections = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'speval'"
    wait_for(lambda: rows(url, connections) == [(0,)])
    if exists(url):
        assert rows(url, "SELECT count(*) FROM running") == [(0,)]
        assert rows(url, "SELECT count(*) FROM workers WHERE ended_at IS NULL") == [(0,)]


def steps_until_cancelled(db, make, step):
    """Run a coroutine and cancel it after so many steps of the event loop; tell whether it was still running."""

    async def main():
        task = asyncio.create_task(make())
        for _ in range(step):
            if task.done():
                break
            await asyncio.sleep(0)
        was_running = not task.done()
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            assert was_running
        return was_running

    return asyncio.run(main())


async def drawn():
    for number in range(10):
        yield number
        await asyncio.sleep(0)


async def follow(db):
    async for _ in aio.as_completed(quick, range(30), db, concurrency=4):
        await asyncio.sleep(0)


CALLS: dict[str, Any] = {
    "coroutines": lambda db: aio.speval(quick, range(30), db, concurrency=4),
    "threads": lambda db: aio.speval(abs, range(30), db, concurrency=4, executor="thread"),
    "processes": lambda db: aio.speval(abs, range(10), db, concurrency=2, executor="process"),
    "as_completed": follow,
    "drawn": lambda db: aio.speval(quick, drawn(), db, concurrency=4),
    "load_evals": aio.load_evals,
    "retry": lambda db: aio.retry(db, status="completed"),
}


@pytest.mark.parametrize("call", CALLS)
def test_cancelled_at_every_step_nothing_is_held(tmp_path, call):
    # A step of the loop is not always the same moment, as the store's thread runs at its own pace: hence so many.
    db = tmp_path / "runs.db"
    steps = [*range(60), *range(60, 400, 7)] if call != "processes" else [*range(20), *range(20, 400, 15)]
    before = children(os.getpid())
    if call in ("load_evals", "retry"):
        asyncio.run(aio.speval(quick, range(3000), db, concurrency=100))
    for step in steps:
        if call not in ("load_evals", "retry"):
            db = tmp_path / f"{step}.db"
        steps_until_cancelled(db, lambda: CALLS[call](db), step)
        assert_nothing_held(db)
        assert children(os.getpid()) == before


@pytest.mark.parametrize("call", ["coroutines", "threads", "as_completed", "load_evals"])
async def test_cancelled_at_any_moment_of_its_talk_with_a_server_nothing_is_held(postgres, namespace, call):
    url = postgres.url(namespace=namespace)
    if call == "load_evals":
        await aio.speval(quick, range(3000), url, concurrency=100)
    for number in range(24):
        if number % 3 == 0 and call != "load_evals":
            url = postgres.url(namespace=f"{namespace}_{number}")  # one that is yet to be made
        task = asyncio.create_task(CALLS[call](url))
        await asyncio.sleep(random.uniform(0, 0.08))
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await asyncio.to_thread(assert_nothing_held, url)


@pytest.mark.parametrize("delay", [0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.05, 0.1])
async def test_cancelled_at_any_time_the_next_run_completes_the_rest_and_repeats_nothing_finished(anywhere, delay):
    calls = []

    async def function(args):
        await asyncio.sleep(0.001)
        calls.append(args)
        return args

    task = asyncio.create_task(aio.speval(function, range(200), anywhere, concurrency=5))
    await asyncio.sleep(delay)
    task.cancel()
    with suppress(asyncio.CancelledError):  # a quick machine may be done by then
        await task
    assert_nothing_held(anywhere)
    before = len(calls)
    done = len(await aio.load_evals(anywhere, status="completed")) if exists(anywhere) else 0
    assert done == before  # what had returned was recorded, whenever the cancellation came
    summary = await aio.speval(function, range(200), anywhere, concurrency=5)
    assert summary.completed == 200
    assert sorted(calls) == list(range(200))
    assert {e["attempts"] for e in await aio.load_evals(anywhere)} == {1}


async def test_cancelling_charges_no_attempt(anywhere):
    started = asyncio.Event()

    async def function(args):
        started.set()
        await asyncio.sleep(600)

    for _ in range(5):
        started.clear()
        task = asyncio.create_task(aio.speval(function, [1], anywhere, max_attempts=1))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    (evaluation,) = await aio.load_evals(anywhere)
    assert (evaluation["status"], evaluation["attempts"]) == ("pending", 0)


async def test_what_had_finished_when_the_cancellation_came_is_recorded(anywhere):
    finished = asyncio.Event()

    async def function(args):
        if args:
            await asyncio.sleep(600)
        finished.set()
        return "answer"

    task = asyncio.create_task(aio.speval(function, [0, 1], anywhere, concurrency=2))
    await finished.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [e["status"] for e in await aio.load_evals(anywhere)] == ["completed", "pending"]


async def locked(db):
    """Return a connection that has the write lock."""
    blocker = sqlite3.connect(db, isolation_level=None)
    while True:  # the lease thread writes too
        try:
            blocker.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            await asyncio.sleep(0.001)
        else:
            return blocker


async def test_what_waits_to_be_recorded_when_the_cancellation_comes_is_recorded(db):
    started, ends = asyncio.Event(), [asyncio.Event(), asyncio.Event()]

    async def function(args):
        if args == 2:
            started.set()
            await asyncio.sleep(600)
        await ends[args].wait()
        return "answer"

    task = asyncio.create_task(aio.speval(function, range(3), db, concurrency=3))
    await started.wait()
    with closing(await locked(db)) as blocker:
        for end in ends:  # the first one's commit waits for the lock, the second one for that commit
            end.set()
            await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.sleep(0.05)
        blocker.execute("ROLLBACK")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [e["status"] for e in await aio.load_evals(db)] == ["completed", "completed", "pending"]


async def test_a_cancel_scope_of_anyio_ends_it_in_good_order(db):
    # Such a scope cancels every await below it again and again until it is left.
    async def function(args):
        if args:
            await asyncio.sleep(600)

    async def cancel_when_one_is_recorded():
        while not (exists(db) and await aio.load_evals(db, status="completed")):
            await asyncio.sleep(0.01)
        scope.cancel()

    with anyio.CancelScope() as scope:
        cancelling = asyncio.create_task(cancel_when_one_is_recorded())
        await aio.speval(function, range(10), db, concurrency=10)
    assert scope.cancelled_caught
    await cancelling
    assert_nothing_held(db)
    assert [e["status"] for e in await aio.load_evals(db)] == ["completed"] + ["pending"] * 9


async def test_asyncio_timeout_ends_it_in_good_order(db):
    async def function(args):
        await asyncio.sleep(600)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await aio.speval(function, range(10), db, concurrency=10)
    assert_nothing_held(db)


async def test_a_second_cancellation_lets_go_at_once(db):
    started, release = asyncio.Event(), asyncio.Event()

    async def stubborn(args):
        started.set()
        while not release.is_set():
            with suppress(asyncio.CancelledError):
                await release.wait()

    task = asyncio.create_task(aio.speval(stubborn, [1], db))
    await started.wait()
    task.cancel()
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [one for one in asyncio.all_tasks() if one.get_name().startswith(("speval worker", "speval slot"))]
    release.set()


async def test_a_second_cancellation_does_not_wait_for_a_locked_database(db, monkeypatch):
    monkeypatch.setattr("speval.engine.worker._STOP_WITHIN", 600)
    started = asyncio.Event()

    async def function(args):
        started.set()
        await asyncio.sleep(600)

    task = asyncio.create_task(aio.speval(function, [1], db))
    await started.wait()
    with closing(await locked(db)) as blocker:
        task.cancel()
        await asyncio.sleep(0.1)
        assert not task.done()
        loop = asyncio.get_running_loop()
        second = loop.time()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert loop.time() - second < 30  # the lock would be waited for for a minute
        blocker.execute("ROLLBACK")


async def test_a_function_in_a_thread_does_not_delay_cancellation(db):
    started, release = threading.Event(), threading.Event()

    def function(args):
        started.set()
        release.wait(600)

    task = asyncio.create_task(aio.speval(function, [1], db))
    while not started.is_set():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_nothing_held(db)
    release.set()


async def test_cancelled_while_the_database_is_locked_it_ends_and_the_lease_does_the_rest(db, monkeypatch):
    monkeypatch.setattr("speval.engine.worker._STOP_WITHIN", 0.3)
    started = asyncio.Event()

    async def function(args):
        started.set()
        await asyncio.sleep(600)

    task = asyncio.create_task(aio.speval(function, [1], db))
    await started.wait()
    blocker = sqlite3.connect(db, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    blocker.execute("ROLLBACK")
    blocker.close()
    assert rows(db, "SELECT status FROM evals") == [("in_progress",)]


@pytest.mark.parametrize("when", ["opening", "seeding"])
async def test_cancelled_while_waiting_for_a_lock_it_ends_at_once_and_stops_nobody(db, when):
    await aio.speval(quick, range(10), db)
    blocker = sqlite3.connect(db, isolation_level=None)
    if when == "opening":  # another journal mode needs the file for itself
        blocker.execute("PRAGMA journal_mode = delete")
        blocker.execute("BEGIN EXCLUSIVE")
    else:
        blocker.execute("BEGIN IMMEDIATE")
    task = asyncio.create_task(aio.speval(quick, range(20), db))
    for _ in range(30):
        await asyncio.sleep(0.01)
    assert not task.done()
    loop = asyncio.get_running_loop()
    started = loop.time()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert loop.time() - started < 20  # the lock would be waited for for a minute
    blocker.execute("ROLLBACK")
    blocker.close()
    assert (await aio.speval(quick, range(20), db)).completed == 20


async def test_a_worker_that_can_not_register_leaves_no_process(db, monkeypatch):
    from speval import DatabaseLockedError
    from speval.stores.sqlite.store import SqliteStore

    before = children(os.getpid())

    async def register(self, lease):
        raise DatabaseLockedError("runs.db", 60)

    monkeypatch.setattr(SqliteStore, "register", register)
    with pytest.raises(DatabaseLockedError):
        await aio.speval(abs, [1], db, executor="process")
    assert children(os.getpid()) == before


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_hundreds_of_calls_leave_no_descriptor_no_thread_and_no_process(db, count):
    """Whatever is not closed would also be a ResourceWarning, and that an error."""

    def left():
        gc.collect()
        return Counter([*open_files(), *our_threads(), *children(os.getpid())])

    def fails_on_two(args):
        if args == 2:
            raise ValueError

    def call(i):
        if i % 100 == 0:
            speval(abs, [1, 2], f"{db}.{i}", executor="process", timeout=60)
        elif i % 5 == 0:
            for _ in as_completed(abs, range(20), f"{db}.{i}"):
                break
        elif i % 5 == 1:
            asyncio.run(aio.speval(quick, [1, 2], db))
        elif i % 5 == 2:
            with suppress(ArgsChangedError):
                speval(abs, [1, 3], db)
        else:
            speval(fails_on_two, [1, 2], db)

    call(0)
    before = left()
    for i in range(count):
        call(i)
    assert not left() - before
