"""The contract of a store, held by every store: one real database each, workers that claim, stall, come back and leave."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from speval.engine.lease import Lease
from speval.errors import ArgsChangedError, StoreClosedError, UnknownNameError
from speval.model import Cause, Claim, Error, Evaluation, Outcome, Status
from speval.spaces.eager import Space
from speval.stores.base import Ended, Record, Store

from .conftest import WAIT, MovableClock
from .databases import Place, SqlitePlace


def space_of(eval_space) -> Space:
    space = Space()
    list(space.fill(eval_space))
    return space


def done(claim: Claim, result="1") -> Ended:
    return Ended(claim, Outcome(None, result, None, 5.0, 0.25), False)


def broken(claim: Claim, cause: Cause = "exception", again=False) -> Ended:
    error: Error = {"cause": cause, "type": "ValueError", "message": "boom", "traceback": "Traceback: boom"}
    return Ended(claim, Outcome(cause, None, error, 5.0, 0.25), again)


async def until(condition):
    async with asyncio.timeout(WAIT):
        while not await condition():
            await asyncio.sleep(0.005)


class Database:
    """Makes stores on one database, each as a worker of its own would have it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.clock = place.clock
        self.query = place.query
        self.set = place.set
        self.stores: list[Store] = []
        self.spaces: list[Space] = []

    async def open(self, eval_space=None, on_changed="error") -> Store:
        store = self.place.store()
        await store.open()
        self.stores.append(store)
        if eval_space is not None:
            await self.seed(store, eval_space, on_changed)
        return store

    async def seed(self, store, eval_space, on_changed="error"):
        space = space_of(eval_space)
        self.spaces.append(space)
        return await store.seed(space, on_changed)

    async def worker(self, eval_space, lease=10.0):
        store = await self.open(eval_space)
        return store, await store.register(lease)

    async def close(self):
        for store in self.stores:
            await store.close()
        for space in self.spaces:
            space.close()

    async def all(self) -> dict[str, Evaluation]:
        with self.place.control() as control:
            return {e["name"]: e for e in control.evaluations()}

    def retry(self, names: list[str] | None = None, status: Status = "failed") -> int:
        with self.place.control("write") as control:
            return control.retry(names, status=status)

    async def statuses(self) -> list[str]:
        return [e["status"] for e in (await self.all()).values()]


@pytest.fixture
async def database(place: Place) -> AsyncIterator[Database]:
    database = Database(place)
    yield database
    await database.close()


@pytest.fixture
async def file_database(db, clock) -> AsyncIterator[Database]:
    database = Database(SqlitePlace(db, clock))
    yield database
    await database.close()


# Seeding


async def test_seeding_twice_adds_nothing(database):
    store = await database.open()
    first = await database.seed(store, ["a", "b"])
    again = await database.seed(await database.open(), ["a", "b"])
    assert (first.new, first.unchanged, first.changed, first.gone) == (2, 0, 0, 0)
    assert (again.new, again.unchanged, again.changed, again.gone) == (0, 2, 0, 0)
    assert len(await database.all()) == 2


async def test_a_longer_space_adds_what_is_new(database):
    await database.open(range(3))
    seeded = await database.seed(await database.open(), range(5))
    assert (seeded.new, seeded.unchanged) == (2, 3)
    assert list(await database.all()) == ["0", "1", "2", "3", "4"]


async def test_many_copies_seed_at_once_and_store_each_evaluation_once(database):
    space = {f"name {i}": i for i in range(25_000)}
    stores = [await database.open() for _ in range(5)]
    seeded = await asyncio.gather(*(database.seed(store, space) for store in stores))
    assert list(await database.all()) == list(space)
    assert all(s.new + s.unchanged == 25_000 for s in seeded)


async def test_copies_with_different_spaces_seed_at_once_and_lose_none(database):
    stores = [await database.open() for _ in range(4)]
    spaces = [{f"{i} {j % (i + 1)} {j}": j for j in range(12_000)} for i in range(4)]
    await asyncio.gather(*(database.seed(store, space) for store, space in zip(stores, spaces, strict=True)))
    assert set(await database.all()) == set().union(*spaces)


async def test_changed_args_are_an_error_that_shows_the_first_few_and_changes_nothing(database):
    await database.open({f"e{i}": {"x": i} for i in range(10)})
    store = await database.open()
    with pytest.raises(ArgsChangedError) as caught:
        await database.seed(store, {f"e{i}": {"x": i * 2} for i in range(12)})
    assert caught.value.count == 9
    assert caught.value.examples == [(f"e{i}", f'{{"x":{i}}}', f'{{"x":{i * 2}}}') for i in (1, 2, 3)]
    assert "9 evaluations have different args" in str(caught.value)
    assert '\'e1\': stored {"x":1}, now {"x":2}' in str(caught.value)
    assert [e["args"] for e in (await database.all()).values()] == [{"x": i} for i in range(10)]


async def test_the_order_of_keys_is_no_change(database):
    await database.open([{"a": 1, "b": [2, {"c": 3, "d": 4}]}])
    seeded = await database.seed(await database.open(), [{"b": [2, {"d": 4, "c": 3}], "a": 1}])
    assert (seeded.unchanged, seeded.changed) == (1, 0)


async def test_keep_goes_on_with_the_stored_args(database):
    await database.open([1, 2])
    store = await database.open()
    seeded = await database.seed(store, [1, 5, 6], on_changed="keep")
    assert (seeded.new, seeded.unchanged, seeded.changed) == (1, 1, 1)
    assert [e["args"] for e in (await database.all()).values()] == [1, 2, 6]
    again = await database.seed(await database.open(), [1, 5, 6], on_changed="keep")
    assert again.changed == 1


async def test_rerun_evaluates_changed_ones_again_and_refuses_what_runs_with_the_old_args(database):
    store, worker = await database.worker([1, 2, 3])
    claims = (await store.record(Record(worker, idle=3))).claims
    await store.record(Record(worker, [done(claims[0]), done(claims[1])]))
    other = await database.open()
    seeded = await database.seed(other, [1, 20, 30], on_changed="rerun")
    assert (seeded.changed, seeded.unchanged) == (2, 1)
    assert (await store.record(Record(worker, [done(claims[2], '"old"')]))).refused == [claims[2]]
    assert await database.statuses() == ["completed", "pending", "pending"]
    assert [e["args"] for e in (await database.all()).values()] == [1, 20, 30]
    assert [c.args for c in (await store.record(Record(worker, idle=3))).claims] == ["20", "30"]


@pytest.mark.parametrize("on_changed", ["error", "keep"])
async def test_a_new_database_in_which_another_copy_stores_other_args_meanwhile_is_compared(
    file_database, monkeypatch, on_changed
):
    first, second = await file_database.open(), await file_database.open()
    monkeypatch.setattr("speval.stores.sqlite.seed.CHUNK", 2)
    write, calls = second._write, []

    async def write_and_be_overtaken(work, *args):
        result = await write(work, *args)
        calls.append(work.__name__)
        if calls == ["fill"]:
            await file_database.seed(first, [1, 2, 30, 40, 50])
        return result

    monkeypatch.setattr(second, "_write", write_and_be_overtaken)
    if on_changed == "error":
        with pytest.raises(ArgsChangedError, match="'2'"):
            await file_database.seed(second, [1, 2, 3, 40])
    else:
        seeded = await file_database.seed(second, [1, 2, 3, 40], on_changed)
        assert (seeded.new, seeded.unchanged, seeded.changed, seeded.gone) == (0, 3, 1, 1)
    assert calls[:2] == ["fill", "fill"]
    assert [e["args"] for e in (await file_database.all()).values()] == [1, 2, 30, 40, 50]


async def test_a_rerun_that_another_copy_has_done_already_throws_no_result_away(database, monkeypatch):
    await database.open([1, 2, 3])
    first, second = await database.open(), await database.open()

    async def the_other_copy():
        await database.seed(first, [11, 12, 13], on_changed="rerun")
        worker = await first.register(10)
        claims = (await first.record(Record(worker, idle=3))).claims
        await first.record(Record(worker, [done(c, c.args) for c in claims]))

    interrupted = database.place.overtaken(monkeypatch, second, the_other_copy)
    seeded = await database.seed(second, [11, 12, 13], on_changed="rerun")
    assert (interrupted, seeded.changed) == ([True], 0)
    assert await database.statuses() == ["completed"] * 3
    assert [e["result"] for e in (await database.all()).values()] == [11, 12, 13]


async def test_a_space_overtaken_by_a_rerun_is_compared_again_and_not_taken_for_known(database, monkeypatch):
    await database.open([1, 2, 0])
    first, second = await database.open(), await database.open()

    async def the_other_copy():
        await database.seed(first, [7, 8, 9], on_changed="rerun")

    database.place.overtaken = database.place.overtaken(monkeypatch, second, the_other_copy)
    with pytest.raises(ArgsChangedError):
        await database.seed(second, [1, 2, 0, 4])
    with pytest.raises(ArgsChangedError):
        await database.seed(await database.open(), [1, 2, 0, 4])


async def test_what_is_no_longer_in_the_space_is_counted_and_left_alone(database):
    await database.open({"a": 1, "b": 2, "c": 3})
    store = await database.open()
    seeded = await database.seed(store, {"b": 2, "d": 4})
    assert (seeded.new, seeded.unchanged, seeded.gone) == (1, 1, 2)
    worker = await store.register(10)
    recorded = await store.record(Record(worker, idle=10))
    assert [c.name for c in recorded.claims] == ["b", "d"]
    recorded = await store.record(Record(worker, [done(c) for c in recorded.claims], idle=1))
    assert recorded.open is False
    assert (await store.summary()).total == 2


async def test_what_others_add_meanwhile_is_not_of_this_space(database):
    store, worker = await database.worker([1])
    await database.open([1, 2])
    recorded = await store.record(Record(worker, idle=5))
    assert [c.name for c in recorded.claims] == ["0"]
    assert (await store.record(Record(worker, [done(recorded.claims[0])], idle=5))).open is False


async def test_an_empty_space_is_done_at_once(database):
    store, worker = await database.worker([])
    recorded = await store.record(Record(worker, idle=1))
    assert (recorded.claims, recorded.open) == ([], False)


# A space that is drawn bit by bit


async def test_extending_adds_what_is_new_and_only_that(database):
    store = await database.open(range(2))
    seeded = await store.extend([(1, "1"), (2, "2"), ("a", '{"x":1}')], "error")
    assert (seeded.new, seeded.unchanged, seeded.changed) == (2, 1, 0)
    assert [(e["name"], e["args"]) for e in (await database.all()).values()] == [("0", 0), ("1", 1), ("2", 2), ("a", {"x": 1})]


async def test_extending_with_other_args_does_as_seeding_does(database):
    store = await database.open()
    await store.follow()
    await store.extend([("a", "1")], "error")
    with pytest.raises(ArgsChangedError, match="'a': stored 1, now 2"):
        await store.extend([("a", "2"), ("b", "3")], "error")
    assert list(await database.all()) == ["a"]
    assert (await store.extend([("a", "2")], "keep")).changed == 1
    worker = await store.register(10.0)
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    assert claim.args == "1"
    assert (await store.extend([("a", "2")], "rerun")).changed == 1
    recorded = await store.record(Record(worker, [done(claim)], idle=1))
    assert (recorded.refused, [again.args for again in recorded.claims]) == ([claim], ["2"])


async def test_who_follows_has_all_that_is_stored_now_and_later(database):
    store = await database.open()
    await store.follow()
    worker = await store.register(10.0)
    other = await database.open([10, 11])
    claims = (await store.record(Record(worker, idle=5))).claims
    await other.extend([(7, "17")], "error")
    claims += (await store.record(Record(worker, idle=5))).claims
    assert [claim.args for claim in claims] == ["10", "11", "17"]
    await store.record(Record(worker, [done(claim) for claim in claims]))
    assert (await store.summary()).completed == 3
    assert [e["args"] for _, e in (await store.ended_since(0, 10))[1]] == [10, 11, 17]


async def test_a_space_that_was_extended_is_not_taken_for_the_seeded_one(database):
    await database.open(range(2))
    store = await database.open()
    await store.extend([(2, "2")], "error")
    again = await database.open()
    seeded = await database.seed(again, range(2))
    assert (seeded.unchanged, seeded.gone) == (2, 1)


# What is set for all workers


async def test_while_paused_nobody_claims_and_what_was_claimed_is_recorded(database):
    store, worker = await database.worker(range(3))
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    database.set("paused", 1)
    for ended in ([], [done(claim)]):
        recorded = await store.record(Record(worker, ended, idle=1, ahead=1))
        assert (recorded.claims, recorded.settings.paused, recorded.open) == ([], True, True)
    assert await database.statuses() == ["completed", "pending", "pending"]
    database.set("paused", None)
    recorded = await store.record(Record(worker, idle=2))
    assert ([c.name for c in recorded.claims], recorded.settings.paused) == (["1", "2"], False)


async def test_a_set_concurrency_is_told_with_every_record(database):
    store, worker = await database.worker(range(2))
    assert (await store.record(Record(worker))).settings.concurrency is None
    database.set("concurrency", 4)
    assert (await store.record(Record(worker))).settings.concurrency == 4
    assert (await store.record(Record(worker, idle=1))).settings.concurrency == 4
    database.set("concurrency", None)
    assert (await store.record(Record(worker))).settings.concurrency is None


# Claiming


async def test_claims_come_in_eval_space_order_and_never_twice(database):
    store, worker = await database.worker({"c": 1, "a": 2, "b": 3})
    other, its = await database.worker({"c": 1, "a": 2, "b": 3})
    first = (await store.record(Record(worker, idle=2))).claims
    second = (await other.record(Record(its, idle=2))).claims
    assert [c.name for c in first + second] == ["c", "a", "b"]
    assert {(c.attempt, c.charged) for c in first + second} == {(1, 1)}


async def test_a_hundred_claims_at_once_from_eight_workers_overlap_nowhere(database):
    workers = [await database.worker(range(800)) for _ in range(8)]

    async def claim(store, worker):
        return [c.id for _ in range(10) for c in (await store.record(Record(worker, idle=7, ahead=3))).claims]

    claimed = await asyncio.gather(*(claim(*w) for w in workers))
    ids = [i for mine in claimed for i in mine]
    assert len(ids) == len(set(ids)) == 800


async def test_claimed_ahead_is_only_what_was_never_tried(database):
    store, worker = await database.worker(range(6))
    claims = (await store.record(Record(worker, idle=2))).claims
    await store.record(Record(worker, [broken(c, "timeout", again=True) for c in claims]))
    await store.record(Record(worker, due=claims))
    recorded = await store.record(Record(worker, idle=1, ahead=2))
    assert [(c.name, c.charged) for c in recorded.claims] == [("0", 2), ("2", 1), ("3", 1)]


async def test_what_was_claimed_ahead_by_a_worker_that_died_is_charged_to_nobody_the_first_time(database, monkeypatch):
    monkeypatch.setattr("speval.stores.liveness.is_gone", lambda process, machine: True)
    other, its = await database.worker(range(6))
    keeping = keeping_of(other)
    try:
        store, worker = await database.worker(range(6))
        assert len((await store.record(Record(worker, idle=1, ahead=3))).claims) == 4
        assert keeping.reclaim(its, 1).failed == ["0"]
        assert await database.statuses() == ["failed"] + ["pending"] * 5
        assert [e["attempts"] for e in (await database.all()).values()] == [1, 0, 0, 0, 0, 0]
        # One of them may have been the culprit: from now on each is claimed alone, and charged.
        store, worker = await database.worker(range(6))
        recorded = await store.record(Record(worker, idle=1, ahead=10))
        assert [c.name for c in recorded.claims] == ["1", "4", "5"]
        assert keeping.reclaim(its, 1).failed == ["1"]
        assert await database.statuses() == ["failed"] * 2 + ["pending"] * 4
    finally:
        keeping.close()


@pytest.mark.parametrize("then", ["released", "left", "failed and put back", "tried again, completed and put back"])
async def test_one_that_a_worker_has_died_with_is_never_claimed_ahead_again(database, monkeypatch, then):
    monkeypatch.setattr("speval.stores.liveness.is_gone", lambda process, machine: True)
    other, its = await database.worker([1, 2])
    keeping = keeping_of(other)
    try:
        store, worker = await database.worker([1, 2])
        assert len((await store.record(Record(worker, ahead=2))).claims) == 2
        assert keeping.reclaim(its, 3).pending == 2
        store, worker = await database.worker([1, 2])
        (claim,) = (await store.record(Record(worker, idle=1))).claims
        if then == "released":
            await store.record(Record(worker, released=[claim]))
        elif then == "left":
            await store.leave(worker)
        elif then == "failed and put back":
            await store.record(Record(worker, [broken(claim)]))
            assert database.retry(None, "failed") == 1
        else:
            await store.record(Record(worker, [broken(claim, "timeout", again=True)]))
            (claim,) = (await store.record(Record(worker, due=[claim], idle=1))).claims
            await store.record(Record(worker, [done(claim)]))
            assert database.retry(None, "completed") == 1
        assert await database.statuses() == ["pending"] * 2
        assert (await other.record(Record(its, ahead=2))).claims == []
        assert len((await other.record(Record(its, idle=2))).claims) == 2
    finally:
        keeping.close()


async def test_open_tells_whether_something_is_left_to_end(database):
    store, worker = await database.worker([1, 2])
    recorded = await store.record(Record(worker, idle=3))
    assert recorded.open is True
    recorded = await store.record(Record(worker, [done(c) for c in recorded.claims], idle=1))
    assert recorded.open is False


# Recording and fencing


async def test_a_completed_evaluation_has_its_result_and_its_times(database):
    store, worker = await database.worker([{"x": 1}])
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    database.clock.wall_now += 60
    await store.record(Record(worker, [done(claim, '{"loss":0.5}')]))
    evaluation = (await database.all())["0"]
    label = evaluation.pop("worker")
    assert label.endswith(f":{worker:012x}")
    assert evaluation == {
        "name": "0",
        "status": "completed",
        "updated": database.clock.wall_now,
        "result": {"loss": 0.5},
        "args": {"x": 1},
        "attempts": 1,
        "error": None,
        "started": 5.0,
        "duration": 0.25,
    }


async def test_a_failed_evaluation_has_its_error(database):
    store, worker = await database.worker([1])
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    await store.record(Record(worker, [broken(claim)]))
    evaluation = (await database.all())["0"]
    assert evaluation["status"] == "failed"
    assert evaluation["error"] == {
        "cause": "exception",
        "type": "ValueError",
        "message": "boom",
        "traceback": "Traceback: boom",
    }
    assert evaluation["result"] is None


async def test_nothing_is_recorded_twice(database):
    store, worker = await database.worker([1])
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    assert (await store.record(Record(worker, [done(claim)]))).refused == []
    assert (await store.record(Record(worker, [done(claim, "2")]))).refused == [claim]
    assert (await store.record(Record(worker, [broken(claim)]))).refused == [claim]
    assert (await database.all())["0"]["result"] == 1


async def test_a_stale_attempt_cannot_complete(database):
    store, worker = await database.worker([1, 2, 3])
    claims = (await store.record(Record(worker, idle=3))).claims
    stale = claims[1]._replace(attempt=0)
    foreign = claims[2]._replace(worker=worker + 1)
    recorded = await store.record(Record(worker, [done(claims[0]), done(stale), done(foreign)]))
    assert recorded.refused == [stale, foreign]
    assert await database.statuses() == ["completed", "in_progress", "in_progress"]
    assert database.query("SELECT evaluation FROM attempts") == [(claims[0].id,)]


@pytest.mark.parametrize("state", ["in progress", "held", "released", "completed", "put back", "claimed by another"])
async def test_a_token_that_is_not_good_changes_nothing_whatever_is_written_with_it(database, state):
    store, worker = await database.worker([1])
    other, its = await database.worker([1])
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    tokens = [claim._replace(attempt=0), claim._replace(attempt=2), claim._replace(worker=its)]
    if state == "held":
        await store.record(Record(worker, [broken(claim, "timeout", again=True)]))
    elif state in ("completed", "put back"):
        await store.record(Record(worker, [done(claim)]))
        tokens.append(claim)
        if state == "put back":
            database.retry(None, "completed")
    elif state != "in progress":
        await store.record(Record(worker, released=[claim]))
        tokens.append(claim)
        if state == "claimed by another":
            (anew,) = (await other.record(Record(its, idle=1))).claims
            tokens += [anew._replace(worker=worker), claim._replace(worker=its)]

    def stored():
        return [database.query(f"SELECT * FROM {table}") for table in database.place.state_tables]

    before = stored()
    for token in tokens:
        assert (await store.record(Record(worker, [done(token, '"late"')]))).refused == [token]
        await store.record(Record(worker, released=[token]))
        await store.record(Record(worker, due=[token]))
    if state == "held":  # it has ended already
        assert (await store.record(Record(worker, [done(claim, '"late"')]))).refused == [claim]
        await store.record(Record(worker, released=[claim]))
    elif state == "in progress":  # it is not held
        await store.record(Record(worker, due=[claim]))
    assert stored() == before


async def test_one_refused_among_many_keeps_none_of_the_others_from_being_recorded(database):
    store, worker = await database.worker(range(100))
    claims = (await store.record(Record(worker, idle=100))).claims
    await store.record(Record(worker, [done(claims[50])]))
    recorded = await store.record(Record(worker, [done(c) for c in claims]))
    assert recorded.refused == [claims[50]]
    assert await database.statuses() == ["completed"] * 100
    assert database.query("SELECT count(*), count(DISTINCT evaluation) FROM attempts") == [(100, 100)]


async def test_a_released_claim_charges_no_attempt_and_leaves_no_row(database):
    store, worker = await database.worker([1])
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    await store.record(Record(worker, released=[claim]))
    assert (await database.all())["0"]["attempts"] == 0
    (again,) = (await store.record(Record(worker, idle=1))).claims
    assert (again.attempt, again.charged) == (2, 1)
    assert (await store.record(Record(worker, [done(claim)]))).refused == [claim]
    assert (await store.record(Record(worker, [done(again)]))).refused == []
    assert (await database.all())["0"]["attempts"] == 1
    assert database.query("SELECT count(*) FROM attempts") == [(1,)]


async def test_one_held_for_its_backoff_is_nobodys_to_claim_until_it_is_due(database):
    store, worker = await database.worker([1])
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    await store.record(Record(worker, [broken(claim, "timeout", again=True)]))
    assert await database.statuses() == ["pending"]
    assert (await store.record(Record(worker, idle=1))).claims == []
    assert (await store.record(Record(worker, idle=1))).open is True
    recorded = await store.record(Record(worker, due=[claim], idle=1))
    assert [(c.name, c.attempt, c.charged) for c in recorded.claims] == [("0", 2, 2)]
    assert database.query("SELECT attempt, outcome, error_message FROM attempts") == [(1, "timeout", "boom")]


async def test_leaving_gives_everything_back_and_charges_nothing(database):
    store, worker = await database.worker([1, 2, 3])
    claims = (await store.record(Record(worker, idle=2))).claims
    await store.record(Record(worker, [broken(claims[0], "timeout", again=True)]))
    await store.leave(worker)
    assert await database.statuses() == ["pending"] * 3
    assert [e["attempts"] for e in (await database.all()).values()] == [1, 0, 0]
    other, its = await database.worker([1, 2, 3])
    assert [c.charged for c in (await other.record(Record(its, idle=3))).claims] == [2, 1, 1]


async def test_who_has_left_or_is_dead_cannot_claim(database):
    store, worker = await database.worker([1])
    await store.leave(worker)
    recorded = await store.record(Record(worker, idle=1))
    assert (recorded.lost, recorded.claims) == (True, [])


async def test_failures_are_counted_from_the_seeding_on(database):
    store, worker = await database.worker(range(4))
    claims = (await store.record(Record(worker, idle=4))).claims
    await store.record(Record(worker, [broken(claims[0])]))
    later, its = await database.worker(range(4))
    assert (await store.record(Record(worker, count_failures=True))).failures == 1
    assert (await later.record(Record(its, count_failures=True))).failures == 0
    recorded = await store.record(Record(worker, [broken(claims[1]), done(claims[2])], count_failures=True))
    assert recorded.failures == 2
    assert (await later.record(Record(its, count_failures=True))).failures == 1


# Reading


# Results that an earlier run could not record


def of_earlier(claim: Claim, result="1", cause=None, again=False) -> Ended:
    if cause is None:
        return Ended(claim, Outcome(None, result, None, 7.0, 0.5), again)
    failed = broken(claim, cause, again)
    return failed._replace(outcome=failed.outcome._replace(started_at=7.0))


async def test_a_result_whose_worker_is_gone_is_taken_in_under_its_token_and_only_once(database):
    store, worker = await database.worker({"a": {"x": 1}, "b\0": [1.5]})
    claims = (await store.record(Record(worker, idle=2))).claims
    kept = [of_earlier(claims[0], '"paid"'), of_earlier(claims[1], cause="timeout")]
    other = await database.open()
    taken = await other.take_in(kept)
    assert (taken.recorded, taken.known, taken.waits, taken.refused) == (claims, [], [], [])
    for _ in range(2):
        assert (await other.take_in(kept)).known == claims
    found = await database.all()
    assert [(e["status"], e["result"], e["attempts"]) for e in found.values()] == [
        ("completed", "paid", 1),
        ("failed", None, 1),
    ]
    assert found["b\0"]["error"]["cause"] == "timeout"
    assert database.query("SELECT count(*) FROM attempts") == [(2,)]
    assert (await store.record(Record(worker, [done(claims[0], '"late"')]))).refused == [claims[0]]
    assert (await store.record(Record(worker, idle=2))).claims == []


async def test_what_was_given_back_or_lost_meanwhile_is_taken_in_all_the_same(database, monkeypatch):
    store, worker = await database.worker(range(3))
    claims = (await store.record(Record(worker, idle=3))).claims
    await store.record(Record(worker, released=claims[:1]))
    keeping = database.stores[0].lease_keeping()
    other, second = await database.worker(range(3), lease=1000.0)
    keeping = other.lease_keeping()
    try:
        keeping.reclaim(second, 1)
        database.clock.now += 1000
        keeping.renew(second, 1.0)
        keeping.reclaim(second, 1)  # those that ran fail as lost, with one attempt
    finally:
        keeping.close()
    assert await database.statuses() == ["pending", "failed", "failed"]
    cursor, _ = await other.ended_since(0, 100)
    taken = await other.take_in([of_earlier(claim, str(claim.id)) for claim in claims])
    assert taken.recorded == claims
    assert [(e["status"], e["attempts"]) for e in (await database.all()).values()] == [("completed", 1)] * 3
    assert database.query("SELECT count(*) FROM attempts WHERE outcome = 'lost'") == [(0,)]
    _, ended = await other.ended_since(cursor, 100)
    assert [e["name"] for _, e in ended] == ["0", "1", "2"]
    assert (await other.summary(at_end=True)).completed == 3
    database.retry(None, "completed")
    assert [c.attempt for c in (await other.record(Record(second, idle=3))).claims] == [2, 2, 2]


async def test_a_result_is_taken_into_a_database_that_was_made_anew(database):
    store, worker = await database.worker({"x": 1, "b": [1, 2], "a": {"k": 1}})
    claim = Claim(77, 3, 2, "a", '{ "k": 1 }', 12345)
    assert (await store.take_in([of_earlier(claim, "5")])).recorded == [claim]
    found = (await database.all())["a"]
    assert (found["status"], found["result"], found["worker"]) == ("completed", 5, None)
    assert (await store.take_in([of_earlier(claim, "5")])).known == [claim]
    assert [c.name for c in (await store.record(Record(worker, idle=3))).claims] == ["x", "b"]


async def test_a_failed_attempt_that_is_to_be_tried_again_is_taken_in_as_one(database):
    store, worker = await database.worker(["a"])
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    assert (await store.take_in([of_earlier(claim, cause="exception", again=True)])).recorded == [claim]
    assert await database.statuses() == ["pending"]
    (next_one,) = (await store.record(Record(worker, idle=1))).claims
    assert (next_one.attempt, next_one.charged) == (2, 2)


@pytest.mark.parametrize("why", ["other args", "completed", "put back", "later failure", "held", "unknown"])
async def test_a_result_that_does_not_fit_changes_nothing_and_is_named_with_the_reason(database, why):
    store, worker = await database.worker(["a"])
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    kept = of_earlier(claim, '"old"')
    if why == "other args":
        await database.seed(await database.open(), ["b"], "rerun")
    elif why == "unknown":
        kept = of_earlier(claim._replace(name="new"))
    else:
        await store.record(Record(worker, released=[claim]))
        (newer,) = (await store.record(Record(worker, idle=1))).claims
        if why == "later failure":
            await store.record(Record(worker, [broken(newer)]))
            kept = of_earlier(claim, cause="exception")
        elif why != "held":
            await store.record(Record(worker, [done(newer, '"new"')]))
        if why == "put back":
            database.retry(None, "completed")

    def stored():
        return [sorted(map(repr, database.query(f"SELECT * FROM {table}"))) for table in database.place.state_tables]

    before = stored()
    taken = await store.take_in([kept])
    assert not taken.recorded
    ((named, reason),) = taken.waits if why in ("held", "unknown") else taken.refused
    assert named == kept.claim
    assert reason
    assert stored() == before


async def test_a_completed_result_stands_above_a_later_failure(database):
    store, worker = await database.worker(["a"])
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    await store.record(Record(worker, released=[claim]))
    (newer,) = (await store.record(Record(worker, idle=1))).claims
    await store.record(Record(worker, [broken(newer)]))
    assert (await store.take_in([of_earlier(claim, "7")])).recorded == [claim]
    assert (await store.take_in([of_earlier(claim, "7")])).known == [claim]
    found = (await database.all())["0"]
    assert (found["status"], found["result"], found["attempts"]) == ("completed", 7, 2)
    assert (await store.summary()).failed == 0


async def test_the_feed_brings_each_ended_evaluation_in_the_order_of_the_commits(database):
    store, worker = await database.worker(range(5))
    claims = (await store.record(Record(worker, idle=5))).claims
    await store.record(Record(worker, [done(claims[3]), broken(claims[1])]))
    cursor, ended = await store.ended_since(0, 100)
    assert [(id, e["name"], e["status"]) for id, e in ended] == [(4, "3", "completed"), (2, "1", "failed")]
    assert await store.ended_since(cursor, 100) == (cursor, [])
    await store.record(Record(worker, [broken(claims[0], "timeout", again=True), done(claims[2])]))
    cursor, ended = await store.ended_since(cursor, 100)
    assert [e["name"] for _, e in ended] == ["2"]


async def test_the_feed_comes_in_pages(database):
    store, worker = await database.worker(range(10))
    await store.record(Record(worker, [done(c) for c in (await store.record(Record(worker, idle=10))).claims]))
    names, cursor = [], 0
    while True:
        cursor, ended = await store.ended_since(cursor, 3)
        if not ended:
            break
        names += [e["name"] for _, e in ended]
    assert names == [str(i) for i in range(10)]


async def test_changed_tells_of_what_others_give_back_or_add_and_not_of_ones_own_writes(database):
    store, worker = await database.worker([1, 2, 3])
    other, its = await database.worker([1, 2, 3])
    claims = (await other.record(Record(its, idle=1))).claims
    await until(store.changed)
    for _ in range(3):
        await store.record(Record(worker, released=(await store.record(Record(worker, idle=1))).claims))
        assert await store.changed() is False
    await other.record(Record(its, released=claims))
    await until(store.changed)
    assert await store.changed() is False
    await database.open([1, 2, 3, 4])
    await until(store.changed)


async def test_the_summary_counts_by_status_and_cause(database):
    store, worker = await database.worker(range(6))
    claims = (await store.record(Record(worker, idle=5))).claims
    await store.record(
        Record(
            worker, [done(claims[0]), broken(claims[1]), broken(claims[2], "crash"), broken(claims[3], "timeout", again=True)]
        )
    )
    summary = await store.summary()
    assert (summary.pending, summary.in_progress, summary.completed, summary.failed) == (2, 1, 1, 2)
    assert summary.causes == {"exception": 1, "crash": 1}


# Putting back


async def test_retry_puts_failed_ones_back_with_a_fresh_budget(database):
    store, worker = await database.worker(range(3))
    claims = (await store.record(Record(worker, idle=3))).claims
    await store.record(Record(worker, [broken(claims[0]), broken(claims[1]), done(claims[2])]))
    assert database.retry(None, "failed") == 2
    assert await database.statuses() == ["pending", "pending", "completed"]
    recorded = await store.record(Record(worker, idle=3))
    assert [(c.name, c.attempt, c.charged) for c in recorded.claims] == [("0", 2, 1), ("1", 2, 1)]
    assert (await database.all())["0"]["attempts"] == 2
    assert database.query("SELECT count(*) FROM attempts WHERE outcome = 'exception'") == [(2,)]


async def test_retry_by_name_leaves_other_statuses_alone(database):
    store, worker = await database.worker({"a": 1, "7": 2, "c": 3})
    claims = (await store.record(Record(worker, idle=3))).claims
    await store.record(Record(worker, [broken(claims[0]), broken(claims[1]), done(claims[2])]))
    assert database.retry(["7", "c"], "failed") == 1
    assert await database.statuses() == ["failed", "pending", "completed"]
    assert database.retry(["c"], "completed") == 1


async def test_retrying_an_unknown_name_changes_nothing(database):
    store, worker = await database.worker([1])
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    await store.record(Record(worker, [broken(claim)]))
    with pytest.raises(UnknownNameError, match="no evaluation is named 'x', '9'"):
        database.retry(["0", "x", "9"], "failed")
    assert await database.statuses() == ["failed"]


async def test_a_closed_store_says_so(database):
    store = await database.open([1])
    await store.close()
    await store.close()
    with pytest.raises(StoreClosedError):
        await store.summary()


# Leases: taking back


def keeping_of(store):
    return store.lease_keeping()


async def test_a_worker_whose_beat_stands_still_for_its_lease_is_dead(database, monkeypatch):
    monkeypatch.setattr("speval.stores.liveness.is_gone", lambda process, machine: False)
    store, worker = await database.worker([1, 2], lease=10)
    other, its = await database.worker([1, 2], lease=10)
    claims = (await store.record(Record(worker, idle=2))).claims
    keeping, its_keeping = keeping_of(store), keeping_of(other)
    try:
        assert its_keeping.reclaim(its, 3).workers == []
        database.clock.now += 9
        assert its_keeping.reclaim(its, 3).workers == []
        assert keeping.renew(worker, 1.0)
        assert its_keeping.reclaim(its, 3).workers == []
        database.clock.now += 9.9
        assert its_keeping.reclaim(its, 3).workers == []
        database.clock.now += 0.2
        reclaimed = its_keeping.reclaim(its, 3)
        assert (len(reclaimed.workers), reclaimed.pending, reclaimed.failed) == (1, 2, [])
        assert not keeping.renew(worker, 1.0)
        assert (await store.record(Record(worker, [done(claims[0])], idle=1))).lost
        assert await database.statuses() == ["pending", "pending"]
        assert database.query("SELECT outcome, error_type FROM attempts") == [("lost", "WorkerLost")] * 2
        assert [c.charged for c in (await other.record(Record(its, idle=2))).claims] == [2, 2]
    finally:
        keeping.close()
        its_keeping.close()


async def test_one_that_renews_between_the_look_and_the_verdict_lives(database, monkeypatch):
    monkeypatch.setattr("speval.stores.liveness.is_gone", lambda process, machine: False)
    store, worker = await database.worker([1], lease=10)
    other, its = await database.worker([1], lease=10)
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    keeping, its_keeping = keeping_of(store), keeping_of(other)
    try:
        its_keeping.reclaim(its, 3)
        database.clock.now += 11
        original = its_keeping.take_back

        def renew_first(*args):
            assert keeping.renew(worker, 1.0)
            return original(*args)

        monkeypatch.setattr(its_keeping, "take_back", renew_first)
        assert its_keeping.reclaim(its, 3).workers == []
        assert (await store.record(Record(worker, [done(claim)], idle=1))).refused == []
    finally:
        keeping.close()
        its_keeping.close()


async def test_no_wall_clock_decides_who_is_dead(database, monkeypatch):
    monkeypatch.setattr("speval.stores.liveness.is_gone", lambda process, machine: False)
    store, _ = await database.worker([1], lease=10)
    other, its = await database.worker([1], lease=10)
    keeping = keeping_of(other)
    try:
        keeping.reclaim(its, 3)
        for jump in (36_000, -72_000, 1e9):
            database.clock.wall_now += jump
            database.clock.now += 3
            assert keeping.reclaim(its, 3).workers == []
        assert await store.changed() is not None
    finally:
        keeping.close()


@pytest.mark.parametrize("apart", [3600, -3600])
async def test_two_hosts_whose_clocks_are_an_hour_apart_take_nothing_from_each_other(database, monkeypatch, apart):
    monkeypatch.setattr("speval.stores.liveness.is_gone", lambda process, machine: False)
    store, worker = await database.worker([1, 2], lease=10)
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    there = MovableClock()
    there.wall_now += apart
    there.now = 5_000_000.0
    other = database.place.store(clock=there)
    await other.open()
    database.stores.append(other)
    await database.seed(other, [1, 2])
    its = await other.register(10)
    keeping, its_keeping = keeping_of(store), keeping_of(other)
    try:
        for _ in range(20):  # a hundred seconds, both renewing
            for clock in (database.clock, there):
                clock.now += 5
                clock.wall_now += 5
            assert keeping.renew(worker, 1)
            assert its_keeping.renew(its, 1)
            assert keeping.reclaim(worker, 3).workers == its_keeping.reclaim(its, 3).workers == []
        assert [c.name for c in (await other.record(Record(its, idle=2))).claims] == ["1"]
        assert (await store.record(Record(worker, [done(claim)]))).refused == []
    finally:
        keeping.close()
        its_keeping.close()


async def test_after_a_suspend_of_ten_leases_nobody_is_declared_dead(database, monkeypatch):
    monkeypatch.setattr("speval.stores.liveness.is_gone", lambda process, machine: False)
    store, worker = await database.worker([1], lease=10)
    other, its = await database.worker([1], lease=10)
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    keeping, its_keeping = keeping_of(store), keeping_of(other)
    told = []
    lease = Lease(keeping, worker, 10, 3, database.clock, on_doubt=told.append, on_lost=told.append, on_broken=told.append)
    its_lease = Lease(its_keeping, its, 10, 3, database.clock, on_doubt=told.append, on_lost=told.append, on_broken=told.append)
    try:
        for one in (lease, its_lease):
            one._beat()
        database.clock.slept += 100  # both were suspended together; the monotonic clock stood still
        database.clock.wall_now += 100
        for _ in range(5):
            for one in (its_lease, lease):  # whichever wakes first
                one._beat()
            database.clock.now += 2.5
        assert told == []
        assert (await store.record(Record(worker, [done(claim)]))).refused == []
    finally:
        keeping.close()
        its_keeping.close()


async def test_a_dead_workers_last_attempt_fails_as_lost(database, monkeypatch):
    monkeypatch.setattr("speval.stores.liveness.is_gone", lambda process, machine: True)
    other, its = await database.worker([1, 2])
    keeping = keeping_of(other)
    try:
        for round_ in (1, 2, 3):
            store, worker = await database.worker([1, 2])
            claims = (await store.record(Record(worker, idle=1))).claims
            assert claims[0].charged == round_
            reclaimed = keeping.reclaim(its, 3)
            assert reclaimed.failed == (["0"] if round_ == 3 else [])
        evaluation = (await database.all())["0"]
        assert evaluation["status"] == "failed"
        assert evaluation["attempts"] == 3
        assert evaluation["error"]["cause"] == "lost"
        assert "died or was out of reach" in evaluation["error"]["message"]
    finally:
        keeping.close()


async def test_taking_back_many_claims_is_done_in_pieces_and_anybody_can_go_on_with_it(database, monkeypatch):
    gone = set()
    monkeypatch.setattr("speval.stores.liveness.is_gone", lambda process, machine: process.pid in gone)
    monkeypatch.setattr("speval.stores.liveness._BOUND", 10)
    store, worker = await database.worker(range(35))
    await store.record(Record(worker, idle=35))
    second, its = await database.worker(range(35))
    database.place.execute("UPDATE workers SET pid = -1 WHERE id = ?", worker)
    gone.add(-1)
    keeping = keeping_of(second)
    last = keeping_of(second)
    try:
        original, calls = keeping.take_back, []

        def die_in_the_second(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(keeping, "take_back", die_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            keeping.reclaim(its, 3)
        assert (await database.statuses()).count("pending") == 10
        gone.clear()  # nobody needs to find it dead a second time
        assert (await store.record(Record(worker, idle=1))).lost
        reclaimed = last.reclaim(its, 3)
        assert reclaimed.pending == 25
        assert set(await database.statuses()) == {"pending"}
        assert last.reclaim(its, 3).workers == []
    finally:
        keeping.close()
        last.close()
