"""Leases: who is dead, when to renew, when to doubt, decided on one's own monotonic clock."""

import os
import subprocess
import sys
import threading
import time

import pytest

from speval.errors import DatabaseError, DatabaseLockedError, DatabaseUnavailableError, StoreClosedError
from speval.host import Process, is_gone, this_process
from speval.lease import Lease
from speval.stores.base import LeaseKeeping, Reclaimed
from speval.stores.watch import Watch, WorkerRow

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
    assert "shows no sign of life for 61 s; what it may hold is waited for until its lease of 86400 s" in caplog.text
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
    monkeypatch.setattr("speval.stores.watch.is_gone", lambda process, machine: process.pid == 7)
    gone = row(id=5, process=Process("host", 7, HERE.machine, "1"))
    assert Watch(HERE.machine).dead([row(), gone], 99, 0) == [gone]


def test_each_process_is_asked_about_by_few_and_yet_every_dead_one_is_found(monkeypatch):
    asked = []

    def gone(process, machine):
        asked.append(process.pid)
        return process.pid in (3, 4, 5, 9)

    monkeypatch.setattr("speval.stores.watch.is_gone", gone)
    workers = [row(id=i, process=Process("host", i, HERE.machine, "1")) for i in range(10)]
    alive = [w for w in workers if w.id not in (3, 4, 5, 9)]
    found = set()
    for me in alive:
        found |= {d.id for d in Watch(HERE.machine).dead([w for w in workers if w is not me], me.id, 0)}
    assert found == {3, 4, 5, 9}
    assert len(asked) == len(alive) + len(found)


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
    told = []
    lease = Lease(
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
    wait_for(lambda: "something unforeseen" in caplog.text)
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
