"""Processes of their own: what breaks other pools does not break this one."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy
import pytest

from speval import FunctionError, aio, load_evals, speval
from speval.clock import Clock
from speval.executors import make_executor
from speval.executors.base import Work
from speval.model import Claim
from speval.options import Options
from speval.stores.sqlite.states import STATES

from .conftest import Scripts, rows, wait_for
from .test_sync import terminal  # noqa: F401


def is_alive(pid: int) -> bool:
    """Tell whether a process still runs; one that nobody buries does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(parent: int) -> list[int]:
    """Return the live children of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] not in "ZX" and int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def noted(folder: Path) -> list[int]:
    """Return the process numbers that functions have left in a folder, as names of files."""
    return [int(path.name) for path in folder.iterdir()]


@pytest.fixture
def pids(tmp_path) -> Path:
    folder = tmp_path / "pids"
    folder.mkdir()
    return folder


# Scripts of every kind


BARE = """
from speval import speval, load_evals
print("top level")
factor = 3
class Scaled:
    def __init__(self, value):
        self.value = value
    def times(self):
        return self.value * factor
def function(args):
    return Scaled(args).times()
print(speval(function, range(6), "runs.db", concurrency=2).completed)
print([e["result"] for e in load_evals("runs.db")])
"""


def test_a_bare_script_runs_once_and_its_own_classes_and_globals_work(scripts: Scripts):
    done = scripts.run(BARE)
    assert done.stdout == "top level\n6\n[0, 3, 6, 9, 12, 15]\n", done.stderr


def test_a_script_on_stdin(scripts: Scripts):
    done = subprocess.run([sys.executable, "-"], input=BARE, cwd=scripts.folder, capture_output=True, text=True, check=False)
    assert done.stdout == "top level\n6\n[0, 3, 6, 9, 12, 15]\n", done.stderr


def test_a_module_that_calls_speval_while_it_is_imported_runs_once(scripts: Scripts):
    scripts.write(BARE, "experiment.py")
    done = scripts.run("import experiment\nprint('imported', experiment.factor)")
    assert done.stdout == "top level\n6\n[0, 3, 6, 9, 12, 15]\nimported 3\n", done.stderr


def test_a_module_imported_by_name_that_calls_speval_is_refused_with_a_clear_sentence(scripts: Scripts):
    scripts.write(
        "from speval import speval\ndef function(args):\n    return args\nspeval(function, [1], 'module.db')\n",
        "experiment.py",
    )
    done = scripts.run("import experiment, speval\nspeval.speval(experiment.function, [1], 'runs.db', concurrency=2)")
    assert done.returncode == 1
    told = "a worker process imports this module for the function, and the module calls speval() at its top level"
    assert told in done.stderr
    assert 'under if __name__ == "__main__"' in done.stderr


def test_lambdas_closures_partials_and_methods(db):
    import functools

    offset = 10

    class Adder:
        def __init__(self, by):
            self.by = by

        def add(self, args):
            return args + self.by

        __call__ = add

    functions: list[Any] = [
        lambda a: a + offset,
        functools.partial(lambda b, a: a + b, offset),
        Adder(offset).add,
        Adder(offset),
    ]
    for i, function in enumerate(functions):
        assert speval(function, [1, 2], f"{db}.{i}.db", executor="process").completed == 2
        assert [e["result"] for e in load_evals(f"{db}.{i}.db")] == [11, 12]


def test_a_function_of_a_module_that_no_finder_knows(db):
    import types

    module = types.ModuleType("made_up_module")
    exec("helper = 5\ndef function(args):\n    return args + helper", module.__dict__)
    sys.modules["made_up_module"] = module
    try:
        assert speval(module.function, [1], db, executor="process").completed == 1
    finally:
        del sys.modules["made_up_module"]
    import cloudpickle

    assert not cloudpickle.list_registry_pickle_by_value()


def test_a_notebook_cell(tmp_path, db, monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # the kernel does not show what processes print if it sees this
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    cells = [
        "from speval import speval, load_evals\nfactor = 7",
        "def function(args):\n    print('in a worker', args)\n    return args * factor",
        f"print(speval(function, range(3), {str(db)!r}, concurrency=2, progress=False).completed)",
        f"[e['result'] for e in load_evals({str(db)!r})]",
    ]
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert notebook.cells[3].outputs[0]["data"]["text/plain"] == "[0, 7, 14]"
    printed = "".join(o["text"] for c in notebook.cells for o in c["outputs"] if o.get("name") == "stdout")
    assert all(f"in a worker {i}\n" in printed for i in range(3))


def test_the_function_sees_the_callers_path_arguments_and_folder(scripts: Scripts):
    (scripts.folder / "lib").mkdir()
    (scripts.folder / "lib" / "private_helper.py").write_text("value = 'helped'")
    done = scripts.run(
        """
        import os, sys
        sys.path.append("lib")
        from speval import speval, load_evals
        def function(args):
            import private_helper
            return [private_helper.value, sys.argv[1:], os.getcwd(), __name__, bool(__debug__)]
        speval(function, [1], "runs.db", executor="process")
        print(load_evals("runs.db")[0]["result"])
        """,
        "some",
        "arguments",
    )
    assert done.stdout == f"['helped', ['some', 'arguments'], '{scripts.folder}', '__main__', True]\n", done.stderr


def test_a_traceback_names_the_file_of_the_script_and_shows_its_line(scripts: Scripts):
    done = scripts.run(
        """
        from speval import speval, load_evals
        def function(args):
            return sorted(1 / arg for arg in args)
        speval(function, [[0]], "runs.db", executor="process", progress=False)
        print(load_evals("runs.db")[0]["error"]["traceback"])
        """
    )
    start = f'File "{scripts.folder}/script.py", line 4, in '
    assert f"{start}function\n    return sorted(1 / arg for arg in args)\n" in done.stdout
    assert f"{start}<genexpr>\n" in done.stdout


def test_a_cached_function_of_the_script_travels_and_caches_in_each_process(scripts: Scripts):
    done = scripts.run(
        """
        import functools, textwrap
        from speval import speval, load_evals
        calls = []
        @functools.cache
        def model(name):
            calls.append(name)
            return len(calls)
        @functools.lru_cache(maxsize=2, typed=True)
        def fib(n):
            return n if n < 2 else fib(n - 1) + fib(n - 2)
        dedent = functools.cache(textwrap.dedent)
        def function(args):
            return [model("a"), fib(args), fib.cache_parameters()["maxsize"], dedent("  x")]
        fib(30)
        speval(function, [10, 20], "runs.db", executor="process", progress=False)
        print([e["result"] or e["error"]["traceback"] for e in load_evals("runs.db")])
        """
    )
    assert done.stdout == "[[1, 55, 2, 'x'], [1, 6765, 2, 'x']]\n", done.stderr


def test_the_function_may_import_speval_itself(db):
    def function(args):
        from speval import load_evals, speval

        speval(lambda a: a, [args], args)
        return len(load_evals(args))

    assert speval(function, [f"{db}.inner"], db, executor="process").completed == 1
    assert load_evals(db)[0]["result"] == 1


# Crashes stay alone


def crash(args):
    print(f"before {args}", flush=False)
    if args == "segfault":
        import ctypes

        ctypes.string_at(0)
    elif args == "os._exit(3)":
        os._exit(3)
    elif args == "sys.exit(4)":
        sys.exit(4)
    elif args == "sys.exit()":
        sys.exit()
    elif args == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif args == "memory":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
        try:
            bytearray(2**40)
        except MemoryError:
            os.abort()  # as many a C library does
    elif args == "input":
        return input()
    return "fine"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("segfault", "its process was killed by SIGSEGV (Segmentation fault)"),
        ("os._exit(3)", "its process exited with status 3"),
        ("SIGKILL", "its process was killed by SIGKILL (Killed)"),
        ("memory", "its process was killed by SIGABRT (Aborted)"),
        ("sys.exit(4)", "sys.exit(4)"),
        ("sys.exit()", "sys.exit()"),
    ],
)
async def test_a_crash_fails_one_evaluation_and_touches_no_other(db, capfd, how, message):
    space = {str(i): i for i in range(20)} | {how: how} | {str(i): i for i in range(20, 40)}
    summary = await aio.speval(crash, space, db, concurrency=3, executor="process", max_attempts=1)
    assert (summary.completed, summary.failed, summary.causes) == (40, 1, {"crash": 1})
    (failed,) = await aio.load_evals(db, status="failed")
    assert failed["name"] == how
    assert failed["error"]["message"].replace("sys.exit(None)", "sys.exit()") == message
    assert f"before {how}\n" in capfd.readouterr().out


@pytest.fixture
def little_memory():
    """A control group whose processes may have 64 MB; whoever writes its number into the file belongs to it."""
    for folder, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(folder, f"speval-test-{os.getpid()}")
        try:
            group.mkdir()
            (group / limit).write_text(str(64 << 20))
        except OSError:
            with suppress(OSError):
                group.rmdir()
            continue
        yield group / "cgroup.procs"
        wait_for(lambda: not (group / "cgroup.procs").read_text(), "the group to be empty")
        group.rmdir()
        return
    pytest.skip("may not limit the memory of others")


async def test_who_runs_out_of_memory_is_killed_and_fails_alone(db, little_memory):
    def function(args):
        if args == 3:
            little_memory.write_text(str(os.getpid()))
            while True:
                bytearray(256 << 20)[:: 1 << 12] = b"x" * (1 << 16)
        return args

    summary = await aio.speval(function, range(10), db, concurrency=2, max_attempts=1)
    assert (summary.completed, summary.causes) == (9, {"crash": 1})
    (failed,) = await aio.load_evals(db, status="failed")
    assert (failed["name"], failed["error"]["message"]) == ("3", "its process was killed by SIGKILL (Killed)")


async def test_killed_from_outside_it_is_this_evaluations_crash_and_is_tried_again(db, pids):
    def function(args):
        (pids / str(os.getpid())).touch()
        time.sleep(600 if len(list(pids.iterdir())) == 1 else 0)
        return "second"

    running = asyncio.create_task(aio.speval(function, [1], db, executor="process", backoff=0))
    while not list(pids.iterdir()):
        await asyncio.sleep(0.01)
    os.kill(noted(pids)[0], signal.SIGKILL)
    assert (await running).completed == 1
    assert rows(db, "SELECT outcome, error_message FROM attempts ORDER BY seq") == [
        ("crash", "its process was killed by SIGKILL (Killed)"),
        ("completed", None),
    ]


async def test_input_gets_the_end_of_file_and_leaves_the_users_stdin_alone(scripts: Scripts):
    script = scripts.write(
        """
        from speval import speval, load_evals
        speval(lambda args: input(), [1], "runs.db", executor="process")
        print(load_evals("runs.db")[0]["error"]["type"], repr(input()))
        """
    )
    process = scripts.start(script, stdin=subprocess.PIPE)
    out, err = process.communicate("the user's own line\n", timeout=60)
    assert out == 'EOFError "the user\'s own line"\n', err


async def test_a_worker_that_dies_between_calls_is_replaced_and_nobody_pays(db):
    def function(args):
        import threading

        if args == 0:
            threading.Timer(0.3, os._exit, (9,)).start()
        return args

    executor = make_executor(function, Options(executor="process"), Clock())
    slot: Any = executor.slot(0)
    assert (await slot.call("n", "0", None)).result == "0"
    pid = slot._process._popen.pid
    while is_alive(pid):
        await asyncio.sleep(0.01)
    assert (await slot.call("n", "1", None)).result == "1"
    await slot.close()
    await executor.close()


async def test_a_grandchild_that_keeps_the_sockets_open_does_not_hide_a_death(db):
    def function(args):
        if os.fork() == 0:
            time.sleep(600)
        os._exit(5)

    started = time.monotonic()
    summary = await aio.speval(function, [1], db, executor="process", max_attempts=1)
    assert summary.causes == {"crash": 1}
    assert time.monotonic() - started < 60


async def test_a_function_that_can_not_be_loaded_ends_the_run_and_says_why(db):
    class Unloadable:
        def __call__(self, args):
            return args

        def __reduce__(self):
            return (exec, ("raise ImportError('no such driver here')",))

    with pytest.raises(FunctionError, match="no such driver here"):
        await aio.speval(Unloadable(), [1], db, executor="process")
    assert {e["status"] for e in await aio.load_evals(db)} == {"pending"}
    assert rows(db, f"SELECT sum(attempt - released) FROM {STATES}") == [(0,)]


async def test_workers_that_die_before_they_are_ready_end_the_run_and_say_how(db):
    class Deadly:
        def __call__(self, args):
            return args

        def __reduce__(self):
            return (os._exit, (77,))

    with pytest.raises(FunctionError, match="exited with status 77 before it was ready, 3 times"):
        await aio.speval(Deadly(), [1], db, executor="process")


# Timeouts kill


def hang(args):
    """Hang in one of several ways, after noting who is to be dead later."""
    kind, folder = args
    Path(folder, str(os.getpid())).touch()
    if kind == "python":
        while True:
            pass
    elif kind == "c":
        sum(range(10**12))
    elif kind == "sigterm":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(600)
    elif kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "grandchild":
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        child.stdout.readline()
        Path(folder, str(child.pid)).touch()
        child.wait()


HANGS = ["python", "c", "sigterm", "stopped", "grandchild"]


@pytest.mark.parametrize("kind", HANGS)
async def test_a_timeout_leaves_no_process_however_it_hangs(db, pids, kind):
    summary = await aio.speval(hang, [[kind, str(pids)]], db, timeout=1, max_attempts=1)
    ended_at = time.time()
    assert summary.causes == {"timeout": 1}
    assert len(noted(pids)) == (2 if kind == "grandchild" else 1)
    assert not [pid for pid in noted(pids) if is_alive(pid)]
    (evaluation,) = await aio.load_evals(db)
    assert evaluation["duration"] < 30
    assert evaluation["updated"] <= ended_at


async def test_the_outcome_is_recorded_only_after_all_are_dead(db, pids, monkeypatch):
    from speval.stores.sqlite.store import SqliteStore

    alive_when_recorded = []
    original = SqliteStore.record

    async def record(self, record):
        if record.ended:
            alive_when_recorded.append([pid for pid in noted(pids) if is_alive(pid)])
        return await original(self, record)

    monkeypatch.setattr(SqliteStore, "record", record)
    await aio.speval(hang, [["grandchild", str(pids)]], db, timeout=1, max_attempts=1)
    assert alive_when_recorded == [[]]


async def test_eight_at_once_die_as_quickly_as_one(db, pids):
    space = [[HANGS[i % len(HANGS)], str(pids)] for i in range(8)]
    summary = await aio.speval(hang, space, db, timeout=2, concurrency=8, max_attempts=1)
    assert summary.causes == {"timeout": 8}
    assert not [pid for pid in noted(pids) if is_alive(pid)]
    overdue = [e["duration"] - 2 for e in await aio.load_evals(db)]
    # A pool that kills one after the other, each with its grace, would take several seconds for the last.
    assert max(overdue) - min(overdue) < 3


async def test_the_deadline_starts_when_the_function_does_not_while_the_worker_imports(db):
    class Slow:
        def __call__(self, args):
            return args

        def __reduce__(self):
            return (_slowly, ())

    assert (await aio.speval(Slow(), range(3), db, timeout=0.8, executor="process", max_attempts=1)).completed == 3


def _slowly():
    time.sleep(1.2)
    return abs


async def test_a_cancelled_run_leaves_no_process(db, pids):
    before = children(os.getpid())
    task = asyncio.create_task(aio.speval(hang, [[kind, str(pids)] for kind in HANGS], db, executor="process", concurrency=5))
    while len(noted(pids)) < 6:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [pid for pid in noted(pids) if is_alive(pid)]
    assert children(os.getpid()) == before
    assert {(e["status"], e["attempts"]) for e in await aio.load_evals(db)} == {("pending", 0)}


async def test_after_a_run_no_process_is_left(db):
    before = children(os.getpid())
    await aio.speval(crash, range(20), db, concurrency=4)
    assert children(os.getpid()) == before


# The parent dies


@pytest.mark.parametrize("kind", HANGS)
def test_when_the_parent_is_killed_its_workers_and_their_children_die(scripts: Scripts, pids, kind):
    script = scripts.write(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
        from speval import speval
        from tests.test_process import hang
        speval(hang, [[{kind!r}, {str(pids)!r}]] * 2, "runs.db", concurrency=2, executor="process")
        """
    )
    parent = scripts.start(script)
    count = 4 if kind == "grandchild" else 2
    wait_for(lambda: len(noted(pids)) == count)
    workers = [*noted(pids), *children(parent.pid)]
    assert all(is_alive(pid) for pid in noted(pids))
    parent.kill()
    parent.wait()
    killed = time.monotonic()
    wait_for(lambda: not [pid for pid in workers if is_alive(pid)])
    assert time.monotonic() - killed < 20


# Ctrl-C


def test_an_interrupt_sent_to_every_process_is_the_parents_alone_to_act_on(scripts: Scripts, pids, db):
    # As Slurm sends it to a job step.
    script = scripts.write(
        f"""
        import os, pathlib, time
        from speval import speval
        def function(args):
            pathlib.Path({str(pids)!r}, str(os.getpid())).touch()
            time.sleep(60)
        speval(function, range(8), {str(db)!r}, concurrency=4, progress=False)
        """
    )
    # Of what a shell has put into the background, SIGINT is ignored, and that would be inherited.
    program = scripts.start(script, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for(lambda: len(noted(pids)) == 4)
    for pid in [*noted(pids), program.pid]:
        os.kill(pid, signal.SIGINT)
    _, err = program.communicate(timeout=30)
    assert err.count("KeyboardInterrupt") == 1
    assert rows(db, "SELECT count(*) FROM attempts") == [(0,)]
    assert [e["status"] for e in load_evals(db)] == ["pending"] * 8


def test_ctrl_c_kills_the_workers_quietly_and_releases_the_claims(terminal, db, pids):  # noqa: F811
    program = terminal(
        f"""
        import os, time
        from speval import speval
        def function(args):
            open("{pids}/" + str(os.getpid()), "w").close()
            print("started", flush=True)
            time.sleep(600)
        speval(function, range(5), "runs.db", concurrency=2, progress=False)
        """
    )
    wait_for(lambda: program.read().count("started") == 2)
    program.interrupt()
    wait_for(program.has_ended)
    assert program.status == -signal.SIGINT
    assert program.read().count("Traceback") == 1  # the program's own
    assert not [pid for pid in noted(pids) if is_alive(pid)]
    assert {(e["status"], e["attempts"]) for e in load_evals(db)} == {("pending", 0)}
    assert speval(lambda args: args, range(5), db).completed == 5


def test_a_second_ctrl_c_while_the_first_one_cleans_up_leaves_at_once_and_no_process(terminal, db, pids):  # noqa: F811
    program = terminal(
        f"""
        import os, time
        import speval.engine.worker
        speval.engine.worker._STOP_WITHIN = 600  # the clean-up takes as long as the database is locked
        def function(args):
            open("{pids}/" + str(os.getpid()), "w").close()
            time.sleep(600)
        speval.speval(function, range(5), "runs.db", concurrency=2, progress=False)
        """
    )
    wait_for(lambda: len(noted(pids)) == 2)
    with closing(sqlite3.connect(db, isolation_level=None, timeout=30)) as blocker:
        blocker.execute("BEGIN IMMEDIATE")
        program.interrupt()
        wait_for(lambda: not [pid for pid in noted(pids) if is_alive(pid)])
        assert not program.has_ended()
        program.interrupt()
        wait_for(program.has_ended)
        assert program.status == -signal.SIGINT
    assert {(e["status"], e["attempts"]) for e in load_evals(db)} == {("pending", 0), ("in_progress", 1)}
    started = time.monotonic()
    assert speval(lambda args: args, range(5), db).completed == 5
    assert time.monotonic() - started < 20  # the lease is 30 s


def test_what_was_printed_before_a_crash_is_on_the_terminal(terminal, db):  # noqa: F811
    program = terminal(
        """
        import ctypes, subprocess, sys
        from speval import speval
        def function(args):
            print("printed")
            print("to stderr", file=sys.stderr)
            subprocess.run(["echo", "by a child"])
            ctypes.string_at(0)
        print(speval(function, [1], "runs.db", executor="process", max_attempts=1, progress=False).causes)
        """
    )
    wait_for(program.has_ended)
    for line in ("printed", "to stderr", "by a child", "{'crash': 1}"):
        assert line in program.read().splitlines()


# The function travels once


def test_a_large_closure_is_written_once_mapped_by_all_and_not_sent_again(db, monkeypatch):
    from speval.executors import payload
    from speval.executors.process.worker import WorkerProcess

    written, sent = [], []
    write_payload, frame = payload.write_payload, WorkerProcess._frame

    def write(fd, *args):
        write_payload(fd, *args)
        written.append(os.fstat(fd).st_size)

    def counted(process, message):
        sent.append(len(frame(process, message)))
        return frame(process, message)

    monkeypatch.setattr(payload, "write_payload", write)
    monkeypatch.setattr(WorkerProcess, "_frame", counted)
    weights = numpy.ones(13_000_000)  # 104 MB
    weights[17] = 4.5

    def function(args):
        private = sum(
            int(line.split()[1])
            for line in Path("/proc/self/smaps_rollup").read_text().splitlines()
            if line.startswith("Private")
        )
        return [float(weights[17]), private // 1024, os.getpid()]

    assert speval(function, range(64), db, concurrency=8).completed == 64
    results = [e["result"] for e in load_evals(db)]
    assert {result[0] for result in results} == {4.5}
    assert max(result[1] for result in results) < 60  # MiB; a copy of its own would be 104
    assert len(written) == 1
    assert 104e6 <= written[0] < 105e6
    assert max(sent) < 5000  # bytes; the first call of a worker is as small as any other


@pytest.mark.parametrize("count", [1, 2, 10, 20, 50, 200])
def test_a_function_with_many_arrays_travels_whole(db, count):
    arrays = [numpy.arange(1000.0) + i for i in range(count)]
    assert speval(lambda args: float(sum(a[args] for a in arrays)), [0, 999], db, executor="process").completed == 2
    offsets = count * (count - 1) / 2
    assert [e["result"] for e in load_evals(db)] == [offsets, 999 * count + offsets]


def test_what_one_worker_changes_in_a_closure_stays_its_own(db):
    shared = numpy.zeros(1_000_000)

    def function(args):
        shared[0] += 1
        return [os.getpid(), shared[0]]

    speval(function, range(40), db, concurrency=2)
    assert shared[0] == 0
    by_worker = {}
    for pid, count in (e["result"] for e in load_evals(db)):
        by_worker.setdefault(pid, []).append(count)
    for counts in by_worker.values():
        assert sorted(counts) == list(range(1, len(counts) + 1))


def test_what_can_not_be_pickled_is_refused_by_name_before_anything_is_claimed(db):
    import threading

    lock = threading.Lock()

    def function(args):
        with lock:
            return args

    with pytest.raises(FunctionError, match=r"function can't run in worker processes: its variable 'lock' is a lock") as caught:
        speval(function, [1], db, executor="process")
    assert "executor='thread'" in str(caught.value)
    assert not db.exists()
    assert speval(function, [1], db, executor="thread").completed == 1


# Batches


class Noted(Work):
    """Claims for a slot; notes what becomes of them, in order."""

    timeout = None

    def __init__(self, claims):
        self.claims = claims
        self.order = []
        self.back = []

    def ended(self, claim, outcome):
        self.order.append(claim.id)

    def give_back(self, claims):
        self.order.append("back")
        self.back += claims


async def test_what_waits_behind_a_slow_call_is_given_to_others():
    def function(args):
        time.sleep(args)
        return args

    executor = make_executor(function, Options(executor="process"), Clock())
    slot: Any = executor.slot(0)
    claims = [Claim(i, 1, 1, str(i), "0.4" if i == 1 else "0", 1) for i in range(6)]
    first = Noted(claims)
    while [id for id in first.order if id != "back"] != [0, 1]:  # on a busy machine the first call may look slow too
        first = Noted(claims)
        await slot.run(first)
        assert [id for id in first.order if id != "back"] + [c.id for c in first.back] == [0, 1, 2, 3, 4, 5]
    assert first.order == [0, "back", 1]
    rest = Noted(first.back)
    await slot.run(rest)
    assert rest.order == [2, 3, 4, 5]
    await slot.close()
    await executor.close()


async def test_of_a_batch_only_the_call_that_hangs_times_out_and_only_the_one_that_crashes_crashes(db):
    def function(args):
        if args % 100 == 50:
            os._exit(1)
        if args % 100 == 75:
            time.sleep(600)
        return args

    summary = await aio.speval(function, range(400), db, concurrency=2, timeout=1.0, max_attempts=1)
    assert summary.causes == {"crash": 4, "timeout": 4}
    assert summary.completed == 392
    failed = {e["name"]: e["error"]["cause"] for e in await aio.load_evals(db, status="failed")}
    assert failed == {str(i): "crash" if i % 100 == 50 else "timeout" for i in range(400) if i % 100 in (50, 75)}
    assert {e["attempts"] for e in await aio.load_evals(db)} == {1}


@pytest.fixture
def batch_sizes(monkeypatch) -> list[int]:
    """How many calls each message to a worker process had."""
    from speval.executors.process import worker as worker_process

    sizes = []
    original = worker_process.WorkerProcess.send

    def send(self, calls):
        sizes.append(len(calls))
        original(self, calls)

    monkeypatch.setattr(worker_process.WorkerProcess, "send", send)
    return sizes


async def test_short_calls_travel_in_batches(db, batch_sizes):
    await aio.speval(abs, range(5000), db, concurrency=2)
    assert sum(batch_sizes) >= 5000  # some wait behind one that a busy machine slows down, and travel again
    assert max(batch_sizes) > 8


async def test_long_calls_do_not_travel_in_batches(db, batch_sizes):
    await aio.speval(lambda args: time.sleep(0.02), range(40), db, concurrency=4)
    assert set(batch_sizes) == {1}
