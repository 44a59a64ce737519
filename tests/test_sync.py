"""The blocking calls: from scripts, from threads, beside a running event loop, in a notebook."""

import asyncio
import contextvars
import os
import pty
import select
import signal
import sqlite3
import struct
import sys
import termios
import threading
import time
from fcntl import ioctl

import pytest

from speval import OptionError, as_completed, load_evals, retry, speval
from speval.stores.sqlite.states import STATES

from .conftest import Scripts, rows, wait_for


def test_the_classic_call(db):
    summary = speval(lambda args: {"v": args}, [1, 2, 3], db)
    assert (summary.completed, summary.recorded) == (3, 3)
    assert [e["result"] for e in load_evals(db)] == [{"v": 1}, {"v": 2}, {"v": 3}]


def test_positional_arguments_are_the_classic_ones(db):
    async def function(args):
        return args

    assert speval(function, {"a": 1}, str(db), 60).completed == 1


def test_coroutines_run_from_blocking_code(db):
    async def function(args):
        await asyncio.sleep(0.01)
        return args

    assert speval(function, range(100), db, concurrency=50).completed == 100


def test_retry_and_failures(db):
    def function(args):
        raise ValueError

    assert speval(function, range(3), db).failed == 3
    assert retry(db, ["0", "2"]) == 2
    assert [e["status"] for e in load_evals(db)] == ["pending", "failed", "pending"]


def test_as_completed_yields_and_leaving_early_releases(db):
    seen = []
    for e in as_completed(lambda args: args, range(10_000), db):
        seen.append(e["name"])
        if len(seen) == 5:
            break
    assert len(seen) == 5
    assert rows(db, f"SELECT count(*) FROM {STATES} WHERE worker IS NOT NULL") == [(0,)]
    rest = [e["name"] for e in as_completed(lambda args: args, range(10_000), db)]
    assert sorted(map(int, rest)) == list(range(10_000))


def test_as_completed_checks_options_at_once(db):
    with pytest.raises(OptionError):
        as_completed(print, [1], db, concurrency=0)


def test_an_exception_in_the_loops_body_comes_out_and_releases(db):
    with pytest.raises(ZeroDivisionError):
        for _ in as_completed(lambda args: args, range(1000), db):
            raise ZeroDivisionError
    assert rows(db, "SELECT count(*) FROM workers WHERE ended_at IS NULL") == [(0,)]


async def test_it_works_where_an_event_loop_is_running(db):
    assert speval(lambda args: args, range(3), db).completed == 3
    assert len(load_evals(db)) == 3
    assert len(list(as_completed(lambda args: args, range(3), db))) == 3


def test_it_works_in_several_threads_at_once(db):
    summaries = []
    threads = [threading.Thread(target=lambda: summaries.append(speval(lambda a: a, range(300), db))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [s.completed for s in summaries] == [300] * 4
    assert sum(s.recorded for s in summaries) == 300


def test_the_eval_space_is_read_in_the_calling_thread(db):
    # A generator over a connection of sqlite3 works in the thread that made it only.
    connection = sqlite3.connect(":memory:")
    space = (row[0] for row in connection.execute("SELECT 7 UNION SELECT 8"))
    assert speval(lambda args: args, space, db).completed == 2
    assert [e["result"] for e in load_evals(db)] == [7, 8]
    connection.close()


def test_context_variables_reach_the_function(db):
    variable = contextvars.ContextVar("variable")
    variable.set("set by the caller")
    speval(lambda args: variable.get(), [1], db)
    assert load_evals(db)[0]["result"] == "set by the caller"


def test_errors_come_out_as_they_are(db):
    db.write_bytes(b"no database at all, but long enough to be read as one" * 100)
    with pytest.raises(Exception, match="not a speval database") as caught:
        speval(print, [1], db)
    assert "runs.db" in str(caught.value)


def test_pandas_like_reading_gives_one_row_each(db):
    speval(lambda args: args, range(3), db)
    evaluations = load_evals(db)
    assert all(
        list(e) == ["name", "status", "updated", "result", "args", "attempts", "error", "started", "duration", "worker"]
        for e in evaluations
    )


def test_a_coroutine_that_refuses_to_end_does_not_keep_the_program_from_ending(scripts: Scripts):
    done = scripts.run(
        """
        import asyncio
        from speval import speval
        async def stubborn(args):
            while True:
                try:
                    await asyncio.sleep(600)
                except BaseException:
                    pass
        print(speval(stubborn, [1], "runs.db", timeout=0.1, max_attempts=1).failed)
        """
    )
    assert done.stdout == "1\n", done.stderr
    assert done.returncode == 0, done.stderr


def test_a_thread_that_never_ends_does_not_keep_the_program_from_ending(scripts: Scripts):
    done = scripts.run(
        """
        import time
        from speval import speval
        print(speval(time.sleep, [600], "runs.db", timeout=0.1, max_attempts=1, executor="thread").failed)
        """
    )
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr
    assert "which can't be stopped" in done.stderr
    assert "evaluation '0' failed in attempt 1: TimeoutError: ran longer than 0.1 s" in done.stderr


def test_in_a_notebook(tmp_path, db):
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    cells = [
        "from speval import speval, load_evals, as_completed, aio",
        f"db = {str(db)!r}",
        "print(speval(lambda args: args * 2, range(4), db).completed)",
        "async def double(args): return args * 2",
        "print((await aio.speval(double, range(6), db)).completed)",
        "print([e['result'] for e in load_evals(db)], len(list(as_completed(double, range(6), db, progress=False))))",
    ]
    notebook = new_notebook(cells=[new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = ["".join(o["text"] for o in c["outputs"] if o.get("name") == "stdout") for c in notebook.cells]
    assert texts[2] == "4\n"
    assert texts[4] == "6\n"
    assert texts[5] == "[0, 2, 4, 6, 8, 10] 6\n"


# Ctrl-C, in a real terminal


class Terminal:
    """A program in the foreground of a terminal of its own."""

    def __init__(self, script, *arguments) -> None:
        self.output = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(script.parent)
            os.environ["PYTHON_COLORS"] = "0"  # later Pythons colour what the tests read
            os.execv(sys.executable, [sys.executable, str(script), *arguments])
        ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.status: int | None = None

    def read(self) -> str:
        while select.select([self.fd], [], [], 0)[0]:
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # the program has ended
                break
            if not data:
                break
            self.output += data
        return self.output.decode(errors="replace")

    def interrupt(self) -> None:
        os.write(self.fd, b"\x03")

    def has_ended(self) -> bool:
        self.read()
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def close(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def terminal(scripts: Scripts):
    opened = []

    def start(code, *arguments):
        opened.append(Terminal(scripts.write(code), *arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


INTERRUPTED = """
import asyncio, sys, time
from speval import speval
def plain(args):
    print("started", args, flush=True)
    time.sleep(600)
async def coroutine(args):
    print("started", args, flush=True)
    await asyncio.sleep(600)
speval({"thread": plain, "coroutine": coroutine}[sys.argv[1]], range(5), "runs.db", progress=False)
"""


@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_ctrl_c_releases_what_is_held_and_exits_130(terminal, db, kind):
    program = terminal(INTERRUPTED, kind)
    wait_for(lambda: "started 0" in program.read())
    program.interrupt()
    wait_for(program.has_ended)
    assert program.status == -signal.SIGINT  # what a shell shows as 130
    assert program.read().rstrip().endswith("KeyboardInterrupt")
    assert program.read().count("Traceback") == 1
    assert rows(db, "SELECT status, count(*) FROM evals GROUP BY 1") == [("pending", 5)]
    assert rows(db, f"SELECT sum(attempt - released) FROM {STATES}") == [(0,)]
    assert rows(db, "SELECT count(*) FROM workers WHERE ended_at IS NULL") == [(0,)]
    assert speval(lambda args: args, range(5), db).completed == 5  # at once: nothing has to be waited for


def test_a_second_ctrl_c_exits_at_once(terminal, db):
    program = terminal(
        """
        import asyncio
        from speval import speval
        async def stubborn(args):
            print("started", flush=True)
            while True:
                try:
                    await asyncio.sleep(600)
                except asyncio.CancelledError:
                    print("refused", flush=True)
                    while True:
                        try:
                            await asyncio.sleep(600)
                        except asyncio.CancelledError:
                            pass
        import speval.executors.coroutine
        speval.executors.coroutine.GRACE = 600
        speval.speval(stubborn, range(5), "runs.db", progress=False)
        """
    )
    wait_for(lambda: "started" in program.read())
    program.interrupt()
    wait_for(lambda: "refused" in program.read())
    program.interrupt()
    wait_for(program.has_ended)
    assert program.status == -signal.SIGINT
    # Its claim was not given back, but the process is gone: the next run takes it back without waiting for the lease.
    started = time.monotonic()
    assert speval(lambda args: args, range(5), db).completed == 5
    assert time.monotonic() - started < 20  # the lease is 30 s


def test_a_progress_bar_shows_in_a_terminal_and_not_elsewhere(terminal, scripts, db):
    code = """
    import time
    from speval import speval
    def function(args):
        time.sleep(0.1)
        if args == 7:
            raise ValueError
    print(speval(function, range(8), "runs.db"))
    """
    program = terminal(code)
    wait_for(program.has_ended)
    assert "8/8" in program.read()
    assert "1 failed" in program.read()
    db.unlink()
    assert "8/8" not in scripts.run(code).stderr
