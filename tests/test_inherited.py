"""What a script hands on without knowing: limits, defaults, descriptors, forks. None of it costs an evaluation.

And what a function does to the channel and the thread it runs on.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections import Counter

import pytest

from speval import aio, load_evals, speval
from speval.executors.process.group import Group

from .conftest import WAIT, Scripts, wait_for
from .test_process import children, is_alive

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def ended(db):
    return Counter((e["status"], e["attempts"]) for e in load_evals(db))


# What the script has set


def test_a_default_timeout_of_sockets_is_none_of_the_workers_business(scripts: Scripts, db):
    done = scripts.run(
        """
        import socket
        from speval import speval
        socket.setdefaulttimeout(30)
        print(speval(lambda n: n, range(10), "runs.db", executor="process", concurrency=2))
        """
    )
    assert "10 completed" in done.stdout, done.stderr
    assert ended(db) == {("completed", 1): 10}


def test_sockets_of_a_patched_module_do_not_block_the_workers(scripts: Scripts, db):
    done = scripts.run(
        """
        import socket
        class Patched(socket.socket):  # as gevent's: its descriptor never blocks
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                super().setblocking(False)
            def setblocking(self, flag):
                super().setblocking(False)
        pair = socket.socketpair
        socket.socketpair = lambda: tuple(Patched(fileno=one.detach()) for one in pair())
        from speval import speval
        print(speval(lambda n: n, range(10), "runs.db", executor="process", concurrency=2))
        """
    )
    assert "10 completed" in done.stdout, done.stderr


def test_with_ended_children_ignored_a_crash_is_still_a_crash(scripts: Scripts, db):
    done = scripts.run(
        """
        import os, signal
        from speval import speval
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        print(speval(lambda n: os._exit(3) if n == 3 else n, range(6), "runs.db", executor="process", max_attempts=1))
        """
    )
    assert "5 completed, 1 failed (1 crash)" in done.stdout, done.stderr
    assert "status 0" not in done.stderr
    assert "SIGCHLD is ignored" in done.stderr


def test_a_folder_that_is_gone_keeps_no_worker_from_starting(scripts: Scripts, tmp_path):
    done = scripts.run(
        f"""
        import os, sys
        from speval import speval
        os.mkdir("gone"); os.chdir("gone"); os.rmdir("../gone")
        print(speval(lambda n: n, range(4), {str(tmp_path / "there.db")!r}, executor="process", concurrency=2))
        """
    )
    assert "4 completed" in done.stdout, done.stderr


# Limits


FULL = """
import json, resource, sys, time
from speval import speval
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
def function(n):
    time.sleep(0.01)
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
print(speval(function, range(200), "runs.db", executor="process", concurrency=24))
"""


def test_the_soft_limit_of_open_files_is_raised_for_the_workers_and_theirs_is_the_users(scripts: Scripts, db):
    done = scripts.run(FULL.format(soft=80, hard=4096))
    assert "200 completed" in done.stdout, done.stderr
    assert "fewer evaluations run at once" not in done.stderr
    assert {e["result"] for e in load_evals(db)} == {80}


def test_where_no_more_files_may_be_open_it_goes_on_with_the_workers_there_are_and_says_so_once(scripts: Scripts, db):
    done = scripts.run(FULL.format(soft=128, hard=128))
    assert "200 completed" in done.stdout, done.stderr
    assert done.stderr.count("fewer evaluations run at once than the 24 wanted") == 1
    assert "the limit of open files is reached (hard limit 128; raise it with `ulimit -n`)" in done.stderr
    assert ended(db) == {("completed", 1): 200}


def test_where_no_worker_can_be_started_at_all_the_error_names_the_limit(scripts: Scripts, tmp_path):
    done = scripts.run(
        """
        import subprocess
        from speval import FunctionError, speval
        def refused(*args, **kwargs):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        subprocess.Popen = refused  # as the system does at the limit of processes, which root does not have
        try:
            speval(lambda n: n, range(3), "runs.db", executor="process")
        except FunctionError as error:
            print(error)
        """
    )
    assert "no worker process can start: the system starts no more processes for this user" in done.stdout, done.stderr
    assert not (tmp_path / "runs.db").exists()


def test_a_sandbox_without_nameless_memory_costs_nothing(db, monkeypatch):
    def refused(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refused, raising=False)
    assert speval(lambda n: n, range(4), db, executor="process").completed == 4


def test_where_no_more_threads_can_be_started_it_goes_on_with_those_there_are(scripts: Scripts, db):
    done = scripts.run(
        """
        import threading, time
        from speval import speval
        start = threading.Thread.start
        def limited(thread):
            ours = [one for one in (thread, *threading.enumerate()) if one.name.startswith("speval slot")]
            if thread in ours and len(ours) > 3:
                raise RuntimeError("can't start new thread")
            start(thread)
        threading.Thread.start = limited
        print(speval(lambda n: time.sleep(0.005), range(60), "runs.db", executor="thread", concurrency=16))
        """
    )
    assert "60 completed" in done.stdout, done.stderr
    assert done.stderr.count("fewer evaluations run at once than the 16 wanted: can't start new thread") == 1
    assert ended(db) == {("completed", 1): 60}


async def test_slots_that_the_system_had_no_room_for_are_tried_again(db, monkeypatch):
    monkeypatch.setattr("speval.engine.slots._ROOM_AGAIN", 0.05)
    start, room, all_at_once = threading.Thread.start, 3, threading.Barrier(16)

    def limited(thread):
        others = [other for other in threading.enumerate() if other.name.startswith("speval slot")]
        if thread.name.startswith("speval slot") and len(others) >= room:
            raise RuntimeError("can't start new thread")
        start(thread)

    def function(args):
        nonlocal room
        if args == 20:
            room = 16
        elif args > 20:
            all_at_once.wait(WAIT)

    monkeypatch.setattr(threading.Thread, "start", limited)
    summary = await aio.speval(function, range(37), db, executor="thread", concurrency=16)
    assert summary.completed == 37


# What a function does to what it runs on


def test_whatever_a_function_writes_to_any_descriptor_costs_its_own_evaluation_only(db):
    garbage = [b"\xff" * 64, b"x", bytes(16), (2**60).to_bytes(8, "little") * 4, b"\xe9" * 100_000]

    def function(n):
        if n < len(garbage):
            for fd in map(int, os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd")):
                if fd > 2:
                    try:
                        os.set_blocking(fd, False)
                        os.write(fd, garbage[n])
                    except OSError:
                        pass
        return n

    summary = speval(function, range(40), db, executor="process", concurrency=2, max_attempts=1)
    assert (summary.completed + summary.failed, summary.causes.get("crash", 0)) == (40, summary.failed)
    for e in load_evals(db):
        assert e["result"] == int(e["name"]) if e["status"] == "completed" else int(e["name"]) < len(garbage)
    assert summary.failed >= 4  # a single byte may look like the beginning of a message


def test_a_function_that_reads_what_is_not_its_own_costs_its_own_evaluation_only(db):
    def function(n):
        if n == 0:
            for fd in range(3, 300):
                try:
                    os.set_blocking(fd, False)
                    os.read(fd, 1 << 16)
                except OSError:
                    pass
        return n

    summary = speval(function, range(200), db, executor="process", concurrency=2, max_attempts=3)
    assert (summary.completed, summary.failed) == (200, 0)
    assert all(e["result"] == int(e["name"]) for e in load_evals(db))


def test_an_exception_raised_in_a_slots_thread_from_outside_costs_one_evaluation(db, caplog):
    """As ``PyThreadState_SetAsyncExc`` does it, which debuggers and libraries that stop threads use."""

    def function(n):
        if n == 3:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), ctypes.py_object(SystemExit))
        return n

    for _ in range(5):  # it is raised wherever the thread happens to be
        summary = speval(function, range(30), db, executor="thread", max_attempts=1)
        assert summary.completed + summary.failed == 30
        assert summary.completed >= 29
        db.unlink()


async def test_a_thread_that_has_died_without_a_word_is_noticed(db, monkeypatch):
    from speval.executors import thread

    monkeypatch.setattr(thread, "_LOOK", 0.05)
    monkeypatch.setattr(thread._Thread, "_tell_end", lambda self: None)

    def function(n):
        return n

    make_calls, calls = thread._Thread._make_calls, []

    def dying(self):
        calls.append(self)
        if len(calls) > 1:
            return make_calls(self)
        work = self.work.get()
        work.next()
        raise SystemExit

    monkeypatch.setattr(thread._Thread, "_make_calls", dying)
    summary = await aio.speval(function, range(5), db, executor="thread", max_attempts=1)
    assert (summary.completed, summary.failed, dict(summary.causes)) == (4, 1, {"crash": 1})


# The last words


@pytest.mark.parametrize("executor", ["process"])
def test_what_a_worker_does_at_its_exit_is_done(scripts: Scripts, tmp_path, executor):
    done = scripts.run(
        """
        import atexit, time
        from speval import speval
        def late():
            time.sleep(1.2)
            open("written at exit", "a").write("x")
        def function(n):
            if n == 0:
                atexit.register(late)
            return n
        print(speval(function, range(4), "runs.db", executor="process"))
        """
    )
    assert "4 completed" in done.stdout, done.stderr
    assert (tmp_path / "written at exit").read_text() == "x"


@linux
def test_what_ends_after_a_worker_is_waited_for(scripts: Scripts, tmp_path):
    """As the resource tracker of multiprocessing, which removes what the worker has left in shared memory."""
    done = scripts.run(
        """
        import subprocess
        from speval import speval
        def function(n):
            subprocess.Popen(["sh", "-c", "sleep 0.7; echo x > cleaned"]) if n == 0 else None
            return n
        print(speval(function, range(4), "runs.db", executor="process"))
        """
    )
    assert "4 completed" in done.stdout, done.stderr
    assert (tmp_path / "cleaned").read_text() == "x\n"


@linux
def test_a_group_of_zombies_does_not_live(tmp_path):
    leader = os.fork()
    if leader == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(100)
        os._exit(0)
    os.waitpid(leader, 0)
    group = Group(leader)
    assert group.lives()
    group.kill()
    wait_for(lambda: not group.lives(), within=20)


# Forks


FORKING = """
import os, sys, threading, time
from speval import speval
def function(n):
    open(f"worker.{os.getpid()}", "w").close()
    time.sleep(600)
def fork():
    while not any(name.startswith("worker.") for name in os.listdir(".")):
        time.sleep(0.01)
    if os.fork() == 0:
        open(f"child.{os.getpid()}", "w").close()
        time.sleep(600)
        os._exit(0)
threading.Thread(target=fork, daemon=True).start()
speval(function, range(2), "runs.db", executor="process", concurrency=2)
"""


@linux
def test_workers_die_with_their_parent_though_a_child_it_has_forked_lives_on(scripts: Scripts, tmp_path):
    parent = scripts.start(scripts.write(FORKING))
    try:
        wait_for(lambda: len(list(tmp_path.glob("worker.*"))) == 2 and list(tmp_path.glob("child.*")))
        workers = [int(path.suffix[1:]) for path in tmp_path.glob("worker.*")]
        assert set(workers) <= set(children(parent.pid))
        parent.kill()
        wait_for(lambda: not any(is_alive(pid) for pid in workers), "the workers to die")
    finally:
        for path in tmp_path.glob("child.*"):
            os.kill(int(path.suffix[1:]), signal.SIGKILL)


@linux
def test_a_forked_child_that_ends_takes_no_worker_with_it(scripts: Scripts, db):
    done = scripts.run(
        """
        import gc, os, threading, time
        from speval import speval
        def fork():
            time.sleep(0.2)
            if os.fork() == 0:
                gc.collect()
                os._exit(0)
        threading.Thread(target=fork, daemon=True).start()
        def function(n):
            time.sleep(0.02)
            return os.getpid()
        print(speval(function, range(60), "runs.db", executor="process", concurrency=2))
        """
    )
    assert "60 completed" in done.stdout, done.stderr
    assert len({e["result"] for e in load_evals(db)}) == 2


# A reader that goes away


PRINTING = """
import sys
from speval import speval
async def later(n):
    return now(n)
def now(n):
    print("done", n, "." * 5000, flush=True)
    return n
executor = sys.argv[1]
speval(later if executor == "coroutine" else now, range(200), "runs.db", executor=executor, concurrency=2)
"""


@pytest.mark.parametrize("executor", ["coroutine", "thread", "process"])
def test_when_the_reader_of_what_is_printed_goes_the_call_ends_and_no_evaluation_fails(scripts: Scripts, db, executor):
    script = scripts.start(scripts.write(PRINTING), executor)
    assert script.stdout is not None
    assert script.stdout.readline().startswith("done")
    script.stdout.close()
    script.stdout = None  # as `| head -1` ends
    assert script.stderr is not None
    errors = script.stderr.read()
    assert script.wait(60) != 0
    assert "standard output is closed: the evaluations under way are given back" in errors
    statuses = Counter(e["status"] for e in load_evals(db))
    assert set(statuses) == {"completed", "pending"}
    assert {e["attempts"] for e in load_evals(db, status="pending")} == {0}


def test_a_broken_pipe_of_the_functions_own_is_its_failure(db):
    def function(n):
        read, write = os.pipe()
        os.close(read)
        try:
            os.write(write, b"x")
        finally:
            os.close(write)

    for executor in ("thread", "process"):
        assert speval(function, range(2), f"{db}.{executor}", executor=executor).causes == {"exception": 2}


def test_a_hard_limit_that_is_lowered_between_two_calls_keeps_no_worker_from_starting(scripts: Scripts, db):
    done = scripts.run(
        """
        import resource
        from speval import speval
        def limits(n):
            return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        for number, (soft, hard) in enumerate([(120, 4096), (200, 1024)]):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            print(speval(limits, range(number * 4, number * 4 + 4), f"{number}.db", executor="process", concurrency=2))
        """
    )
    assert done.stdout.count("4 completed") == 2, done.stderr


LAST_THREAD = """
import os, resource, shutil, sys, tempfile
from speval import SystemLimitError, speval

folder = tempfile.mkdtemp(dir="/tmp")  # one that the other user can reach
os.chmod(folder, 0o777)
# A call imports what it needs, which the other user may not be able to read.
speval(str, range(5), f"{folder}/0.db", executor="thread", progress=False)
for most in range(1, 20):  # threads
    child = os.fork()
    if not child:
        os.setgid(54321), os.setuid(54321)  # root has no limit
        resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
        try:
            summary = speval(str, range(5), f"{folder}/{most}.db", executor="thread", progress=False)
            os._exit(summary.completed)
        except SystemLimitError as error:
            os.write(2, f"{error}\\n".encode())
            os._exit(100)
        except BaseException as error:
            os.write(2, f"{error!r}\\n".encode())
            os._exit(101)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status)
    if status != 100:
        break
shutil.rmtree(folder)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which can become a user without other processes")
def test_where_no_more_threads_start_the_error_names_the_limit(scripts: Scripts):
    done = scripts.run(LAST_THREAD)
    *refused, last = done.stdout.split()
    assert last == "5", done.stderr
    assert refused
    assert set(refused) == {"100"}, done.stderr
    assert done.stderr.count("`ulimit -u`") >= len(refused)
