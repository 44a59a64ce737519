"""Leases: who is dead, when to renew, when to doubt, decided on one's own monotonic clock."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from speval import speval
from speval.engine.lease import Lease
from speval.engine.run import Run
from speval.errors import DatabaseError, DatabaseLockedError, DatabaseUnavailableError, StoreClosedError
from speval.host import Process, is_gone, this_process
from speval.stores.base import LeaseKeeping, Reclaimed
from speval.stores.liveness import Watch, WorkerRow

from .conftest import wait_for

HERE = Process("host", 1, "boot-1 ns-1", "10")
ELSEWHERE = Process("other", 1, "boot-2 ns-1", "10")


def row(id=1, process=ELSEWHERE, lease=10.0, beat=0, dead=False):
    return WorkerRow(id, process, lease, beat, dead)


# Watching others


def test_a_beat_that_stands_still_for_a_lease_is_death_and_not_a_moment_sooner():
    watch = Watch(HERE.machine)
    assert watch.dead([row(beat=7)], 99, 1000.0) == []
    assert watch.dead([row(beat=7)], 99, 1009.9) == []
    assert watch.dead([row(beat=7)], 99, 1010.0) == [row(beat=7)]


def test_every_beat_starts_the_window_anew():
    watch = Watch(HERE.machine)
    for beat in range(20):
        assert watch.dead([row(beat=beat)], 99, 1000.0 + 9 * beat) == []


@pytest.mark.parametrize("lease", [1e300, float("inf"), float("nan"), 86_401.0])
def test_a_lease_that_no_speval_has_written_is_believed_for_a_day_and_told_once(lease, caplog):
    watch = Watch(HERE.machine)
    rows = [row(lease=lease)]
    assert watch.dead(rows, 99, 0) == watch.dead(rows, 99, 59) == []
    assert caplog.messages == []
    assert watch.dead(rows, 99, 61) == watch.dead(rows, 99, 86_399) == []
    assert len(caplog.messages) == 1
    assert "has not renewed its lease for 61 s; its evaluations are reclaimed when the lease of 86400 s" in caplog.text
    assert watch.dead(rows, 99, 86_400) == rows


def test_a_worker_with_a_short_lease_is_not_told_of_before_its_end(caplog):
    watch = Watch(HERE.machine)
    rows = [row(lease=30)]
    assert watch.dead(rows, 99, 0) == watch.dead(rows, 99, 29.9) == []
    assert caplog.messages == []


def test_the_watched_ones_own_lease_counts():
    watch = Watch(HERE.machine)
    rows = [row(id=1, lease=5), row(id=2, lease=50)]
    watch.dead(rows, 99, 0)
    assert watch.dead(rows, 99, 6) == [rows[0]]


def test_after_forgetting_every_window_starts_anew():
    watch = Watch(HERE.machine)
    watch.dead([row()], 99, 0)
    watch.forget()
    assert watch.dead([row()], 99, 11) == []
    assert watch.dead([row()], 99, 21) == [row()]


def test_one_declared_dead_by_another_is_taken_up_at_once():
    assert Watch(HERE.machine).dead([row(dead=True)], 99, 0) == [row(dead=True)]


def test_a_process_gone_on_this_machine_is_dead_at_once(monkeypatch):
    monkeypatch.setattr("speval.stores.liveness.is_gone", lambda process, machine: process.pid == 7)
    gone = row(id=5, process=Process("host", 7, HERE.machine, "1"))
    assert Watch(HERE.machine).dead([row(), gone], 99, 0) == [gone]


def test_each_process_is_asked_about_by_few_and_yet_every_dead_one_is_found(monkeypatch):
    asked = []

    def gone(process, machine):
        asked.append(process.pid)
        return process.pid in (3, 4, 5, 9)

    monkeypatch.setattr("speval.stores.liveness.is_gone", gone)
    workers = [row(id=i, process=Process("host", i, HERE.machine, "1")) for i in range(10)]
    alive = [w for w in workers if w.id not in (3, 4, 5, 9)]
    found = set()
    for me in alive:
        found |= {d.id for d in Watch(HERE.machine).dead([w for w in workers if w is not me], me.id, 0)}
    assert found == {3, 4, 5, 9}
    assert len(asked) == len(alive) + len(found)


def test_telling_the_dead_from_the_living_costs_no_comparison_of_each_with_each():
    compared = 0

    class Id(int):
        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return int(self) == other

        __hash__ = int.__hash__

    rows = [row(id=Id(i), dead=True) for i in range(500)]
    assert Watch(HERE.machine).dead(rows, 999, 0) == rows
    compared, before = 0, compared
    assert len(Watch(HERE.machine).dead(rows, 999, 0)) == 500
    assert compared < 10 * len(rows), before


@pytest.mark.parametrize("count", [40, 300])
def test_many_workers_together_look_no_more_often_than_few_in_sqlite(count):
    watches = [Watch(HERE.machine) for _ in range(count)]
    looks, now, seconds = 0, 1000.0, 60
    for i in range(int(seconds / 0.4)):
        now = 1000.0 + i * 0.4
        beat = int(now / 10)  # all renew
        rows = [row(id=i, lease=30.0, beat=beat) for i in range(count)]
        for me, watch in enumerate(watches):
            if watch.is_due(me, now):
                looks += 1
                assert watch.dead(rows[:me] + rows[me + 1 :], me, now) == []
    assert looks <= count + 20 * seconds, "each looks at once when it starts, then all of them ten times a second"


def test_among_many_workers_in_sqlite_one_that_stands_still_is_found_when_its_lease_is_over():
    watch = Watch(HERE.machine)
    others = [row(id=i, lease=300.0) for i in range(200)]
    still = row(id=500, lease=5.0)
    assert watch.is_due(999, 1000.0)
    assert watch.dead([*others, still], 999, 1000.0) == []
    assert watch.is_due(999, 1005.0)
    assert watch.dead([*others, still], 999, 1005.0) == [still]
    assert watch.is_due(999, 1005.1), "taking back may have failed for a lock"


def test_a_process_gone_on_this_machine_makes_a_look_due_among_many(monkeypatch):
    gone: set[int] = set()
    monkeypatch.setattr("speval.stores.liveness.is_gone", lambda process, machine: process.pid in gone)
    rows = [row(id=i, process=Process("host", i, HERE.machine, "1"), lease=1000.0) for i in range(200)]
    watch = Watch(HERE.machine)
    assert watch.dead(rows, 999, 0.0) == []
    assert not watch.is_due(999, 0.4)
    gone.add(0)
    assert watch.is_due(999, 0.4)


# Whether a process is gone


def test_a_running_process_is_not_gone():
    me = this_process()
    assert me.pid == os.getpid()
    assert not is_gone(me, me.machine)


def test_an_ended_process_is_gone_even_when_nobody_reaps_it():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    mine = this_process()
    process = Process("host", child.pid, mine.machine, "")
    wait_for(lambda: is_gone(process, mine.machine))
    assert child.returncode is None  # a zombie still
    child.wait()
    assert is_gone(process, mine.machine)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a process's start time")
def test_a_process_number_used_again_is_another_process():
    mine = this_process()
    assert is_gone(Process(mine.host, mine.pid, mine.machine, "1"), mine.machine)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("seen", [("?", ""), ("", "")])
def test_a_process_that_can_not_be_looked_at_counts_as_alive(monkeypatch, seen):
    # No descriptor left to look with, or a /proc that shows nobody the processes of others.
    mine = this_process()
    monkeypatch.setattr("speval.host._stat", lambda pid: seen)
    assert not is_gone(mine, mine.machine)


def test_of_a_process_elsewhere_nothing_is_known():
    mine = this_process()
    assert not is_gone(Process("other", 2**22 + 1, "another boot", "1"), mine.machine)
    assert not is_gone(Process("other", 2**22 + 1, "", "1"), "")


@pytest.mark.skipif(sys.platform != "linux", reason="needs time namespaces")
def test_from_another_time_namespace_a_running_process_is_not_taken_for_dead():
    # The kernel shows there another start of the same process.
    other = "import sys; from speval.host import *; p = Process(*sys.argv[1:2], int(sys.argv[2]), *sys.argv[3:]); "
    other += "print(is_gone(p, this_process().machine))"
    mine = this_process()
    command = [sys.executable, "-c", other, mine.host, str(mine.pid), mine.machine, mine.start]
    space = ["unshare", "--map-root-user", "--time", "--boottime", "100000"]
    try:
        seen = subprocess.run([*space, *command], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if seen.returncode and "unshare" in seen.stderr:
        pytest.skip(f"needs the right to make a time namespace: {seen.stderr}")
    assert (seen.stdout, seen.stderr) == ("False\n", "")
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "False\n"


# One's own lease


class Keeping(LeaseKeeping):
    """A store's side of a lease, told by the test what to answer."""

    def __init__(self) -> None:
        self.answer: bool | Exception = True
        self.trouble: Exception | None = None  # with taking back
        self.renewed: list[int] = []
        self.calls: list[str] = []
        self.closed = threading.Event()

    def renew(self, worker, patience):
        if isinstance(self.answer, Exception):
            self.calls.append("refused")
            raise self.answer
        self.renewed.append(worker)
        return self.answer

    def reclaim(self, worker, max_attempts):
        self.calls.append("reclaim")
        if self.trouble is not None:
            raise self.trouble
        return Reclaimed()

    def forget(self):
        self.calls.append("forget")

    def give_up(self):
        pass

    def close(self):
        self.closed.set()


@pytest.fixture
def keeping():
    return Keeping()


@pytest.fixture
def lease(keeping, clock):
    """A lease of 30 s whose thread is not started: the test beats for it."""
    told: list[object] = []
    lease: Any = Lease(
        keeping,
        1,
        30.0,
        3,
        clock,
        on_doubt=lambda d: told.append(("doubt", d)),
        on_lost=lambda w: told.append(("lost", w)),
        on_broken=lambda e: told.append(("broken", e)),
    )
    lease.told = told
    return lease


def test_it_is_renewed_at_a_third(lease, keeping, clock):
    for _ in range(9):
        clock.now += 1
        lease._beat()
    assert keeping.renewed == []
    clock.now += 1
    lease._beat()
    lease._beat()
    assert keeping.renewed == [1]
    clock.now += 10
    lease._beat()
    assert keeping.renewed == [1, 1]
    assert lease.told == []


def test_one_refused_renewal_is_no_doubt_but_a_lease_without_any_is(lease, keeping, clock):
    keeping.answer = DatabaseLockedError("runs.db", 1)
    clock.now += 11
    lease._beat()
    assert lease.told == []
    clock.now += 14
    lease._beat()
    assert lease.told == [("doubt", True)]
    lease._beat()
    keeping.answer = True
    lease._beat()
    assert lease.told == [("doubt", True), ("doubt", False)]
    assert keeping.renewed == [1]


def test_in_doubt_nobody_elses_work_is_taken_back(lease, keeping, clock):
    keeping.answer = DatabaseLockedError("runs.db", 1)
    clock.now += 25
    lease._beat()
    assert "reclaim" not in keeping.calls


def test_a_database_that_is_damaged_for_most_of_a_lease_is_told_and_one_that_is_locked_or_full_is_not(lease, keeping, clock):
    keeping.answer = DatabaseError("runs.db", "damaged")
    clock.now += 11
    lease._beat()
    assert lease.told == []
    clock.now += 14
    lease._beat()
    assert lease.told == [("doubt", True), ("broken", keeping.answer)]
    lease.told.clear()
    for passing in (
        DatabaseLockedError("runs.db", 60),
        DatabaseUnavailableError("runs.db", "full"),
        StoreClosedError("runs.db"),
    ):
        keeping.answer = passing
        clock.now += 600
        lease._beat()
    assert lease.told == []


def test_a_database_from_which_nothing_can_be_taken_back_is_told_after_most_of_a_lease(lease, keeping, clock):
    keeping.trouble = DatabaseError("runs.db", "damaged")
    lease._beat()
    clock.now += 20
    lease._beat()
    keeping.trouble = None
    lease._beat()  # it has passed
    keeping.trouble = DatabaseError("runs.db", "damaged")
    lease._beat()
    clock.now += 20
    lease._beat()
    assert lease.told == []
    clock.now += 5
    lease._beat()
    assert lease.told == [("broken", keeping.trouble)]
    lease.told.clear()
    keeping.trouble = DatabaseLockedError("runs.db", 60)
    clock.now += 600
    lease._beat()
    assert lease.told == []


def test_a_lost_lease_is_told_once_and_goes_on_as_another_worker(lease, keeping, clock):
    keeping.answer = False
    clock.now += 11
    lease._beat()
    clock.now += 11
    lease._beat()
    assert lease.told == [("lost", 1)]
    keeping.answer = True
    lease.adopt(2)
    clock.now += 11
    lease._beat()
    assert keeping.renewed == [1, 2]


def test_a_worker_that_ends_its_row_has_lost_nothing(lease, keeping, clock):
    lease.retire()
    keeping.answer = False
    clock.now += 11
    lease._beat()
    assert keeping.renewed == [1]
    assert lease.told == []


def test_at_a_normal_end_no_worker_is_said_to_be_declared_dead(anywhere, monkeypatch, caplog):
    # The row ends, and the lease thread renews once more before it is stopped.
    refused = threading.Event()
    beat, leave = Lease._beat, Run._leave

    def one_more_beat(self):
        self._proven -= self._seconds
        beat(self)
        if self._keeping.renew(self._worker, 1.0) is False:
            refused.set()

    async def leave_slowly(self):
        left = self._store.leave

        async def leave_and_wait(worker):
            await left(worker)
            monkeypatch.setattr(Lease, "_beat", one_more_beat)
            assert await asyncio.to_thread(refused.wait, 60)
            for _ in range(5):
                await asyncio.sleep(0)

        self._store.leave = leave_and_wait
        await leave(self)

    monkeypatch.setattr(Run, "_leave", leave_slowly)
    assert speval(lambda x: x, range(2), anywhere, executor="thread", progress=False).completed == 2
    assert refused.is_set()
    assert "declared dead" not in caplog.text


def test_after_a_suspend_it_renews_first_and_watches_anew(lease, keeping, clock):
    clock.slept += 300
    lease._beat()
    assert keeping.calls == ["forget", "reclaim"]
    assert keeping.renewed == [1]
    lease._beat()
    assert keeping.calls == ["forget", "reclaim", "reclaim"]


def test_something_unforeseen_does_not_end_its_thread(keeping, clock, caplog):
    keeping.answer = OSError("unforeseen")
    clock.slept = 0
    lease = Lease(keeping, 1, 30.0, 3, clock, on_doubt=print, on_lost=print, on_broken=print)
    clock.now += 11
    lease.start()
    wait_for(lambda: "goes on after an unexpected error" in caplog.text)
    keeping.answer = True
    wait_for(lambda: keeping.renewed)
    lease.stop()


def test_its_thread_ends_with_it_and_closes_the_connection(keeping, clock):
    lease = Lease(keeping, 1, 30.0, 3, clock, on_doubt=print, on_lost=print, on_broken=print)
    lease.start()
    wait_for(lambda: keeping.calls)
    started = time.monotonic()
    lease.stop()
    assert keeping.closed.is_set()
    assert time.monotonic() - started < 5
