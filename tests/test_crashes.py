"""kill -9 and SIGSTOP at random moments and at every commit, many processes on one file, and a reader that won't let go.

A short run of what ``-m slow`` does at more points and ``python -m benchmarks.kills`` at length.
"""

import json
import secrets
import shutil
import sqlite3
from collections import Counter
from contextlib import closing

import pytest

from speval import load_evals, speval
from speval.stores.sqlite.states import HOMES

from .conftest import Scripts, signed, wait_for
from .crashes import (
    Round,
    Scenario,
    faults_after,
    held_by_a_dead_copy,
    inconsistencies,
    kill_at_each_step,
    old_database,
    rows,
    storm,
)

slow = pytest.mark.slow


def seed() -> int:
    number = secrets.randbits(32)
    print(f"seed: {number}")
    return number


@pytest.mark.parametrize(("times", "count"), [(8, 200), pytest.param(25, 500, marks=slow)])
def test_copies_killed_at_random_lose_nothing_record_nothing_twice_and_repeat_only_what_was_in_flight(tmp_path, times, count):
    for figures in storm(tmp_path, times=times, seed=seed(), count=count, stops=0.1):
        print(figures)
        assert not figures.problems
        assert (figures.lost, figures.recorded_twice) == (0, 0)
        assert figures.seen >= count


@pytest.mark.parametrize(("times", "count"), [(5, 200), pytest.param(12, 500, marks=slow)])
def test_copies_stopped_past_their_lease_at_random_come_back_and_record_nothing_twice(tmp_path, times, count):
    for figures in storm(tmp_path, times=times, seed=seed(), count=count, stops=0.9):
        print(figures)
        assert not figures.problems
        assert (figures.lost, figures.recorded_twice) == (0, 0)


@pytest.mark.parametrize(
    ("executor", "concurrency", "count"),
    [
        *(("coroutine", 4, 8), ("process", 2, 4)),
        *(pytest.param("coroutine", 4, 20, marks=slow), pytest.param("thread", 2, 10, marks=slow)),
        *(pytest.param("process", 2, 6, marks=slow), pytest.param("pool", 2, 6, marks=slow)),
    ],
    ids=str,
)
def test_killed_before_or_after_any_commit_the_next_start_completes_the_rest(tmp_path, executor, concurrency, count):
    scenario = Scenario(count, {"executor": executor, "concurrency": concurrency, "lease": 1.0})
    kills = kill_at_each_step(tmp_path, scenario)
    labels = {kill.label for kill in kills}
    assert {"_create", "_journal_mode", "close"} < labels
    # How many commits a run needs differs from run to run, so a single late one, such as the last, can be stepped over.
    assert {f"commit of {what}" for what in ("migrate", "fill", "record")} < labels
    assert {kill.side for kill in kills} == {"before", "after"}
    assert [fault for kill in kills for fault in faults_after(kill, count)] == []


@pytest.mark.parametrize("points", [[2], pytest.param([1, 3], marks=slow)], ids=str)
def test_killed_at_any_chunk_while_seeding_thirty_thousand_the_next_start_seeds_the_rest(tmp_path, points):
    kills = kill_at_each_step(tmp_path, Scenario(30_000, points=points, only="commit of fill"))
    assert {kill.label for kill in kills} == {"commit of fill"}
    assert [(kill.side, kill.point) for kill in kills] == [(side, point) for side in ("before", "after") for point in points]
    stored = [rows(kill.db, HOMES) for kill in kills]
    assert stored == [[((kill.point - (kill.side == "before")) * 10_000,)] for kill in kills]
    assert [fault for kill in kills for fault in faults_after(kill, 30_000)] == []


def test_killed_while_migrating_a_database_of_0_1_1_nothing_is_lost(tmp_path):
    old_database(tmp_path / "old.db", 30)
    options = {"executor": "thread", "concurrency": 1, "lease": 1.0}
    kills = kill_at_each_step(tmp_path, Scenario(30, options, tmp_path / "old.db", points=[1, 2, 3, 4, 5]))
    assert "commit of migrate" in {kill.label for kill in kills}
    for kill in kills:
        assert rows(kill.db, "SELECT count(*) FROM evals WHERE status = 'completed'") == [(10,)], kill
    assert [fault for kill in kills for fault in faults_after(kill, 30)] == []


@pytest.mark.parametrize("count", [3, pytest.param(6, marks=slow)])
def test_a_start_reclaims_from_a_dead_worker_and_from_one_killed_while_reclaiming(tmp_path, count):
    (tmp_path / "held").mkdir()
    held = held_by_a_dead_copy(tmp_path / "held", count)
    kills = kill_at_each_step(tmp_path, Scenario(count, begin_with=held))
    assert "commit of take_back" in {kill.label for kill in kills}
    assert [fault for kill in kills for fault in faults_after(kill, count)] == []


def test_the_checks_notice_a_second_execution_a_changed_result_and_a_second_record(tmp_path):
    one = Round(tmp_path, secrets.SystemRandom(), count=20, copies=1, executors=("thread",))
    assert one.run(times=0).problems == []
    log = tmp_path / "executions"
    log.write_text(log.read_text() + "7 1 1.0 0123\n")
    with closing(sqlite3.connect(one.db)) as connection:
        connection.execute("UPDATE attempts SET result = replace(result, '64', '65') WHERE evaluation = 9")
        connection.execute(
            "INSERT INTO attempts (seq, evaluation, attempt, worker, ended_at, outcome, result, final, released, suspect) "
            "SELECT seq + 100, 3, 2, worker, 0, outcome, result, 0, 0, 0 FROM attempts LIMIT 1"
        )
        connection.execute("INSERT INTO claimed VALUES (5, 5, (SELECT id FROM workers), 0, 0.0)")
        connection.commit()
    signed(one.db)
    one.check()
    found = "\n".join(one.figures.problems)
    for what in (
        "evaluation 7 was executed 2 times",
        "evaluation 8 has a result that no execution brought",
        "evaluation 8 was seen as",
        "an evaluation has not exactly one completed attempt",
        "an attempt is neither recorded nor released",
        "a state is not that of a completed evaluation",
    ):
        assert what in found
    assert (one.figures.lost, one.figures.recorded_twice) == (
        3,
        1,
    )  # 8; and 4, which is in two places: not read, and not as seen


# Many processes on one file


MANY = """
import json, logging, os, sys, time
logging.basicConfig(level=logging.INFO)
from pathlib import Path
from speval import speval
from speval.stores.sqlite.file import SqliteFile

waits = []
write = SqliteFile.write

def timed(self, work, *args):
    called = time.monotonic()

    def begun(*args):
        waits.append(time.monotonic() - called)
        return work(*args)

    return write(self, begun, *args)

SqliteFile.write = timed
log = os.open("executions", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

def function(args):
    os.write(log, f"{args}\\n".encode())
    time.sleep(0.001)
    return args

Path(f"ready.{os.getpid()}").touch()
while not Path("go").exists():
    time.sleep(0.005)
speval(function, range(int(sys.argv[1])), "runs.db", lease=3)
print(json.dumps(waits))
"""


@pytest.mark.parametrize(("number", "count"), [(10, 500), pytest.param(32, 1500, marks=slow)])
def test_many_processes_on_one_file_wait_for_its_lock_and_never_hear_of_it(scripts: Scripts, db, tmp_path, number, count):
    script = scripts.write(MANY)
    copies = [scripts.start(script, str(count)) for _ in range(number)]
    wait_for(lambda: len(list(tmp_path.glob("ready.*"))) == number)
    (tmp_path / "go").touch()
    ended = [copy.communicate(timeout=100) for copy in copies]
    assert [copy.returncode for copy in copies] == [0] * number, [err for _, err in ended]
    assert not [out + err for out, err in ended if "locked" in out + err]
    assert Counter((tmp_path / "executions").read_text().split()) == {str(n): 1 for n in range(count)}
    assert inconsistencies(db, count) == []
    waits = sorted(wait for out, _ in ended for wait in json.loads(out))
    print(f"{len(waits)} waits for the lock: p50 {waits[len(waits) // 2]:.4f} s, p99 {waits[len(waits) * 99 // 100]:.4f} s")
    print(f"longest {waits[-1]:.4f} s")


def test_a_reader_that_keeps_its_snapshot_stops_nobody_and_the_log_shrinks_when_it_lets_go(scripts: Scripts, db, tmp_path):
    wal = tmp_path / "runs.db-wal"
    speval(str, range(1), db)
    with closing(sqlite3.connect(db, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM evaluations").fetchone() == (1,)
        script = scripts.write(
            """
            from speval import speval
            speval(lambda n: "x" * 100_000, range(1600), "runs.db")
            """
        )
        copies = [scripts.start(script) for _ in range(2)]
        ended = [copy.communicate(timeout=100) for copy in copies]
        assert [copy.returncode for copy in copies] == [0, 0], ended
        # All of it had to be kept for the reader, which has seen none of it.
        assert wal.stat().st_size > 120e6
        assert reader.execute("SELECT count(*) FROM evaluations").fetchone() == (1,)
        reader.execute("COMMIT")
        assert speval(str, range(1700), db).completed == 1700
        # The reader is still there, so this is not the clean-up of whoever closes the file as the last one.
        assert wal.stat().st_size < 80e6
        assert reader.execute("SELECT count(*) FROM attempts").fetchone() == (1700,)
    assert {e["status"] for e in load_evals(db)} == {"completed"}
    shutil.rmtree(tmp_path)  # pytest would keep it for a while
