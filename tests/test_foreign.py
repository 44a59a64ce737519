"""Executors of others: the standard library's, loky's, Dask's."""

import asyncio
import json
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
from concurrent.futures import Executor as FutureExecutor
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy
import pytest

from speval import ExecutorError, FunctionError, aio, load_evals, speval
from speval.clock import Clock
from speval.executors import make_executor
from speval.executors.foreign import call as foreign_call
from speval.options import Options
from speval.stores.sqlite.states import STATES

from .conftest import Scripts, rows


def make_process_pool():
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


def make_loky():
    from loky import ProcessPoolExecutor as LokyExecutor

    return LokyExecutor(2)


@pytest.fixture(scope="module")
def cluster():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from distributed import Client, LocalCluster

        with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster,
            Client(cluster) as client,
        ):
            yield client


one_cluster = pytest.mark.xdist_group("cluster")  # which takes seconds to start


@pytest.fixture(params=["process pool", "loky", pytest.param("dask", marks=one_cluster), "thread pool"])
def pool(request):
    if request.param == "dask":
        yield request.getfixturevalue("cluster").get_executor()
        return
    made = {"process pool": make_process_pool, "loky": make_loky, "thread pool": lambda: ThreadPoolExecutor(2)}[request.param]()
    yield made
    made.shutdown()


async def one(pool, function, args, timeout=None, **options):
    executor = make_executor(function, Options(executor=pool, **options), Clock())
    slot = executor.slot(0)
    try:
        return await slot.call("17", json.dumps(args), timeout)
    finally:
        await slot.close()
        await executor.close()


async def test_results_exceptions_and_what_can_not_be_encoded(pool):
    offset = 5

    def function(args):
        if args == "raise":
            raise ConnectionResetError("gone")
        return object() if args == "object" else args + offset

    assert (await one(pool, function, 2)).result == "7"
    outcome = await one(pool, function, "raise", retry_on=OSError)
    assert (outcome.cause, outcome.again) == ("exception", True)
    assert "in function" in outcome.error["traceback"]
    assert (await one(pool, function, "object")).cause == "unserializable"
    assert (await one(pool, lambda args: "ü" * args, 1_000_000)).result == '"' + "ü" * 1_000_000 + '"'


async def test_a_timeout_gives_the_call_up_and_says_so(pool, tmp_path, caplog):
    def function(args):
        while args and not os.path.exists(args):
            time.sleep(0.01)
        return "late"

    await one(pool, function, "")  # the pool is up
    outcome = await one(pool, function, str(tmp_path / "released"), timeout=0.2)
    assert (outcome.cause, outcome.again) == ("timeout", True)
    assert "evaluation '17' ran longer than 0.2 s in a " in caplog.text
    assert "which can't stop a running call: it is abandoned" in caplog.text
    (tmp_path / "released").touch()
    assert (await one(pool, function, "", timeout=60)).result == '"late"'


def test_a_whole_run(pool, db):
    summary = speval(lambda args: args * 2, range(100), db, executor=pool, concurrency=4)
    assert summary.completed == 100
    assert [e["result"] for e in load_evals(db)] == [2 * i for i in range(100)]


async def test_a_cancelled_run_releases_what_it_held(pool, db, tmp_path):
    started, released = str(tmp_path / "started"), str(tmp_path / "released")

    def function(args):
        open(started, "w").close()
        while not os.path.exists(released):
            time.sleep(0.01)

    running = asyncio.create_task(aio.speval(function, range(4), db, executor=pool, concurrency=2))
    while not os.path.exists(started):
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert {(e["status"], e["attempts"]) for e in await aio.load_evals(db)} == {("pending", 0)}
    open(released, "w").close()


@pytest.mark.parametrize("make", [make_process_pool, make_loky])
def test_a_pool_that_breaks_ends_the_run_and_the_next_one_goes_on(make, db):
    def function(args):
        if args == 5:
            os._exit(1)
        return args

    pool = make()
    with pytest.raises(ExecutorError, match="accepts no more calls"):
        speval(function, range(30), db, executor=pool, backoff=0)
    pool.shutdown()
    assert rows(db, "SELECT count(*) FROM attempts WHERE outcome = 'crash'")[0][0] >= 1
    assert rows(db, f"SELECT count(*) FROM {STATES} WHERE worker IS NOT NULL") == [(0,)]
    done = len(load_evals(db, status="completed"))
    summary = speval(lambda args: args, range(30), db)
    assert (summary.completed, summary.recorded) == (30, 30 - done)


@one_cluster
def test_a_dask_worker_that_dies_loses_nothing(cluster, db, tmp_path):
    first = str(tmp_path / "first")

    def function(args):
        if args == 3 and not os.path.exists(first):
            open(first, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return args

    summary = speval(function, range(20), db, executor=cluster.get_executor(), concurrency=2, backoff=0)
    assert summary.completed == 20
    assert [e["result"] for e in load_evals(db)] == list(range(20))


LOSES_ITS_SCHEDULER = """
import subprocess, sys, time, warnings
warnings.simplefilter("ignore")
from distributed import Client
from speval import ExecutorError, load_evals, speval

command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
scheduler = subprocess.Popen([*command, "--scheduler-file", "scheduler.json"])
command = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", "scheduler.json", "--no-nanny"]
worker = subprocess.Popen([*command, "--nthreads", "2", "--no-dashboard"])

def function(args):
    if args >= 5:
        open(f"started {args}", "w").close()
        time.sleep(600)
    return args

try:
    client = Client(scheduler_file="scheduler.json", timeout=1)
    client.wait_for_workers(1)
    def kill():
        import os
        while not os.path.exists("started 6"):
            time.sleep(0.01)
        scheduler.kill()
    import threading
    threading.Thread(target=kill).start()
    # In the time in which the client hopes to find its scheduler again, some use up their attempts.
    speval(function, range(1000), "runs.db", executor=client.get_executor(), concurrency=2, backoff=0, progress=False)
except ExecutorError as error:
    print(error)
finally:
    scheduler.kill()
    worker.kill()
evaluations = load_evals("runs.db")
print(len([e for e in evaluations if e["status"] == "completed"]), {e["status"] for e in evaluations})
"""


@pytest.mark.slow  # the client looks for it for a while
def test_a_dask_client_that_has_lost_its_scheduler_ends_the_run_instead_of_waiting_for_ever(scripts: Scripts):
    done = scripts.run(LOSES_ITS_SCHEDULER)
    assert "executor=ClientExecutor accepts no more calls" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1].startswith("5 {"), done.stdout
    assert "'in_progress'" not in done.stdout


def wait_for_file(path, number):
    while not os.path.exists(path):
        time.sleep(0.01)


def test_what_waits_for_its_turn_in_a_pool_is_not_timed_out(pool, db, tmp_path):
    release = tmp_path / "release"
    started = [
        pool.submit(wait_for_file, str(release), number) for number in range(2)
    ]  # somebody else's, on both of its places
    threading.Timer(1.5, release.touch).start()
    summary = speval(str, range(5), db, executor=pool, concurrency=5, timeout=1, max_attempts=1)
    assert summary.completed == 5
    assert all(e["duration"] < 1 for e in load_evals(db))
    assert [future.result() for future in started] == [None, None]


async def test_a_process_that_can_not_tell_the_beginning_of_a_call_makes_it_all_the_same(db):
    pool = make_process_pool()
    executor: Any = make_executor(abs, Options(executor=pool), Clock())
    slot = executor.slot(0)
    try:
        assert (await slot.call("17", "-1", 60)).result == "1"
        assert executor.tells_beginnings
        os.unlink(executor._channel.address[1])  # as those do who tidy up the folder for temporary files
        assert (await slot.call("17", "-2", 60)).result == "2"
        assert not executor.tells_beginnings
        assert (await slot.call("17", "-3", 60)).result == "3"
    finally:
        await executor.close()
        pool.shutdown()


def test_a_call_whose_run_is_over_does_not_begin(tmp_path):
    payload = pickle.dumps((os.mkdir, ()))
    args = (b"mkdir", payload, "0" * 16, ("fifo", str(tmp_path / "gone")), "17", json.dumps(str(tmp_path / "made")))
    assert foreign_call.call_loaded(*args) == foreign_call.NOT_TOLD
    assert not (tmp_path / "made").exists()


class Slow:
    """Takes its time to be dropped, as a connection or a model does."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, args):
        return self.kind

    def __del__(self, sleep=time.sleep):
        sleep(0.0001)


class Threads(FutureExecutor):
    """Threads of a kind that is not known to be of this process, such as those of a Dask worker."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(8)

    def submit(self, function, /, *args, **_):
        return self.pool.submit(function, *args)


@pytest.mark.parametrize("make", [Threads, lambda: ThreadPoolExecutor(8)])
def test_two_runs_that_share_a_pool_get_the_answers_of_their_own_function(make, tmp_path):
    pool = make()
    kinds = [str(kind) for kind in range(6)]  # more functions than are kept at once

    def run(kind):
        speval(Slow(kind), range(200), tmp_path / f"{kind}.db", executor=pool, concurrency=8, progress=False)

    threads = [threading.Thread(target=run, args=(kind,)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [{e["result"] for e in load_evals(tmp_path / f"{kind}.db")} for kind in kinds] == [{kind} for kind in kinds]


class Counting(ProcessPoolExecutor):
    sent = 0

    def submit(self, function, /, *args, **_):
        self.sent += sum(len(arg) for arg in args if isinstance(arg, bytes))
        return super().submit(function, *args)


def test_a_large_function_is_sent_to_a_process_once_and_not_with_each_call(db):
    large = numpy.arange(1_000_000.0)  # 8 MB
    with Counting(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert speval(lambda args: float(large[args]), range(50), db, executor=pool, timeout=60).completed == 50
        assert 8e6 < pool.sent < 9e6
    assert [e["result"] for e in load_evals(db)] == list(range(50))


def test_a_thread_pool_runs_the_function_itself(db):
    seen, lock = [], threading.Lock()

    def function(args):
        with lock:
            seen.append(args)

    with ThreadPoolExecutor(2) as pool:
        assert speval(function, range(5), db, executor=pool, concurrency=2).completed == 5
    assert sorted(seen) == list(range(5))


def test_a_pool_that_is_occupied_by_what_ran_too_long_ends_the_run_and_charges_nobody_who_never_began(db):
    release = threading.Event()

    def function(args):
        if args < 2:
            release.wait(600)
        return args

    with ThreadPoolExecutor(2) as pool:
        try:
            with pytest.raises(ExecutorError, match=r"occupied by 2 calls that ran longer than 0\.3 s"):
                speval(function, range(10), db, executor=pool, concurrency=4, timeout=0.3, max_attempts=1)
        finally:
            release.set()
    found = [(e["status"], e["attempts"]) for e in load_evals(db)]
    assert found == [("failed", 1)] * 2 + [("pending", 0)] * 8
    assert speval(function, range(10), db).completed == 8


@one_cluster
def test_a_second_attempt_is_not_answered_with_dasks_first_result(cluster, db, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()

    def function(args):
        number = len(list(marks.iterdir()))
        (marks / str(number)).touch()
        if number == 0:
            raise OSError
        return number

    assert speval(function, [1], db, executor=cluster.get_executor(), retry_on=OSError, backoff=0).completed == 1
    assert load_evals(db)[0]["result"] == 1


def test_what_can_not_be_pickled_is_refused_before_anything_is_claimed(db):
    lock = threading.Lock()
    with make_process_pool() as pool, pytest.raises(FunctionError, match="'lock'"):
        speval(lambda args: lock, [1], db, executor=pool)
    assert not db.exists()
