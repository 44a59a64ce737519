"""The contract of what people at a terminal use, held by every store: looking changes nothing, steering keeps the fences."""

import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from speval import aio
from speval.clock import Clock
from speval.errors import DatabaseMissingError, InProgressError, OptionError, UnknownNameError
from speval.model import Cause, Claim, Error, Outcome, Settings
from speval.spaces.eager import Space
from speval.stores import make_control
from speval.stores.base import Ended, Record, Store
from speval.stores.control import Choice, Control

from .databases import Place, SqlitePlace, findings


class Database:
    """Makes stores, workers and controls on one database."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.clock = place.clock
        self.stores: list[Store] = []
        self.controls: list[Control] = []

    async def open(self, eval_space=None) -> Store:
        store = self.place.store()
        await store.open()
        self.stores.append(store)
        if eval_space is not None:
            space = Space()
            list(space.fill(eval_space))
            await store.seed(space, "error")
            space.close()
        return store

    async def worker(self, eval_space, lease=10.0):
        store = await self.open(eval_space)
        return store, await store.register(lease)

    def control(self, mode="read") -> Control:
        control = self.place.control(mode)
        self.controls.append(control)
        return control


class File(Database):
    """One in a SQLite file."""

    def __init__(self, place: SqlitePlace) -> None:
        super().__init__(place)
        self.path = place.path

    def bytes(self) -> bytes:
        return self.path.read_bytes()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be in the middle of writing."""
        connection = sqlite3.connect(self.path, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            connection.close()

    def damage(self) -> None:
        with self.path.open("r+b") as file:
            file.seek(-9000, 2)
            file.write(b"\xff" * 3000)


@asynccontextmanager
async def closing(database):
    try:
        yield database
    finally:
        for control in database.controls:
            control.close()
        for store in database.stores:
            await store.close()


@pytest.fixture
async def database(place: Place) -> AsyncIterator[Database]:
    async with closing(Database(place)) as database:
        yield database


@pytest.fixture
async def file(db, clock) -> AsyncIterator[File]:
    async with closing(File(SqlitePlace(db, clock))) as file:
        yield file


def done(claim: Claim, result="1", duration=0.25) -> Ended:
    return Ended(claim, Outcome(None, result, None, 5.0, duration), False)


def broken(claim: Claim, cause: Cause = "exception", again=False, message="boom") -> Ended:
    error: Error = {"cause": cause, "type": "ValueError", "message": message, "traceback": "Traceback: boom"}
    return Ended(claim, Outcome(cause, None, error, 5.0, 0.25), again)


async def claimed(store, worker, count) -> list[Claim]:
    return (await store.record(Record(worker, idle=count))).claims


def names(evaluations) -> list[str]:
    return [e["name"] for e in evaluations]


# The overview


async def test_an_overview_counts_the_whole_database(database):
    store, worker = await database.worker(range(6))
    await database.open({"of another space": 1})
    a, b, c, _ = await claimed(store, worker, 4)
    await store.record(Record(worker, [done(a), broken(b), broken(c, "timeout")]))
    seen = database.control().overview()
    assert (seen.pending, seen.in_progress, seen.completed, seen.failed) == (3, 1, 1, 2)
    assert (seen.total, seen.open) == (7, 4)
    assert seen.causes == {"exception": 1, "timeout": 1}
    assert seen.at == database.clock.wall_now


async def test_an_overview_lists_what_each_worker_runs_the_longest_first(database):
    store, one = await database.worker(range(20), lease=20.0)
    first = await claimed(store, one, 1)
    database.clock.wall_now += 9
    other = await (await database.open()).register(50.0)
    database.clock.wall_now += 1
    await claimed(store, one, 7)
    here, there = database.control().overview(runs=3).workers
    assert (here.state, here.running, here.ahead, here.held, here.lease) == ("alive", 8, 0, 0, 20.0)
    assert [r.name for r in here.runs] == ["0", "1", "2"]
    assert here.runs[0].since == here.runs[1].since - 10
    assert (there.running, there.runs) == (0, ())
    assert [here.worker, there.worker] == [f"{here.host}:{here.pid}:{id:012x}" for id in (one, other)]
    assert first[0].name == here.runs[0].name


async def test_an_old_claim_ahead_counts_as_running(database):
    store, worker = await database.worker(range(20))
    await store.record(Record(worker, idle=2, ahead=5))
    control = database.control()
    (seen,) = control.overview().workers
    assert (seen.running, seen.ahead, len(seen.runs)) == (2, 5, 2)
    database.clock.wall_now += 2
    (seen,) = control.overview().workers
    assert (seen.running, seen.ahead) == (7, 0)


async def test_a_held_evaluation_is_pending_and_counted_as_held(database):
    store, worker = await database.worker(range(2))
    (claim,) = await claimed(store, worker, 1)
    await store.record(Record(worker, [broken(claim, again=True)]))
    seen = database.control().overview()
    assert (seen.pending, seen.failed, seen.workers[0].held, seen.workers[0].running) == (2, 0, 1, 0)


async def test_a_worker_is_alive_silent_or_dead_and_is_gone_when_it_has_left(database):
    store, worker = await database.worker(range(3), lease=10.0)
    control = database.control()
    assert [w.state for w in control.overview().workers] == ["alive"]
    database.clock.wall_now += 11
    database.clock.now += 11
    assert [w.state for w in control.overview().workers] == ["silent"]
    await store.leave(worker)
    assert control.overview().workers == ()


async def test_a_worker_whose_process_is_gone_is_dead_at_once(database, scripts):
    script = scripts.write(
        f"""
        import os, signal
        from speval import speval
        speval(lambda args: os.kill(os.getpid(), signal.SIGKILL), range(3), {str(database.place.argument)!r})
        """
    )
    database.place.as_made()
    scripts.start(script).wait()
    with database.place.control() as control:
        (seen,) = control.overview().workers
        assert seen.state == "dead"
        assert seen.running + seen.ahead == 1


async def test_an_overview_lists_the_last_failures_first(database):
    store, worker = await database.worker(range(9))
    claims = await claimed(store, worker, 7)
    for claim in claims:
        database.clock.wall_now += 1
        await store.record(Record(worker, [broken(claim, message=f"boom {claim.name}")]))
    seen = database.control().overview(failures=3).failures
    assert [f.name for f in seen] == ["6", "5", "4"]
    first = seen[0]
    assert (first.cause, first.type, first.message, first.attempts) == ("exception", "ValueError", "boom 6", 1)
    assert first.ended_at == database.clock.wall_now
    assert first.worker == database.control().overview().workers[0].worker


async def test_a_rate_is_taken_over_the_last_minute_or_the_last_ten_attempts(database):
    store, worker = await database.worker(range(500), lease=10_000.0)
    control = database.control()
    assert control.overview().rate is None
    for _ in range(120):  # two a second for a minute
        database.clock.wall_now += 0.5
        await store.record(Record(worker, [done(claim) for claim in await claimed(store, worker, 1)]))
    assert control.overview().rate == pytest.approx(2.0, rel=0.05)
    database.clock.wall_now += 300
    assert control.overview().rate == pytest.approx(10 / 305, rel=0.1)
    await store.leave(worker)
    assert control.overview().rate is None


async def test_a_rate_excludes_earlier_runs(database):
    store, worker = await database.worker(range(50))
    await store.record(Record(worker, [done(claim) for claim in await claimed(store, worker, 20)]))
    await store.leave(worker)
    database.clock.wall_now += 3600
    worker = await store.register(10.0)
    control = database.control()
    assert control.overview().rate is None
    database.clock.wall_now += 4
    await store.record(Record(worker, [done(claim) for claim in await claimed(store, worker, 2)]))
    assert control.overview().rate == pytest.approx(0.5)


# Evaluations


async def test_evaluations_come_in_order_filtered_and_limited(database):
    space = {f"lr={i % 3} seed={i}": {"i": i} for i in range(12)}
    store, worker = await database.worker(space)
    a, b, c, d = await claimed(store, worker, 4)
    await store.record(Record(worker, [done(a), broken(b), broken(c, "timeout")]))
    control = database.control()
    assert names(control.evaluations()) == list(space)
    assert names(control.evaluations(limit=2)) == list(space)[:2]
    assert names(control.evaluations(limit=0)) == []
    assert names(control.evaluations(status="in_progress")) == [d.name]
    assert names(control.evaluations(status="failed", cause="timeout")) == [c.name]
    assert names(control.evaluations(cause="exception")) == [b.name]
    assert names(control.evaluations(cause="exception", status="completed")) == []
    assert names(control.evaluations(pattern="lr=2*")) == list(space)[2::3]
    assert names(control.evaluations(pattern="lr=? seed=1")) == ["lr=1 seed=1"]
    assert names(control.evaluations(pattern="seed")) == []
    assert next(iter(control.evaluations(status="completed")))["result"] == 1


async def test_a_pattern_has_two_wildcards(database):
    space = ["a[b]c", "abc", "a%c", "a_c", "A[B]C", "a\\c", "17", "1*7"]
    await database.open(dict.fromkeys(space))
    control = database.control()
    for name in space[:-1]:
        assert names(control.evaluations(pattern=name)) == [name]
    assert names(control.evaluations(pattern="1*7")) == ["17", "1*7"]


async def test_evaluations_are_read_in_pages_that_keep_no_snapshot(database, monkeypatch):
    monkeypatch.setattr("speval.stores.control._PAGE", 3)
    monkeypatch.setattr(f"{database.place.control_module}._SPAN", 5, raising=False)
    store, worker = await database.worker(range(30))
    control = database.control()
    seen = control.evaluations(status="completed")
    await store.record(Record(worker, [done(claim) for claim in await claimed(store, worker, 8)]))
    assert [next(seen)["name"] for _ in range(3)] == ["0", "1", "2"]
    await store.record(Record(worker, [done(claim) for claim in await claimed(store, worker, 22)]))
    assert names(seen) == [str(i) for i in range(3, 30)]


async def test_a_page_ends_before_its_evaluations_fill_the_memory(database, monkeypatch):
    for module in ("sqlite.rows", "postgres.control"):
        monkeypatch.setattr(f"speval.stores.{module}.PAGE_SIZE", 1000)
    await database.open({str(i): "x" * 600 for i in range(10)})
    control = database.control()
    assert len(control._page(Choice(), 0, 500)[1]) == 2
    assert names(control.evaluations()) == [str(i) for i in range(10)]


async def test_one_evaluation_is_found_by_its_exact_name(database):
    await database.open({"17": "as a number", "017": "as text", "ä[b]": 3})
    control = database.control()
    assert control.evaluation("17")["args"] == "as a number"
    assert control.evaluation("017")["args"] == "as text"
    assert control.evaluation("ä[b]")["args"] == 3
    with pytest.raises(UnknownNameError, match="no evaluation is named '1'"):
        control.evaluation("1")


async def test_every_attempt_of_an_evaluation_is_listed(database, monkeypatch):
    monkeypatch.setattr(f"{database.place.control_module}._SPAN", 2, raising=False)
    store, worker = await database.worker(range(12))
    claims = await claimed(store, worker, 12)
    first = claims[0]
    await store.record(Record(worker, [broken(first, "timeout", again=True)]))
    await store.record(Record(worker, [done(claim) for claim in claims[1:]]))
    await store.record(Record(worker, due=[first]))
    (second,) = await claimed(store, worker, 1)
    await store.record(Record(worker, released=[second]))
    (third,) = await claimed(store, worker, 1)
    database.clock.wall_now += 5
    control = database.control()
    label = control.overview().workers[0].worker
    one, two = control.attempts("0")
    assert (one.number, one.outcome, one.worker, one.duration, one.started_at) == (1, "timeout", label, 0.25, 5.0)
    assert one.error == {"cause": "timeout", "type": "ValueError", "message": "boom", "traceback": "Traceback: boom"}
    assert (two.number, two.outcome, two.worker, two.ended_at, two.error) == (3, None, label, None, None)
    assert two.started_at == database.clock.wall_now - 5
    await store.record(Record(worker, [done(third, '{"loss":0.5}')]))
    last = control.attempts("0")[-1]
    assert (last.number, last.outcome, last.result, last.error) == (3, "completed", {"loss": 0.5}, None)
    assert last.ended_at == database.clock.wall_now
    with pytest.raises(UnknownNameError):
        control.attempts("nobody")


async def test_filters_by_status_stop_at_pages_and_go_on(database, monkeypatch):
    monkeypatch.setattr("speval.stores.control._PAGE", 2)
    store, worker = await database.worker(range(10))
    claims = await claimed(store, worker, 5)
    await store.record(Record(worker, [done(c) for c in claims[:3]]))
    control = database.control()
    assert names(control.evaluations(status="completed")) == ["0", "1", "2"]
    assert names(control.evaluations(status="completed", limit=2)) == ["0", "1"]
    assert [len(names(control.evaluations(status=s))) for s in ("pending", "in_progress", "failed")] == [5, 2, 0]


async def test_attempts_before_a_retry_are_listed_too(database):
    store, worker = await database.worker(["a"])
    for again in range(3):
        (claim,) = await claimed(store, worker, 1)
        await store.record(Record(worker, [broken(claim, message=f"boom {again}")]))
        assert database.control("write").retry() == 1
    assert [a.error["message"] for a in database.control().attempts("0")] == ["boom 0", "boom 1", "boom 2"]


# Looking changes nothing


async def test_reading_changes_nothing_and_needs_only_read_permission(file):
    store, worker = await file.worker(range(5))
    await store.record(Record(worker, [done(claim) for claim in await claimed(store, worker, 3)]))
    await store.close()
    before = file.bytes()
    file.path.chmod(0o400)
    file.path.parent.chmod(0o500)
    try:
        control = file.control()
        assert control.overview().completed == 3
        assert names(control.evaluations(status="completed")) == ["0", "1", "2"]
        assert control.attempts("1")[0].outcome == "completed"
        assert control.check().facts["integrity"] == "ok"
        control.close()
        assert file.bytes() == before
        assert [f.name for f in file.path.parent.iterdir()] == [file.path.name]
    finally:
        file.path.parent.chmod(0o700)


async def test_reading_neither_waits_for_writers_nor_blocks_them(file):
    store, worker = await file.worker(range(5))
    with file.locked():
        assert file.control().overview().pending == 5
    seen = file.control().evaluations()
    next(seen)
    await store.record(Record(worker, [done(claim) for claim in await claimed(store, worker, 1)]))


async def test_a_missing_database_is_an_error_and_is_not_created(database):
    database.place.missing()
    for mode in ("read", "write", "read"):
        with pytest.raises(DatabaseMissingError):
            database.control(mode)


async def test_an_empty_file_of_a_starting_worker_has_no_evaluations(file):
    file.path.touch()
    control = file.control()
    assert (control.overview().total, list(control.evaluations())) == (0, [])
    assert file.bytes() == b""


# Steering


async def test_settings_are_stored_returned_and_removed(database):
    await database.open(range(2))
    looking, steering = database.control(), database.control("write")
    assert looking.overview().settings == Settings(paused=False, concurrency=None)
    steering.set_paused(True)
    steering.set_concurrency(7)
    assert looking.overview().settings == Settings(paused=True, concurrency=7)
    steering.set_concurrency(3)
    steering.set_paused(True)
    assert looking.overview().settings == Settings(paused=True, concurrency=3)
    steering.set_paused(False)
    steering.set_concurrency(None)
    assert looking.overview().settings == Settings()


async def test_settings_are_numbers_in_meta_and_are_deleted_when_unset(database):
    await database.open(range(2))
    steering = database.control("write")
    steering.set_paused(True)
    steering.set_concurrency(7)
    sql = "SELECT key, value FROM meta WHERE key IN ('paused', 'concurrency') ORDER BY key"
    assert [(key, int(value)) for key, value in database.place.query(sql)] == [("concurrency", 7), ("paused", 1)]
    steering.set_paused(False)
    steering.set_concurrency(None)
    assert database.place.query(sql) == []


NO_MACHINE_HAS = {"a million and one": 1_000_001, "three billion": 3_000_000_000, "2**63": 2**63, "5,000 digits": 10**5000}


@pytest.mark.parametrize("concurrency", NO_MACHINE_HAS.values(), ids=NO_MACHINE_HAS)
async def test_a_huge_concurrency_is_refused_and_changes_nothing(database, concurrency):
    await aio.speval(str, range(1), database.place.checked)
    with pytest.raises(OptionError, match="a whole number from 1 to 1000000"):
        database.control("write").set_concurrency(concurrency)
    with pytest.raises(OptionError, match="a whole number from 1 to 1000000"):
        await aio.speval(str, range(1), database.place.checked, concurrency=concurrency)
    assert database.control("read").overview().settings.concurrency is None


@pytest.mark.parametrize("stored", ["3000000000", "1000000000000000000", "1e300"])
async def test_a_huge_stored_concurrency_does_not_end_a_worker(database, stored):
    await aio.speval(str, range(1), database.place.checked)
    database.place.execute(f"INSERT INTO meta VALUES ('concurrency', {stored})")
    assert (await aio.speval(str, range(9), database.place.checked)).recorded == 8
    assert database.control("read").overview().settings.concurrency == 1_000_000


async def test_a_concurrency_below_one_is_refused(database):
    await database.open(range(2))
    with pytest.raises(OptionError, match="concurrency=0"):
        database.control("write").set_concurrency(0)


# Dropping


async def test_dropped_evaluations_are_gone_with_their_attempts(database):
    store, worker = await database.worker({"a": 1, "b": 2, "c": 3, "17": 4})
    await store.record(Record(worker, [done(claim, json.dumps(claim.name)) for claim in await claimed(store, worker, 4)]))
    control = database.control("write")
    assert control.drop(["a", "17"]) == 2
    assert names(control.evaluations()) == ["b", "c"]
    with pytest.raises(UnknownNameError):
        control.attempts("a")
    assert [a.result for a in control.attempts("b")] == ["b"]
    assert control.overview().total == 2
    assert findings(control.check()) == []


async def test_dropping_by_status_drops_only_that_status(database, monkeypatch):
    monkeypatch.setattr(f"{database.place.control_module}._CHUNK", 2, raising=False)
    store, worker = await database.worker(range(12))
    claims = await claimed(store, worker, 9)
    await store.record(Record(worker, [broken(claim) for claim in claims[:5]] + [done(claim) for claim in claims[5:8]]))
    control = database.control("write")
    assert control.drop(status="failed") == 5
    assert names(control.evaluations()) == [str(i) for i in range(5, 12)]
    assert control.overview().failures == ()
    assert control.drop(status="completed") == 3
    assert control.drop(status="pending") == 3
    assert control.drop(status="pending") == 0
    assert names(control.evaluations()) == ["8"]


async def test_dropping_an_evaluation_in_progress_fails_and_drops_nothing(database):
    store, worker = await database.worker({"a": 1, "b": 2})
    await claimed(store, worker, 1)
    control = database.control("write")
    with pytest.raises(InProgressError, match="in progress: 'a'; nothing was dropped"):
        control.drop(["b", "a"])
    with pytest.raises(UnknownNameError, match="'nobody'"):
        control.drop(["b", "nobody"])
    for wrong in ({"status": "in_progress"}, {}, {"names": ["a"], "status": "failed"}):
        with pytest.raises(OptionError):
            control.drop(**wrong)
    assert control.overview().total == 2
    assert control.drop([]) == 0


async def test_seeding_adds_dropped_evaluations_as_new_ones(database):
    store, worker = await database.worker(range(4))
    await store.record(Record(worker, [done(claim) for claim in await claimed(store, worker, 4)]))
    assert database.control("write").drop(["1", "3"]) == 2
    store = await database.open(range(4))
    summary = await store.summary()
    assert (summary.completed, summary.pending) == (2, 2)
    assert database.control().attempts("3") == []
    assert database.control().evaluation("3")["attempts"] == 0


async def test_late_writes_about_a_dropped_evaluation_are_refused(database):
    store, worker = await database.worker({"a": 1, "b": 2})
    stale = await claimed(store, worker, 2)
    await store.record(Record(worker, [broken(stale[1], again=True)]))
    control = database.control("write")
    await store.leave(worker)  # as if all had been taken back from it while it goes on
    assert control.drop(["a", "b"]) == 2
    # The same names come back under other ids, claimed with the same attempt number.
    store = await database.open({"a": 1, "b": 2})
    other = await store.register(10.0)
    fresh = await claimed(store, other, 2)
    assert not {claim.id for claim in fresh} & {claim.id for claim in stale}
    assert (await store.record(Record(worker, [done(stale[0], '"stale"')]))).refused == [stale[0]]
    await store.record(Record(worker, due=[stale[1]], released=[stale[0]]))
    assert database.control().overview().in_progress == 2
    assert (await store.record(Record(other, [done(claim, '"fresh"') for claim in fresh]))).refused == []
    assert [e["result"] for e in control.evaluations()] == ["fresh", "fresh"]


async def test_ids_are_never_reused_after_a_drop(database):
    store, worker = await database.worker(range(3))
    last = (await claimed(store, worker, 3))[-1]
    await store.leave(worker)
    control = database.control("write")
    assert control.drop(status="pending") == 3
    store, worker = await database.worker(range(3))
    assert min(claim.id for claim in await claimed(store, worker, 3)) > last.id


async def test_a_reader_of_ended_evaluations_misses_nothing_after_a_drop(database):
    store, worker = await database.worker(range(4))
    a, b, c, d = await claimed(store, worker, 4)
    await store.record(Record(worker, [done(a), done(b, '"secret"')]))
    cursor, seen = await store.ended_since(0, 100)
    assert [e["name"] for _, e in seen] == ["0", "1"]
    assert database.control("write").drop(["0", "1"]) == 2
    assert database.place.query("SELECT count(result) FROM attempts") == [(0,)]
    await store.record(Record(worker, [done(c)]))
    cursor, seen = await store.ended_since(cursor, 100)
    assert [e["name"] for _, e in seen] == ["2"]
    await store.record(Record(worker, [done(d)]))
    assert database.control("write").drop(["2"]) == 1
    _, seen = await store.ended_since(cursor, 100)
    assert [e["name"] for _, e in seen] == ["3"]


# Checking a database


async def test_an_intact_database_has_facts_and_no_findings(database):
    await database.worker(range(3))
    health = database.control().check()
    assert findings(health) == []
    assert health.facts["integrity"] == "ok"
    assert (health.facts["evaluations"], health.facts["workers"], health.facts["paused"]) == (3, 1, False)
    assert health.facts["database"] == str(database.place.checked)
    assert "integrity" not in database.control().check(integrity=False).facts


async def test_dead_workers_a_pause_and_orphaned_evaluations_are_reported(database):
    store, worker = await database.worker(range(3), lease=10.0)
    await claimed(store, worker, 2)
    control = database.control("write")
    control.set_paused(True)
    database.clock.wall_now += 20
    database.clock.now += 20
    found = control.check().findings
    assert not any(finding.is_error for finding in found)
    told = "\n".join(f"{finding.problem}: {finding.fix}" for finding in found)
    assert "has not renewed its lease" in told
    assert "holds 2 evaluations" in told
    assert "`speval resume`" in told


async def test_damage_is_an_error_with_a_fix(file):
    store = await file.open({f"name {i}": "x" * 50 for i in range(2000)})
    await store.close()
    file.damage()
    finding = file.control().check().findings[0]
    assert finding.is_error
    assert "`speval salvage " in finding.problem + finding.fix


async def test_damage_in_any_row_is_found(file):
    store = await file.open({"long": "x" * 100_000})
    await store.close()
    file.damage()  # in the middle of args that no query has read
    control = file.control()
    unseen = control.check(integrity=False)
    assert (unseen.findings, "integrity" in unseen.facts) == ((), False)
    found = control.check()
    assert (found.facts["integrity"], found.findings[0].is_error) == ("damaged", True)


async def test_the_system_clock_is_the_default(database):
    await database.open(range(1))
    with make_control(database.place.checked) as control:
        assert abs(control.overview().at - Clock().wall()) < 60
