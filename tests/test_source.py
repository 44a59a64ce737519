"""Eval spaces that don't exist yet: async iterators, and functions that look at what has ended so far."""

import asyncio
import sqlite3
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest

from speval import ArgsChangedError, OptionError, SpaceError, UnserializableError, aio, as_completed, load_evals, speval
from speval.stores.sqlite.states import STATES

from .conftest import WAIT, rows, wait_for


async def double(args):
    return args * 2


async def numbers(count):
    for i in range(count):
        yield i


async def until(condition):
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.005)


# Async iterators


async def test_an_async_iterator_is_evaluated_in_its_order_and_named_by_position(db):
    summary = await aio.speval(double, numbers(100), db, concurrency=5)
    assert (summary.completed, summary.total, summary.recorded) == (100, 100, 100)
    assert [(e["name"], e["args"], e["result"]) for e in await aio.load_evals(db)] == [(str(i), i, 2 * i) for i in range(100)]


def test_a_lazy_space_works_from_blocking_code_with_every_executor(db):
    executors: list[tuple[int, Any]] = [(3, "thread"), (6, "process"), (9, "coroutine")]
    for count, executor in executors:
        summary = speval(double, numbers(count), db, executor=executor, concurrency=2)
        assert (summary.completed, summary.recorded) == (count, 3)


async def test_a_second_start_evaluates_only_what_has_no_result(db):
    await aio.speval(double, numbers(10), db)
    assert (await aio.speval(double, numbers(15), db)).recorded == 5
    assert (await aio.speval(double, range(15), db)).recorded == 0  # a list of the same names and args is the same space


async def test_an_async_iterator_is_polled_only_for_as_many_as_the_slots_take(db):
    asked = 0
    go = asyncio.Event()

    async def endless():
        nonlocal asked
        while True:
            asked += 1
            yield asked

    async def wait(args):
        await go.wait()

    call = asyncio.create_task(aio.speval(wait, endless(), db, concurrency=3))
    await until(lambda: len(rows_in_progress(db)) == 3)
    await asyncio.sleep(0.3)
    assert asked == 3
    call.cancel()
    await asyncio.wait({call})
    assert not rows_in_progress(db)


def rows_in_progress(db):
    return rows(db, "SELECT name FROM evals WHERE status = 'in_progress'") if made(db) else []


def made(db):
    return db.exists() and rows(db, "SELECT 1 FROM sqlite_master WHERE name = 'evals'")


async def test_items_of_a_slow_iterator_are_evaluated_before_the_next_ones_arrive(db):
    more = asyncio.Event()

    async def slow():
        yield 1
        await more.wait()
        yield 2

    call = asyncio.create_task(aio.speval(double, slow(), db, concurrency=8))
    await until(lambda: made(db) and rows(db, "SELECT 1 FROM evals WHERE status = 'completed'"))
    assert not call.done()
    more.set()
    assert (await call).completed == 2


async def test_an_async_iterator_in_two_workers_is_evaluated_once(db):
    ran = Counter()

    async def count(args):
        ran[args] += 1
        await asyncio.sleep(0.001)

    summaries = await asyncio.gather(*(aio.speval(count, numbers(200), db, concurrency=4) for _ in range(2)))
    assert [summary.completed for summary in summaries] == [200, 200]
    assert sum(summary.recorded for summary in summaries) == 200
    assert set(ran.values()) == {1}


async def test_as_completed_yields_all_of_an_async_iterator(db):
    seen = [e["result"] async for e in aio.as_completed(double, numbers(20), db, concurrency=3)]
    assert sorted(seen) == [2 * i for i in range(20)]
    assert len(list(await asyncio.to_thread(lambda: list(as_completed(double, numbers(20), db))))) == 20


async def test_different_args_for_a_stored_name_are_an_error_after_recording_what_ended(db):
    await aio.speval(double, numbers(3), db)

    async def changed():
        yield 0
        yield 1
        yield 20

    with pytest.raises(ArgsChangedError, match="'2': stored 2, now 20"):
        await aio.speval(double, changed(), db)
    assert (await aio.speval(double, changed(), db, on_changed="rerun")).recorded == 1


async def test_an_exception_of_an_iterator_is_raised_after_recording_what_ended(db):
    async def breaks():
        yield 1
        yield 2
        raise LookupError("no more pages")

    with pytest.raises(LookupError, match="no more pages"):
        await aio.speval(double, breaks(), db)
    assert rows(db, f"SELECT count(*) FROM {STATES} WHERE status IN (1, 4)") == [(0,)]
    assert rows(db, "SELECT count(*) FROM workers WHERE ended_at IS NULL") == [(0,)]
    assert (await aio.speval(double, numbers(0), db)).pending == 0  # the next call evaluates what was polled


async def test_args_of_an_iterator_without_a_json_form_end_the_call_and_are_named(db):
    async def odd():
        yield 1
        yield {1, 2}

    with pytest.raises(UnserializableError, match="the args of evaluation '1'"):
        await aio.speval(double, odd(), db)


async def test_a_cancelled_call_closes_its_iterator_and_holds_nothing(db):
    closed = []

    async def endless():
        try:
            while True:
                yield 1
                await asyncio.sleep(0.001)
        finally:
            closed.append(True)

    call = asyncio.create_task(aio.speval(double, endless(), db))
    await until(lambda: made(db) and rows(db, "SELECT 1 FROM evals WHERE status = 'completed'"))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert closed == [True]
    assert not rows_in_progress(db)


async def test_an_iterator_that_ignores_cancellation_is_abandoned(db, caplog):
    asked, end, over = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def stubborn():
        yield 1
        asked.set()
        while not end.is_set():
            with suppress(asyncio.CancelledError):
                await end.wait()
        over.set()

    call = asyncio.create_task(aio.speval(double, stubborn(), db))
    await asked.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert "the eval space refuses to be cancelled: it is left behind" in caplog.messages
    end.set()
    await over.wait()


# Functions that look at what has ended


def halve(ended):
    """Search where the best is, one step at a time."""
    low, high = 0.0, 1.0
    for step in range(12):
        for e in ended():
            low, high = (e["args"]["x"], high) if e["result"] < 0 else (low, e["args"]["x"])
        yield f"step {step}", {"x": (low + high) / 2}


def test_an_adaptive_space_gets_every_result_before_it_is_polled(db):
    speval(lambda args: args["x"] - 0.3, halve, db)
    found = load_evals(db)
    assert [e["name"] for e in found] == [f"step {i}" for i in range(12)]
    assert abs(found[-1]["args"]["x"] - 0.3) < 1e-3


async def test_an_async_generator_function_awaits_what_has_ended(db):
    told = []

    async def steps(ended):
        for step in range(5):
            told.append([e["result"] for e in await ended()])
            yield str(step), step

    await aio.speval(double, steps, db)
    assert told == [[], [0], [2], [4], [6]]


def test_an_adaptive_space_gets_earlier_results_and_failures_first(db):
    speval(lambda args: 1 // args, [1, 0], db)
    told = []

    def nothing_more(ended):
        told.extend(ended())
        return iter(())

    summary = speval(abs, nothing_more, db)
    assert [(e["name"], e["status"]) for e in told] == [("0", "completed"), ("1", "failed")]
    assert (summary.completed, summary.failed, summary.recorded) == (1, 1, 0)


def test_a_space_that_yields_none_is_polled_again(db):
    """Generations: the next one begins when all of the last have ended."""
    told = []

    def generations(ended):
        for generation in range(3):
            left = {f"{generation}.{i}" for i in range(4)}
            yield from ((name, 0) for name in sorted(left))
            while left:
                yield None
                left -= {e["name"] for e in ended()}
            told.append(generation)

    assert speval(lambda args: time.sleep(0.01), generations, db, concurrency=4, executor="thread").completed == 12
    assert told == [0, 1, 2]


async def test_a_slow_generator_blocks_no_evaluation(db):
    release = threading.Event()
    thinking = threading.Event()

    def thinks(ended):
        yield "first", 1
        thinking.set()
        release.wait(WAIT)
        yield "second", 2

    call = asyncio.create_task(aio.speval(double, thinks, db, concurrency=2))
    await asyncio.to_thread(thinking.wait, WAIT)
    await until(lambda: rows(db, "SELECT name FROM evals WHERE status = 'completed'") == [("first",)])
    release.set()
    assert (await call).completed == 2


@pytest.mark.leaves_threads
async def test_a_generator_that_never_returns_does_not_block_a_cancelled_call(db):
    release, thinking = threading.Event(), threading.Event()

    def hangs(ended):
        thinking.set()
        release.wait(WAIT)
        yield "never", 1

    call = asyncio.create_task(aio.speval(double, hangs, db))
    await asyncio.to_thread(thinking.wait, WAIT)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    release.set()
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "speval eval space"])


def test_evaluations_proposed_by_a_dead_worker_are_evaluated_by_the_next_one(db):
    def one(ended):
        yield "proposed by one", 1

    def other(ended):
        yield "proposed by other", 2

    with pytest.raises(ZeroDivisionError):
        speval(abs, lambda ended: ((f"left behind {i}", 1 // (1 - i)) for i in range(3)), db)
    assert speval(abs, one, db).completed == 2
    assert speval(abs, other, db).completed == 3


@pytest.mark.parametrize("item", [5, "ab", ["a", 1], ("a", 1, 2), (1.5, 1)])
def test_an_item_that_is_not_a_pair_of_name_and_args_is_refused(db, item):
    with pytest.raises(SpaceError):
        speval(abs, lambda ended: iter([item]), db)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StopIteration(), ValueError("no")])
def test_any_exception_of_a_generator_is_raised_and_ends_only_the_call(db, error):
    def raises(ended):
        yield "first", 1
        raise error

    with pytest.raises((RuntimeError, ValueError)):
        speval(abs, raises, db)
    assert rows(db, "SELECT count(*) FROM workers WHERE ended_at IS NULL") == [(0,)]
    assert speval(abs, lambda ended: iter(()), db).completed == 1


def test_a_function_that_does_not_return_an_iterator_is_refused(db):
    with pytest.raises(OptionError, match="must be a generator function"):
        speval(abs, lambda ended: 5, db)  # type: ignore[arg-type,return-value]


def test_a_fraction_of_a_lazy_space_is_refused_before_anything_is_created(db):
    with pytest.raises(OptionError, match="max_failures"):
        speval(abs, halve, db, max_failures=0.5)
    assert not db.exists()


def test_max_failures_ends_an_endless_space(db):
    def endless(ended):
        i = 0
        while True:
            yield i, i
            i += 1

    summary = speval(lambda args: 1 // 0, endless, db, max_failures=5)
    assert summary.failed == 5
    assert "max_failures=5" in summary.stopped


async def test_a_paused_worker_does_not_poll_the_space(db):
    await aio.speval(double, [], db)
    connection = sqlite3.connect(db)
    with connection:
        connection.execute("INSERT INTO meta VALUES ('paused', 1)")
    drawn = []

    async def numbers():
        for i in range(3):
            drawn.append(i)
            yield i

    call = asyncio.create_task(aio.speval(double, numbers(), db))
    await asyncio.sleep(0.4)
    assert (drawn, call.done()) == ([], False)
    with connection:
        connection.execute("DELETE FROM meta WHERE key = 'paused'")
    connection.close()
    assert (await call).completed == 3


def test_workers_killed_while_polling_lose_nothing_and_record_nothing_twice(db, scripts):
    """Each copy proposes what no other one has, until all have proposed enough; two of four are killed."""
    script = scripts.write(
        """
        import os, sys, time
        from speval import speval

        def propose(ended):
            known = set()
            while True:
                known |= {e["name"] for e in ended()}
                for number in range(120):
                    name = str(number)
                    try:
                        os.close(os.open(f"asked {name}", os.O_CREAT | os.O_EXCL))
                    except FileExistsError:
                        continue
                    yield name, {"number": number}
                    break
                else:
                    return

        def run(args):
            with open("ran", "a") as file:
                file.write(f"{args['number']}\\n")
            time.sleep(0.02)
            return args["number"]

        print(speval(run, propose, "runs.db", concurrency=2, executor="thread", lease=2, progress=False))
        """
    )
    copies = [scripts.start(script) for _ in range(4)]
    for copy in copies[:2]:
        done = len(load_evals(db, status="completed")) if db.exists() else 0
        wait_for(lambda done=done: made(db) and len(load_evals(db, status="completed")) >= done + 15)
        copy.kill()
    for copy in copies[2:]:
        errors = copy.communicate(timeout=WAIT)[1]
        assert copy.returncode == 0, errors
    evaluations = load_evals(db)
    # What a copy had thought of and not yet stored when it was killed is all that can be missing: one each.
    assert len(evaluations) >= 118
    assert {e["status"] for e in evaluations} == {"completed"}
    assert all(e["result"] == int(e["name"]) for e in evaluations)
    ended = Counter(rows(db, "SELECT evaluation, outcome FROM attempts WHERE outcome = 'completed'"))
    assert set(ended.values()) == {1}
    ran = Counter((scripts.folder / "ran").read_text().split())
    assert sum(ran.values()) - len(ran) <= 4  # only what was under way when its copy was killed
