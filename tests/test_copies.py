"""Many copies of one script, as real processes: started together, killed, stopped, continued."""

import json
import signal
import time
from collections import Counter

import pytest

from speval import load_evals, speval
from speval.stores.sqlite.states import STATES

from .conftest import Scripts, exists, rows, wait_for

SCRIPT = """
import logging, os, sys, time
logging.basicConfig(level=logging.INFO)
from speval import speval

seconds, count, lease = float(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])

def function(args):
    print(args, os.getpid(), flush=True)
    time.sleep(seconds)
    return os.getpid()

speval(function, range(count), "runs.db", lease=lease)
"""


@pytest.fixture
def db(anywhere, scripts):
    if isinstance(anywhere, str):
        scripts.database = anywhere
    return anywhere


def start(scripts: Scripts, copies: int, seconds: float, count: int, lease: float = 30.0):
    script = scripts.write(SCRIPT)
    return [scripts.start(script, str(seconds), str(count), str(lease)) for _ in range(copies)]


def held_by(db) -> str:
    """Return the query for what is held: process numbers and names."""
    states = "running" if isinstance(db, str) else STATES
    return f"SELECT w.pid, e.name FROM {states} s JOIN workers w ON w.id = s.worker JOIN evaluations e ON e.id = s.id"


def running(db) -> dict[int, str]:
    """Return what runs now: evaluation names by process number."""
    if not exists(db):
        return {}
    try:
        return {pid: str(name) for pid, name in rows(db, held_by(db))}
    except Exception:  # the tables are not there yet
        return {}


@pytest.mark.parametrize(("number", "count"), [(8, 100), pytest.param(20, 200, marks=pytest.mark.slow)])
def test_copies_without_a_main_guard_evaluate_each_once(scripts, db, number, count):
    copies = start(scripts, number, 0.05, count)
    ended = [copy.communicate(timeout=100) for copy in copies]
    assert [copy.returncode for copy in copies] == [0] * number, [err for _, err in ended]
    printed = Counter(line.split()[0] for out, _ in ended for line in out.splitlines())
    assert printed == {str(i): 1 for i in range(count)}
    evaluations = load_evals(db)
    assert {(e["status"], e["attempts"]) for e in evaluations} == {("completed", 1)}
    assert not any("locked" in err for _, err in ended)


def test_a_killed_copy_loses_nothing_and_the_others_take_over_at_once(scripts, db):
    copies = start(scripts, 4, 0.3, 30)
    wait_for(lambda: len(running(db)) == 4)
    victim = copies[0]
    victim.kill()
    victim.wait()
    killed_at = time.time()
    for copy in copies[1:]:
        _, err = copy.communicate(timeout=100)
        assert copy.returncode == 0, err
    evaluations = load_evals(db)
    assert {e["status"] for e in evaluations} == {"completed"}
    lost = rows(db, "SELECT evaluation, ended_at FROM attempts WHERE outcome = 'lost'")
    assert len(lost) == 1
    assert sum(e["attempts"] for e in evaluations) == 31
    # The lease is 30 s: without looking at the process it could not have been taken back before.
    assert lost[0][1] - killed_at < 15


def test_when_all_copies_are_killed_the_next_start_resumes_without_waiting(scripts, db):
    copies = start(scripts, 3, 0.05, 60, lease=600)
    wait_for(lambda: exists(db) and len(running(db)) == 3)
    wait_for(lambda: rows(db, "SELECT count(*) FROM evals WHERE status = 'completed'")[0][0] >= 10)
    for copy in copies:
        copy.kill()
    for copy in copies:
        copy.wait()
    done = {e["name"]: e["result"] for e in load_evals(db, status="completed")}
    called = []
    summary = speval(lambda args: called.append(args), range(60), db)
    assert summary.completed == 60
    assert not {str(args) for args in called} & set(done)
    assert {e["name"]: e["result"] for e in load_evals(db) if e["name"] in done} == done


def test_a_stopped_copy_is_fenced_off_and_goes_on_with_new_claims(scripts, db):
    copies = start(scripts, 4, 0.3, 60, lease=1)
    pids = wait_for(lambda: len(running(db)) == 4 and running(db))
    victim = copies[0]
    wait_for(lambda: victim.pid in running(db))
    victim.send_signal(signal.SIGSTOP)
    # It may have been stopped between two evaluations; then it holds none.
    held = running(db).get(victim.pid)
    assert pids
    wait_for(lambda: victim.pid not in running(db))
    before = rows(db, "SELECT count(*) FROM workers WHERE pid = ?", victim.pid)
    victim.send_signal(signal.SIGCONT)
    ended = [copy.communicate(timeout=100) for copy in copies]
    assert [copy.returncode for copy in copies] == [0] * 4
    evaluations = load_evals(db)
    assert {e["status"] for e in evaluations} == {"completed"}
    assert "was declared dead; it starts anew" in ended[0][1]
    assert rows(db, "SELECT count(*) FROM workers WHERE pid = ?", victim.pid)[0][0] == before[0][0] + 1, ended[0][1]
    if held is not None:
        refused = f"evaluation '{held}': attempt 1 ended after another worker had been given it; its outcome is refused"
        assert refused in ended[0][1]
        (evaluation,) = [e for e in evaluations if e["name"] == held]
        assert evaluation["attempts"] == 2
        attempts = rows(db, "SELECT outcome, worker FROM attempts WHERE evaluation = ? ORDER BY attempt", int(held) + 1)
        assert [outcome for outcome, _ in attempts] == ["lost", "completed"]
        assert attempts[0][1] != attempts[1][1]


def test_two_thousand_coroutines_resume_after_a_kill_without_repeating_a_finished_one(scripts, db, tmp_path):
    script = scripts.write(
        """
        import asyncio, os
        from speval import speval
        log = os.open("calls", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        async def function(args):
            os.write(log, f"{args}\\n".encode())
            await asyncio.sleep(0.05)
            return args
        speval(function, range(2000), "runs.db", concurrency=500)
        """
    )
    first = scripts.start(script)
    wait_for(lambda: (tmp_path / "calls").exists() and (tmp_path / "calls").read_text().count("\n") >= 900)
    first.kill()
    first.wait()
    done = {e["name"] for e in load_evals(db, status="completed")}
    assert 0 < len(done) < 2000
    first_calls = Counter((tmp_path / "calls").read_text().split())
    (tmp_path / "calls").unlink()
    second = scripts.start(script)
    _, err = second.communicate(timeout=100)
    assert second.returncode == 0, err
    second_calls = Counter((tmp_path / "calls").read_text().split())
    assert not done & set(second_calls)
    assert set(first_calls) | set(second_calls) == {str(i) for i in range(2000)}
    assert max(second_calls.values()) == 1
    # Only what was in flight ran twice.
    assert len(set(first_calls) & set(second_calls)) <= 1000
    assert all(e["status"] == "completed" for e in load_evals(db))


def test_copies_started_one_after_the_other_share_what_is_left(scripts, db):
    first = start(scripts, 1, 0.1, 40)
    wait_for(lambda: running(db))
    second = start(scripts, 1, 0.1, 40)
    outs = [copy.communicate(timeout=100)[0].splitlines() for copy in first + second]
    assert len(outs[0]) + len(outs[1]) == 40
    assert min(len(outs[0]), len(outs[1])) >= 5


HELD_BACK = """
import os, sys, time
from speval import speval

def function(args):
    while args >= 300 and not os.path.exists(f"release {args}"):
        time.sleep(0.01)

speval(function, range(312), "runs.db", executor=sys.argv[1], concurrency=2)
"""


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_a_late_copy_gets_its_share_of_long_evaluations_also_when_short_ones_came_before(scripts, db, tmp_path, executor):
    def held() -> dict[int, list[int]]:
        """Return what each copy holds, claimed ahead or running, by process number."""
        by_copy: dict[int, list[int]] = {}
        for pid, name in rows(db, held_by(db)):
            by_copy.setdefault(pid, []).append(int(name))
        return by_copy

    def two_each() -> bool:
        now = held().values()
        return [len(names) for names in now] == [2, 2] and all(map(released.isdisjoint, now))

    script = scripts.write(HELD_BACK)
    first = scripts.start(script, executor)
    wait_for(lambda: exists(db) and len(load_evals(db, status="completed")) == 300)
    wait_for(lambda: len(held()[first.pid]) == 2)  # what had been claimed ahead is given back
    late = scripts.start(script, executor)
    released: set[int] = set()
    shares = {first.pid: 0, late.pid: 0}
    for _ in range(3):
        wait_for(two_each)
        for pid, names in held().items():
            shares[pid] += len(names)
            for name in names:
                released.add(name)
                (tmp_path / f"release {name}").touch()
    for copy in (first, late):
        assert copy.communicate(timeout=100)[1] == ""
    assert shares == {first.pid: 6, late.pid: 6}


def test_a_reader_beside_many_writers_waits_for_nobody_and_stops_nobody(scripts, db):
    copies = start(scripts, 3, 0.001, 600)
    wait_for(lambda: running(db))
    reads = 0
    while any(copy.poll() is None for copy in copies):
        assert len(load_evals(db)) == 600
        reads += 1
    ended = [copy.communicate(timeout=100) for copy in copies]
    assert [copy.returncode for copy in copies] == [0] * 3, ended
    assert reads > 0
    assert json.dumps([e["status"] for e in load_evals(db)]).count("completed") == 600


def test_a_worker_alone_finishes_what_a_killed_one_could_not_even_when_it_dies_with_it_each_time(scripts, db):
    script = scripts.write(
        """
        import os, sys
        from speval import speval
        def poison(args):
            if args == 3:
                os._exit(9)
            return args
        print(speval(poison, range(20), "runs.db", max_attempts=2))
        """
    )
    codes = []
    for _ in range(4):
        copy = scripts.start(script)
        _, err = copy.communicate(timeout=60)
        codes.append(copy.returncode)
        if copy.returncode == 0:
            break
    assert codes == [9, 9, 0], err
    by_name = {e["name"]: e for e in load_evals(db)}
    assert by_name.pop("3")["error"]["cause"] == "lost"
    # Its neighbours, claimed with it but not the cause, were not made to pay.
    assert {e["status"] for e in by_name.values()} == {"completed"}


def test_one_that_kills_its_worker_takes_none_with_it_that_had_not_begun_even_with_a_single_attempt(scripts, db):
    script = scripts.write(
        """
        import os
        from speval import speval
        begun = open("begun.txt", "a", buffering=1)
        async def poison(args):
            begun.write(f"{args}\\n")
            if args == 300:
                os._exit(9)
        print(speval(poison, range(3000), "runs.db", max_attempts=1))
        """
    )
    codes = []
    while 0 not in codes and len(codes) < 6:
        copy = scripts.start(script)
        _, err = copy.communicate(timeout=60)
        codes.append(copy.returncode)
    assert codes[-1] == 0, err
    # One that had ended, and was not recorded yet, is lost as well; one that was only claimed never is.
    failed = {e["name"] for e in load_evals(db, status="failed")}
    assert "300" in failed
    assert failed <= set((scripts.folder / "begun.txt").read_text().split()[:301])
    assert len(load_evals(db, status="completed")) == 3000 - len(failed)
