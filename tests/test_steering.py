"""What people set for all workers of a database while they run."""

import asyncio
import sqlite3
import threading

import pytest

from speval import aio
from speval.stores.sqlite.states import STATES

from .conftest import WAIT, rows


def set_for_all(db, key, value):
    connection = sqlite3.connect(db, timeout=10)
    with connection:
        connection.execute("DELETE FROM meta WHERE key = ?", (key,))
        if value is not None:
            connection.execute("INSERT INTO meta VALUES (?, ?)", (key, value))
    connection.close()


class Gate:
    """A function whose evaluations tell that they run and wait to be let go, from whatever thread they run in."""

    def __init__(self):
        self.running = 0
        self.most = 0
        self.started = []
        self.is_open = False
        self._lock = threading.Lock()

    async def __call__(self, args):
        with self._lock:
            self.started.append(args)
            self.running += 1
            self.most = max(self.most, self.running)
        while not self.is_open:
            await asyncio.sleep(0.005)
        with self._lock:
            self.running -= 1
        return args


async def until(condition):
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.005)


def in_progress(db):
    return rows(db, f"SELECT count(*) FROM {STATES} WHERE status = 1")[0][0]


@pytest.mark.parametrize("wait", [True, False])
async def test_a_paused_call_lets_run_what_runs_starts_nothing_and_goes_on_when_resumed(db, wait, caplog):
    caplog.set_level("INFO", "speval.worker")
    gate = Gate()
    call = asyncio.create_task(aio.speval(gate, range(20), db, concurrency=2, wait=wait))
    await until(lambda: gate.running == 2)
    set_for_all(db, "paused", 1)
    await until(lambda: "what runs goes on" in caplog.text)
    gate.is_open = True
    await until(lambda: len(rows(db, "SELECT 1 FROM evals WHERE status = 'completed'")) == 2 and not in_progress(db))
    await asyncio.sleep(0.6)  # in which it looks at least once more
    assert (len(gate.started), call.done()) == (2, False)
    set_for_all(db, "paused", None)
    assert (await call).completed == 20
    assert "resumed" in caplog.messages


async def test_a_call_that_begins_paused_claims_nothing(db):
    await aio.speval(Gate(), [], db)
    set_for_all(db, "paused", 1)
    gate = Gate()
    gate.is_open = True
    call = asyncio.create_task(aio.speval(gate, range(3), db))
    await until(lambda: rows(db, "SELECT 1 FROM workers WHERE ended_at IS NULL"))
    await asyncio.sleep(0.3)
    assert (gate.started, call.done()) == ([], False)
    set_for_all(db, "paused", None)
    assert (await call).completed == 3


async def test_short_evaluations_claimed_ahead_are_given_back_when_paused(db, caplog):
    caplog.set_level("INFO", "speval.worker")

    async def short(args):
        await asyncio.sleep(0.0005)

    await aio.speval(short, [], db)
    call = asyncio.create_task(aio.speval(short, range(100_000), db, concurrency=4))
    await until(lambda: in_progress(db) > 4)
    set_for_all(db, "paused", 1)
    await until(lambda: "what runs goes on" in caplog.text and not in_progress(db))
    call.cancel()
    await asyncio.wait({call})


async def test_the_concurrency_of_a_call_whose_slots_are_all_busy_can_be_raised(db):
    gate = Gate()
    call = asyncio.create_task(aio.speval(gate, range(10), db, concurrency=1))
    await until(lambda: gate.running == 1)
    set_for_all(db, "concurrency", 4)
    await until(lambda: gate.running == 4)
    gate.is_open = True
    assert (await call).completed == 10
    assert gate.most == 4


@pytest.mark.parametrize("seconds", [0.0, 0.02])
async def test_the_concurrency_of_a_call_can_be_lowered_and_taken_back(db, seconds, caplog):
    caplog.set_level("INFO", "speval.worker")
    running, most, done = 0, 0, 0

    async def count(args):
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        await asyncio.sleep(seconds)
        running -= 1
        done += 1

    call = asyncio.create_task(aio.speval(count, range(4_000 if seconds else 200_000), db, concurrency=8))
    await until(lambda: most == 8)
    set_for_all(db, "concurrency", 2)
    await until(lambda: "concurrency is 2 now, it was 8" in caplog.messages and running <= 2)
    most, before = 0, done
    await until(lambda: done > before + 20)
    assert most == 2
    set_for_all(db, "concurrency", None)
    await until(lambda: most == 8)
    call.cancel()
    await asyncio.wait({call})
