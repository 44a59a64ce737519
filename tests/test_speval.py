"""The calls, awaited: what they evaluate, record, log, refuse and return."""

import asyncio
import logging
import os
import sqlite3
import threading
import time
from contextlib import aclosing

import numpy
import pytest

from speval import ArgsChangedError, OptionError, SpaceError, SpevalError, UnknownNameError, UnserializableError, aio
from speval.options import Options, checked_database
from speval.stores import make_store

from .conftest import content, exists, rows


async def double(args):
    return args * 2


# The main thing


@pytest.fixture
def file(tmp_path):
    return tmp_path / "runs.db"


@pytest.fixture
def db(anywhere):
    return anywhere


async def test_every_evaluation_is_evaluated_once_and_recorded(db):
    called = []

    async def function(args):
        called.append(args["x"])
        return {"y": args["x"] ** 2}

    summary = await aio.speval(function, [{"x": i} for i in range(50)], db, concurrency=5)
    assert (summary.completed, summary.failed, summary.total, summary.recorded) == (50, 0, 50, 50)
    assert sorted(called) == list(range(50))
    evaluations = await aio.load_evals(db)
    assert [e["name"] for e in evaluations] == [str(i) for i in range(50)]
    assert [e["result"]["y"] for e in evaluations] == [i**2 for i in range(50)]
    assert {(e["status"], e["attempts"], e["error"]) for e in evaluations} == {("completed", 1, None)}


async def test_a_second_run_evaluates_nothing(db):
    await aio.speval(double, range(10), db)
    summary = await aio.speval(double, range(10), db)
    assert (summary.completed, summary.recorded) == (10, 0)


async def test_a_longer_space_on_a_second_run_evaluates_what_is_new(db):
    await aio.speval(double, range(10), db)
    summary = await aio.speval(double, range(15), db)
    assert (summary.completed, summary.recorded) == (15, 5)


async def test_names_of_a_mapping_are_kept(db):
    await aio.speval(double, {"small": 1, "large": 1000}, db)
    assert {e["name"]: e["result"] for e in await aio.load_evals(db)} == {"small": 2, "large": 2000}


async def test_the_function_gets_what_json_gives_back_also_where_it_was_stored(db):
    seen = []

    async def function(args):
        seen.append(args)

    await aio.speval(function, [{"t": (1, 2), 3: numpy.float32(0.5), "a": numpy.arange(2)}], db)
    assert seen == [{"t": [1, 2], "3": 0.5, "a": [0, 1]}]


async def test_no_more_run_at_once_than_concurrency_says(db):
    running, most = 0, 0

    async def function(args):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1

    await aio.speval(function, range(100), db, concurrency=7)
    assert most == 7


async def test_plain_functions_run_in_threads_beside_the_event_loop(db):
    barrier = threading.Barrier(3, timeout=60)

    def function(args):
        barrier.wait()  # passes only when three run at once
        return threading.current_thread().name

    await aio.speval(function, range(9), db, concurrency=3, executor="thread")
    assert {e["result"] for e in await aio.load_evals(db)} == {"speval slot 0", "speval slot 1", "speval slot 2"}


async def test_an_empty_space_is_done_at_once(db):
    summary = await aio.speval(double, [], db)
    assert summary.total == 0
    assert await aio.load_evals(db) == []


async def test_several_calls_in_one_process_share_the_work(db):
    called = []

    async def function(args):
        called.append(args)
        await asyncio.sleep(0.001)

    summaries = await asyncio.gather(*(aio.speval(function, range(200), db, concurrency=3) for _ in range(4)))
    assert sorted(called) == list(range(200))
    assert sum(s.recorded for s in summaries) == 200
    assert {s.completed for s in summaries} == {200}


async def test_two_thousand_coroutines_run_five_hundred_at_once(db):
    started = asyncio.Event()
    count = 0

    async def function(args):
        nonlocal count
        count += 1
        if count == 500:
            started.set()
        await started.wait()
        return args

    summary = await aio.speval(function, range(2000), db, concurrency=500)
    assert summary.completed == 2000


# Failures


async def test_an_exception_fails_its_evaluation_and_the_run_goes_on(db, caplog):
    async def function(args):
        if args % 3 == 0:
            raise ValueError(f"bad {args}")
        return args

    summary = await aio.speval(function, range(10), db, concurrency=2)
    assert (summary.completed, summary.failed) == (6, 4)
    assert summary.causes == {"exception": 4}
    failed = await aio.load_evals(db, status="failed")
    assert [e["name"] for e in failed] == ["0", "3", "6", "9"]
    assert failed[1]["error"]["message"] == "bad 3"
    assert "in function" in failed[1]["error"]["traceback"]
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 4
    assert sorted(r.getMessage() for r in errors)[1] == "evaluation '3' failed in attempt 1: ValueError: bad 3"
    last = caplog.records[-1]
    assert (last.levelno, last.name) == (logging.WARNING, "speval.worker")
    assert last.getMessage().startswith("10 evaluations: 6 completed, 4 failed (4 exception)")


async def test_an_exception_is_final_and_a_second_run_leaves_it(db):
    calls = []

    async def function(args):
        calls.append(args)
        raise ValueError

    for _ in range(2):
        summary = await aio.speval(function, [1], db)
    assert calls == [1]
    assert summary.failed == 1


async def test_retry_on_tries_again_within_max_attempts(db, caplog):
    calls = []

    async def function(args):
        calls.append(args)
        if args == "flaky" and calls.count("flaky") < 3:
            raise ConnectionResetError("again")
        if args == "dead":
            raise TimeoutError("always")
        return "ok"

    space = {"flaky": "flaky", "dead": "dead"}
    summary = await aio.speval(function, space, db, retry_on=(OSError,), max_attempts=3, backoff=0.01)
    assert (summary.completed, summary.failed) == (1, 1)
    assert (calls.count("flaky"), calls.count("dead")) == (3, 3)
    assert [e["attempts"] for e in await aio.load_evals(db)] == [3, 3]
    assert caplog.text.count("will be tried again") == 4
    assert rows(db, "SELECT outcome, count(*) FROM attempts GROUP BY 1 ORDER BY 1") == [("completed", 1), ("exception", 5)]


async def test_a_timeout_is_tried_again_and_then_fails(db):
    calls = []

    async def function(args):
        calls.append(args)
        await asyncio.sleep(600)

    summary = await aio.speval(function, ["x"], db, timeout=0.02, max_attempts=2, backoff=0)
    assert summary.causes == {"timeout": 1}
    assert calls == ["x", "x"]
    (evaluation,) = await aio.load_evals(db)
    assert evaluation["error"]["message"] == "ran longer than 0.02 s"
    assert evaluation["attempts"] == 2


async def test_others_run_while_one_waits_for_its_backoff(db):
    order = []

    async def function(args):
        order.append(args)
        if args == 0 and order.count(0) == 1:
            raise OSError

    summary = await aio.speval(function, range(20), db, retry_on=OSError, backoff=2.0)
    assert summary.completed == 20
    assert order == [*range(20), 0]


async def test_an_unserializable_result_is_a_failure_that_says_what_it_was(db):
    async def function(args):
        return {"fine": 1, "model": object()}

    summary = await aio.speval(function, [1], db)
    assert summary.causes == {"unserializable": 1}
    (evaluation,) = await aio.load_evals(db)
    assert "object is not supported" in evaluation["error"]["message"]


@pytest.mark.parametrize(("limit", "least", "most"), [(3, 3, 4), (0.05, 5, 6)])
async def test_max_failures_stops_claiming(db, limit, least, most):
    async def function(args):
        await asyncio.sleep(0.06)  # too long to be claimed ahead
        raise ValueError

    summary = await aio.speval(function, range(100), db, max_failures=limit, concurrency=2)
    assert least <= summary.failed <= most
    assert summary.pending == 100 - summary.failed
    assert summary.in_progress == 0
    assert "max_failures" in summary.stopped
    again = await aio.speval(double, range(100), db, max_failures=limit, concurrency=50)
    assert (again.failed, again.completed, again.stopped) == (summary.failed, 100 - summary.failed, None)


async def test_control_characters_of_an_error_do_not_reach_the_terminal(db, caplog):
    async def function(args):
        raise ValueError("\x1b[2J\x1b]0;owned\x07 gone")

    await aio.speval(function, [1], db)
    assert "\x1b" not in caplog.text
    assert "\\x1b[2J" in caplog.text


async def test_neither_args_nor_results_are_logged(db, caplog):
    caplog.set_level(logging.DEBUG)

    async def function(args):
        return "secret result"

    await aio.speval(function, ["secret args"], db)
    assert "completed in" in caplog.text
    assert "secret" not in caplog.text


# Retry


async def test_retry_puts_failed_ones_back_for_the_next_run(db):
    healthy = False

    async def function(args):
        if not healthy:
            raise ValueError
        return args

    await aio.speval(function, range(3), db)
    assert await aio.retry(db, ["1"]) == 1
    assert await aio.retry(db) == 2
    assert await aio.retry(db) == 0
    healthy = True
    summary = await aio.speval(function, range(3), db)
    assert (summary.completed, summary.recorded) == (3, 3)


async def test_retry_of_completed_ones_evaluates_them_again(db):
    await aio.speval(double, range(3), db)
    assert await aio.retry(db, status="completed") == 3
    assert (await aio.speval(double, range(3), db)).recorded == 3


async def test_retry_refuses_what_makes_no_sense(db):
    await aio.speval(double, [1], db)
    with pytest.raises(OptionError, match="status='pending'"):
        await aio.retry(db, status="pending")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="names='0'"):
        await aio.retry(db, "0")
    with pytest.raises(UnknownNameError):
        await aio.retry(db, ["nobody"])


# Changed spaces


async def test_on_changed_error_names_how_many_and_the_first_few(db):
    await aio.speval(double, {"a": 1, "b": 2}, db)
    with pytest.raises(ArgsChangedError, match="1 evaluation has different args") as caught:
        await aio.speval(double, {"a": 1, "b": 3, "c": 4}, db)
    assert "'b': stored 2, now 3" in str(caught.value)
    assert [e["name"] for e in await aio.load_evals(db)] == ["a", "b"]


async def test_on_changed_keep_warns_and_rerun_evaluates_again(db, caplog):
    await aio.speval(double, [1, 2], db)
    await aio.speval(double, [1, 7], db, on_changed="keep")
    assert [e["result"] for e in await aio.load_evals(db)] == [2, 4]
    assert "1 evaluation stored with other args than given now; the stored args are kept" in caplog.text
    summary = await aio.speval(double, [1, 7], db, on_changed="rerun")
    assert summary.recorded == 1
    assert [e["result"] for e in await aio.load_evals(db)] == [2, 14]


async def test_a_run_logs_what_is_new_unchanged_changed_and_gone(db, caplog):
    caplog.set_level(logging.INFO)
    await aio.speval(double, {"a": 1, "b": 2, "c": 3}, db)
    await aio.speval(double, {"b": 2, "c": 30, "d": 4}, db, on_changed="rerun")
    texts = [r.getMessage() for r in caplog.records if r.getMessage().startswith("eval space")]
    assert texts == [
        "eval space: 3 new, 0 unchanged, 0 changed, 0 stored but no longer in it",
        "eval space: 1 new, 1 unchanged, 1 changed, 1 stored but no longer in it",
    ]


# wait


async def test_wait_false_returns_when_nothing_is_left_to_claim(db):
    release = asyncio.Event()

    async def slow(args):
        await release.wait()

    first = asyncio.create_task(aio.speval(slow, [1], db))
    while not (exists(db) and any(e["status"] == "in_progress" for e in await aio.load_evals(db))):
        await asyncio.sleep(0.01)
    summary = await aio.speval(slow, [1], db, wait=False)
    assert summary.in_progress == 1
    waiting = asyncio.create_task(aio.speval(slow, [1], db))
    release.set()
    assert (await waiting).completed == 1
    assert (await waiting).recorded == 0
    await first


async def test_a_copy_can_wait_for_others_for_any_time(db):
    release = asyncio.Event()

    async def slow(args):
        await release.wait()

    first = asyncio.create_task(aio.speval(slow, [1], db))
    while not (exists(db) and any(e["status"] == "in_progress" for e in await aio.load_evals(db))):
        await asyncio.sleep(0.01)
    space = await aio._encoded([1])
    worker = aio.make_worker(slow, space, db, Options())
    await worker.start()
    for _ in range(100_000):  # some hours later
        next(worker._run._polls)
    await asyncio.sleep(0.5)
    release.set()
    await worker.wait()
    await worker.close()
    space.close()
    assert (await first).completed == 1


async def test_behind_a_slow_one_among_quick_ones_nothing_is_hoarded(db):
    release = asyncio.Event()

    async def uneven(args):
        if args == 300:
            await release.wait()

    first = asyncio.create_task(aio.speval(uneven, range(1000), db))
    while not (exists(db) and len(await aio.load_evals(db, status="completed")) >= 300):
        await asyncio.sleep(0.01)
    # Another copy does all the rest while the first is at its slow one.
    second = asyncio.create_task(aio.speval(double, range(1000), db))
    while len(await aio.load_evals(db, status="completed")) < 999:
        await asyncio.sleep(0.01)
    release.set()
    assert (await second).recorded >= 500
    assert (await first).completed == 1000


@pytest.mark.parametrize("executor", ["coroutine", "thread"])
async def test_a_function_may_go_to_another_folder(tmp_path, monkeypatch, executor):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    async def coroutine(args):
        os.chdir(tmp_path / "elsewhere")
        await asyncio.sleep(0.7)  # long enough for a renewal

    def plain(args):
        os.chdir(tmp_path / "elsewhere")
        time.sleep(0.7)

    function = coroutine if executor == "coroutine" else plain
    summary = await aio.speval(function, range(3), "runs.db", lease=1.0, executor=executor)
    assert summary.completed == 3
    assert (tmp_path / "runs.db").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


# as_completed


async def test_as_completed_yields_each_evaluation_once_earlier_ones_included(db):
    await aio.speval(double, range(5), db)
    seen = [e async for e in aio.as_completed(double, range(20), db, concurrency=3)]
    assert sorted(int(e["name"]) for e in seen) == list(range(20))
    assert [e["name"] for e in seen[:5]] == ["0", "1", "2", "3", "4"]
    assert all(e["result"] == 2 * e["args"] for e in seen)


async def test_as_completed_yields_failed_ones_too(db):
    async def function(args):
        if args:
            raise ValueError

    seen = {e["name"]: e["status"] async for e in aio.as_completed(function, [0, 1], db)}
    assert seen == {"0": "completed", "1": "failed"}


async def test_as_completed_yields_what_other_workers_record(db):
    async def mine(args):
        await asyncio.sleep(0.005)
        return "mine"

    async def others(args):
        await asyncio.sleep(0.005)
        return "others"

    other = asyncio.create_task(aio.speval(others, range(60), db))
    seen = [e async for e in aio.as_completed(mine, range(60), db)]
    await other
    assert len(seen) == len({e["name"] for e in seen}) == 60
    assert {e["result"] for e in seen} == {"mine", "others"}


async def test_what_as_completed_yields_is_recorded(db):
    async with aclosing(aio.as_completed(double, range(20), db, concurrency=4)) as evaluations:
        async for e in evaluations:
            assert rows(db, "SELECT status FROM evals WHERE name = ?", e["name"]) == [("completed",)]


async def test_leaving_as_completed_early_releases_what_is_held(db):
    async def function(args):
        if args:
            await asyncio.sleep(600)

    async with aclosing(aio.as_completed(function, range(50), db, concurrency=10)) as evaluations:
        async for _ in evaluations:
            break
    assert {e["status"] for e in await aio.load_evals(db)} == {"completed", "pending"}
    assert sum(e["attempts"] for e in await aio.load_evals(db)) == 1
    assert rows(db, "SELECT count(*) FROM workers WHERE ended_at IS NULL") == [(0,)]


async def test_leaving_as_completed_by_break_alone_releases_too(db):
    async def function(args):
        if args:
            await asyncio.sleep(600)

    async for _ in aio.as_completed(function, range(50), db, concurrency=10):
        break
    while rows(db, "SELECT count(*) FROM workers WHERE ended_at IS NULL") != [(0,)]:
        await asyncio.sleep(0.01)
    assert {e["status"] for e in await aio.load_evals(db)} == {"completed", "pending"}


async def test_as_completed_goes_on_while_the_loops_body_runs(db):
    async with aclosing(aio.as_completed(double, range(20), db)) as evaluations:
        async for _ in evaluations:
            while rows(db, "SELECT count(*) FROM evals WHERE status = 'completed'") != [(20,)]:
                await asyncio.sleep(0.01)


async def test_as_completed_ends_at_max_failures(db):
    async def function(args):
        raise ValueError

    seen = [e async for e in aio.as_completed(function, range(500), db, max_failures=2)]
    assert 2 <= len(seen) < 500
    assert {e["status"] for e in seen} == {"failed"}


# Bad input


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("timeout", 0),
        ("timeout", -1),
        ("timeout", "60"),
        ("timeout", float("nan")),
        ("timeout", True),
        ("concurrency", 0),
        ("concurrency", 1.5),
        ("concurrency", True),
        ("concurrency", None),
        ("executor", "processes"),
        ("executor", None),
        ("max_attempts", 0),
        ("retry_on", "ValueError"),
        ("retry_on", (ValueError, 3)),
        ("retry_on", KeyboardInterrupt),
        ("backoff", -1),
        ("backoff", float("inf")),
        ("lease", 0.5),
        ("on_changed", "ignore"),
        ("wait", 1),
        ("max_failures", 0),
        ("max_failures", 1.5),
        ("max_failures", 0.0),
        ("progress", "yes"),
        ("durability", "none"),
    ],
)
async def test_a_wrong_option_is_refused_by_name_before_anything_is_made(db, option, value):
    with pytest.raises(OptionError, match=f"^invalid {option}="):
        await aio.speval(double, [1], db, **{option: value})
    with pytest.raises(OptionError, match=f"^invalid {option}="):
        aio.as_completed(double, [1], db, **{option: value})
    assert not exists(db)


async def test_what_is_no_function_is_refused(db):
    with pytest.raises(OptionError, match="func='print'"):
        await aio.speval("print", [1], db)  # type: ignore[arg-type]
    assert not exists(db)


async def test_an_unusable_space_changes_nothing(db):
    with pytest.raises(UnserializableError):
        await aio.speval(double, [1, object()], db)
    with pytest.raises(SpaceError):
        await aio.speval(double, {1: 1, "1": 2}, db)
    assert not exists(db)
    await aio.speval(double, [1], db)
    before = content(db)
    for space in ([1, object()], {1: 1, "1": 2}):
        with pytest.raises(SpevalError):
            await aio.speval(double, space, db)
    assert content(db) == before


# Staying alive


async def test_a_blocked_event_loop_does_not_lose_the_lease(db, caplog):
    async def function(args):
        if args == 0:
            time.sleep(3.3)  # three leases and a bit, the loop stands still
        return args

    watching = asyncio.create_task(asyncio.to_thread(_reclaim_for, db, 3.0))
    summary = await aio.speval(function, range(3), db, lease=1.0)
    assert await watching == []
    assert (summary.completed, summary.recorded) == (3, 3)
    assert [e["attempts"] for e in await aio.load_evals(db)] == [1, 1, 1]
    assert "dead" not in caplog.text


def _reclaim_for(db, seconds):
    """Watch the database as another worker elsewhere would; return whom it declared dead."""
    while not (exists(db) and rows(db, "SELECT count(*) FROM workers") != [(0,)]):
        time.sleep(0.01)
    store = make_store(checked_database(db), "read")
    keeping = store.lease_keeping()
    dead, deadline = [], time.monotonic() + seconds
    while time.monotonic() < deadline:
        dead += keeping.reclaim(-1, 3).workers
        time.sleep(0.05)
    keeping.close()
    asyncio.run(store.close())
    return dead


@pytest.mark.parametrize("kind", ["coroutine", "process"])
async def test_a_worker_that_can_not_prove_its_lease_stops_its_work_and_goes_on_once_it_can(file, caplog, tmp_path, kind):
    starts = tmp_path / "starts"
    starts.mkdir()

    def pause():
        (starts / f"{time.monotonic_ns()}").touch()
        return 600 if len(list(starts.iterdir())) == 1 else 0

    async def coroutine(args):
        await asyncio.sleep(pause())

    def plain(args):
        time.sleep(pause())

    function = coroutine if kind == "coroutine" else plain
    running = asyncio.create_task(aio.speval(function, [1], file, lease=1.0, executor=kind, max_attempts=1))
    while not list(starts.iterdir()):
        await asyncio.sleep(0.01)
    blocker = sqlite3.connect(file, isolation_level=None)
    while True:  # the lease thread writes too
        try:
            blocker.execute("BEGIN IMMEDIATE")
            break
        except sqlite3.OperationalError:
            await asyncio.sleep(0.001)
    while "what can be stopped is stopped" not in caplog.text:
        await asyncio.sleep(0.01)
    blocker.execute("ROLLBACK")
    blocker.close()
    summary = await running
    assert (summary.completed, summary.recorded) == (1, 1)
    assert len(list(starts.iterdir())) == 2
    assert [e["attempts"] for e in await aio.load_evals(file)] == [1]  # nobody was charged


async def test_results_wait_for_a_locked_database_and_are_recorded_later(file, caplog, monkeypatch):
    monkeypatch.setattr("speval.stores.sqlite.file._PATIENCE", 0.2)
    blocker = sqlite3.connect(file, isolation_level=None)
    locked, calls = asyncio.Event(), []

    async def function(args):
        calls.append(args)
        if args == 0:
            blocker.execute("BEGIN IMMEDIATE")
            locked.set()
        return args

    running = asyncio.create_task(aio.speval(function, range(5), file))
    await locked.wait()
    while "kept, to be written as soon as possible" not in caplog.text:
        await asyncio.sleep(0.01)
    blocker.execute("ROLLBACK")
    summary = await running
    blocker.close()
    assert summary.completed == 5
    assert calls == list(range(5))


async def test_durability_power_syncs_every_commit(file, monkeypatch):
    from speval.stores.sqlite.file import SqliteFile

    levels = []
    original = SqliteFile._prepare

    def prepare(self, durability):
        original(self, durability)
        levels.append(self.connection.execute("PRAGMA synchronous").fetchone())

    monkeypatch.setattr(SqliteFile, "_prepare", prepare)
    await aio.speval(double, [1], file, durability="power")
    assert levels[0] == (2,)
    levels.clear()
    await aio.speval(double, [1], file)
    assert levels[0] == (1,)
