"""Ctrl-C, exit, fork and garbage collection at every moment of a blocking call: it ends, and nothing stays behind."""

import asyncio
import gc
import itertools
import sqlite3
import sys
import threading
import time
from contextlib import closing

import pytest

from speval import FunctionError, aio, as_completed, load_evals, speval, sync
from speval import open_calls as calls
from speval import portal as crossing
from speval.stores.sqlite import record as recording
from speval.stores.sqlite.contents import GuardedConnection
from speval.stores.sqlite.file import SqliteFile
from speval.stores.sqlite.states import STATES

from .conftest import Scripts, our_threads, rows, wait_for

OURS = {sync.__file__, crossing.__file__, calls.__file__}


def assert_nothing_held(db):
    """Fail if a claim, a live worker or the write lock is left."""
    if not db.exists():
        return
    with closing(sqlite3.connect(db, timeout=0, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")  # raises at once if anybody holds the lock
        connection.execute("ROLLBACK")
        if connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'evaluations'").fetchone() == (1,):
            held = f"SELECT count(*) FROM {STATES} WHERE worker IS NOT NULL OR status IN (1, 4)"
            assert connection.execute(held).fetchone() == (0,)
            assert connection.execute("SELECT count(*) FROM workers WHERE ended_at IS NULL").fetchone() == (0,)


def interrupted(call, db, step):
    """Call with a KeyboardInterrupt at so many lines of our code in this thread; return whether it got there and came out."""
    seen, where = 0, None

    def trace(frame, event, _):
        nonlocal seen, where
        if frame.f_code.co_filename not in OURS:
            return None
        seen += event == "line"
        if seen == step and event == "line":
            sys.settrace(None)
            where = f"{frame.f_code.co_name}:{frame.f_lineno}"
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call(db)
    except KeyboardInterrupt:
        return where, True
    finally:
        sys.settrace(before)
    return where, False


def evaluated(db):
    speval(abs, range(3), db, progress=False)


def closed(db):
    results = as_completed(abs, range(300), db, progress=False)
    next(results)
    results.close()


@pytest.mark.parametrize("call", [evaluated, closed])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a finalizer, after close()
def test_ctrl_c_at_any_line_comes_out_and_nothing_stays_behind(tmp_path, call):
    for step in itertools.count(1):
        db = tmp_path / f"{step}.db"
        where, came_out = interrupted(call, db, step)
        if where is None:
            break
        assert came_out or call is closed, where
        assert_nothing_held(db)
        wait_for(lambda: not our_threads(), where)  # a thread that came too late to begin ends by itself
        assert not calls._open, where
    assert step > 40
    assert speval(abs, range(3), tmp_path / "next.db").completed == 3


def test_a_generator_left_open_does_not_keep_the_script_from_ending_and_gives_back_what_it_holds(scripts: Scripts, db):
    code = """
    import atexit, sys, time
    atexit.register(lambda: print('over', type(list(one)).__name__))  # runs when it is closed
    from speval import as_completed
    def plain(args):
        time.sleep(0.02)
        return args
    async def coroutine(args):
        import asyncio
        await asyncio.sleep(0.02)
        return await asyncio.to_thread(abs, args)  # pools of threads are closed at exit
    function = coroutine if sys.argv[1] == "coroutine" else plain
    options = {"executor": sys.argv[1], "concurrency": 2, "progress": False}
    one = as_completed(function, range(500), "runs.db", **options)
    two = as_completed(function, range(500), "runs.db", **options)
    never = as_completed(function, range(500), "runs.db", **options)
    next(one), next(two)
    print("end")
    """
    for kind in ("thread", "process", "coroutine"):
        done = scripts.run(code, kind)
        assert (done.stdout, done.stderr, done.returncode) == ("end\nover list\n", "", 0)
        assert_nothing_held(db)
        assert rows(db, "SELECT count(*) FROM evals WHERE status = 'failed'") == [(0,)]


def test_a_daemon_thread_in_a_call_does_not_keep_the_script_from_ending(scripts: Scripts, db):
    done = scripts.run(
        """
        import threading, time
        from speval import as_completed, speval
        started = threading.Event()
        def function(args):
            started.set()
            time.sleep(0.02)
        def call():
            speval(function, range(5000), "runs.db", progress=False)
            print("not so")
        def loop():
            for _ in as_completed(function, range(5000), "runs.db", progress=False):
                pass
            print("nor so")
        for target in (call, loop):
            threading.Thread(target=target, daemon=True).start()
        started.wait()
        print("end")
        """
    )
    assert (done.stdout, done.stderr, done.returncode) == ("end\n", "", 0)
    assert_nothing_held(db)


def test_a_call_in_another_thread_goes_on_when_the_main_thread_ends(scripts: Scripts, db):
    done = scripts.run(
        """
        import threading, time
        from speval import speval
        started = threading.Event()
        def function(args):
            started.set()
            time.sleep(0.005)
        def call():
            print(speval(function, range(100), "runs.db", progress=False).completed)
        threading.Thread(target=call).start()
        started.wait()
        """
    )
    assert (done.stdout, done.stderr, done.returncode) == ("100\n", "", 0)


@pytest.mark.parametrize("thread", ["speval store", "speval lease", "speval loop", "MainThread"])
def test_a_generator_collected_in_any_thread_ends_and_holds_no_lock(db, monkeypatch, thread):
    """The collection is called for in that thread, in the middle of what it does."""
    from speval.engine.lease import Lease
    from speval.stores.sqlite.store import SqliteStore

    class Search:
        def __init__(self):
            self.me = self
            self.results = as_completed(abs, range(100_000), db, progress=False)

    dropped, collected = threading.Event(), threading.Event()

    def collect(*_args, **_kwargs):
        if dropped.is_set() and not collected.is_set() and threading.current_thread().name == thread:
            gc.collect()
            collected.set()

    def first(owner, name):
        real = getattr(owner, name)

        def both(*args, **kwargs):
            collect()
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, both)

    first(recording, "record")  # in the store's thread, within a transaction
    first(SqliteStore, "record")  # in the loop's
    first(Lease, "_beat")
    gc.disable()
    try:
        search = Search()
        next(search.results)
        del search
        dropped.set()
        wait_for(lambda: collect() or collected.is_set())
    finally:
        gc.enable()
    wait_for(lambda: not our_threads())
    assert_nothing_held(db)


def test_a_generator_may_be_closed_by_another_thread_also_while_it_is_asked(db):
    release = threading.Event()
    results = as_completed(lambda args: args or release.wait(60), range(2), db, progress=False)
    left = []
    thread = threading.Thread(target=lambda: left.extend(results))
    thread.start()
    wait_for(lambda: db.exists() and our_threads() and any(t.name == "speval slot 0" for t in our_threads()))
    results.close()
    thread.join(60)
    release.set()
    assert left == []
    assert list(results) == []
    assert_nothing_held(db)


def test_a_forked_child_has_no_part_in_the_parents_call(scripts: Scripts, db):
    done = scripts.run(
        """
        import os, sys
        from speval import SpevalError, as_completed, speval
        results = as_completed(abs, range(100), "runs.db", progress=False)
        next(results)
        if os.fork() == 0:
            try:
                for _ in results:
                    pass
            except SpevalError as error:
                print(error)
            results.close()
            print(speval(abs, range(5), "child.db", progress=False).completed, flush=True)
            sys.exit(0)
        os.wait()
        print(1 + len(list(results)))
        """
    )
    assert done.returncode == 0, done.stderr
    error, child, parent = done.stdout.splitlines()
    assert "call as_completed again in this process" in error
    assert (child, parent) == ("5", "100")


def exits():
    sys.exit(3)


async def exit_soon(error):
    await asyncio.sleep(0)
    raise error


async def in_a_group(error):
    async with asyncio.TaskGroup() as group:
        group.create_task(exit_soon(error))


async def in_a_callback(error):
    asyncio.get_running_loop().call_soon(exits)
    await asyncio.sleep(60)


EXITS = {
    "gathered": lambda error: asyncio.gather(exit_soon(error), exit_soon(ValueError())),
    "awaited": lambda error: asyncio.create_task(exit_soon(error)),
    "shielded": lambda error: asyncio.shield(exit_soon(error)),
    "in a group": in_a_group,
    "in a callback": in_a_callback,
}


@pytest.mark.parametrize("how", EXITS)
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_an_exit_in_what_the_function_starts_fails_its_evaluation_and_the_run_goes_on(db, how, error):
    async def function(args):
        await asyncio.sleep(0.001)
        if args == 5:
            await EXITS[how](error)
        return args

    summary = speval(function, range(20), db, concurrency=4, progress=False)
    assert (summary.completed, summary.failed) == (19, 1)
    (failed,) = load_evals(db, status="failed")
    expected = "SystemExit" if how == "in a callback" else type(error).__name__
    assert (failed["name"], failed["error"]["type"]) == ("5", expected)


def test_a_function_that_stops_the_loop_does_not_end_the_run(db):
    async def function(args):
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.001)

    assert speval(function, range(20), db, concurrency=4, progress=False).completed == 20


def test_an_eval_space_that_exits_is_an_error(db):
    async def drawn():
        yield 1
        raise SystemExit(3)

    async def function(args):
        return args

    with pytest.raises(RuntimeError, match=r"the eval space raised SystemExit\(3\)"):
        speval(function, drawn(), db, progress=False)
    assert_nothing_held(db)


def test_errors_keep_their_cause_in_both_flavours(db):
    lock = threading.Lock()

    def function(args):
        return lock.locked()

    for call in (speval, lambda *args, **options: asyncio.run(aio.speval(*args, **options))):
        with pytest.raises(FunctionError) as caught:
            call(function, [1], db, executor="process")
        assert isinstance(caught.value.__cause__, TypeError)


def test_ctrl_c_at_any_time_from_the_first_moment_on_exits_130_and_holds_nothing(scripts: Scripts, db):
    script = scripts.write(
        """
        import speval
        async def function(args):
            return args
        print("go", flush=True)
        speval.speval(function, range(2000), "runs.db", concurrency=4, progress=False)
        """
    )
    for delay in (0, 0.002, 0.004, 0.008, 0.016, 0.032):
        process = scripts.start(script)
        assert process.stdout.readline() == "go\n"
        time.sleep(delay)  # any moment will do
        process.send_signal(2)
        _, err = process.communicate(timeout=60)
        if process.returncode:  # else a quick machine was done by then
            assert process.returncode == -2, err
            assert err.rstrip().endswith("KeyboardInterrupt"), err
        assert_nothing_held(db)


def test_ctrl_c_during_a_checkpoint_or_a_rescue_comes_out_of_it(db):
    class Interrupted(GuardedConnection):
        """Ctrl-C arrives while a statement runs: SQLite ends the statement."""

        def execute(self, *args):
            self._caught = KeyboardInterrupt()
            raise sqlite3.OperationalError("interrupted")

    assert speval(abs, range(3), db, progress=False).completed == 3
    file = SqliteFile(db, "write", "process")
    connection = sqlite3.connect(db, factory=Interrupted)
    connection.watch(db, "runs.db", 1000)
    usual, file.connection = file.connection, connection
    try:
        with pytest.raises(KeyboardInterrupt):
            file.checkpoint()
        with pytest.raises(KeyboardInterrupt):
            file._watchman.rescue(connection)
    finally:
        file.connection = usual
        connection.close()
        file.close()


def test_ctrl_c_within_the_making_of_an_imported_class_comes_out_as_it_is(scripts):
    done = scripts.run(
        """
        import sys
        import anyio  # but not its backend, which a call imports

        class Interrupting:
            def find_spec(self, name, path=None, target=None):
                if name == "anyio._backends._asyncio":
                    error = RuntimeError("Error calling __set_name__")
                    raise error from KeyboardInterrupt()

        sys.meta_path.insert(0, Interrupting())
        from speval import as_completed, speval
        for call in (lambda: speval(abs, [1], "runs.db"), lambda: next(as_completed(abs, [1], "runs.db"))):
            try:
                call()
            except KeyboardInterrupt:
                print("interrupted")
        """
    )
    assert done.stdout == "interrupted\n" * 2, done.stderr
