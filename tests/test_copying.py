"""One database copied to another: the same to everybody who looks, and as good to go on with."""

import asyncio
import sqlite3
from contextlib import closing
from itertools import product
from typing import Any

import pytest

from speval import DatabaseNotEmptyError, aio, load_evals
from speval.errors import DatabaseError, DatabaseMissingError
from speval.model import Outcome, Settings
from speval.options import checked_database
from speval.spaces.eager import Space
from speval.stores import make_control, make_store
from speval.stores.base import Ended, Record
from speval.stores.copying import copy

from .conftest import content, exists, rows, signed

KINDS = ("sqlite", "postgres")


@pytest.fixture
def make(tmp_path, request, namespace):
    """Return the argument of a database of a kind."""

    def make(kind, name="runs"):
        if kind == "sqlite":
            return tmp_path / f"{name}.db"
        return request.getfixturevalue("postgres").url(namespace=f"{namespace}_{name}")

    return make


@pytest.fixture(params=product(KINDS, KINDS), ids="-".join)
def pair(request, make):
    """A source and a target, of each kind."""
    source, target = request.param
    return make(source, "source"), make(target, "target")


NAMES = ["7", "07", "a\0b\x10", "tab\tline\n\\N", "é\U0001f600", "failed", "tried", "running", "held", "new"]


def ended(claim, cause=None, again=False) -> Ended:
    error: Any = None if cause is None else {"cause": cause, "type": "E\0", "message": "bo\tom\n\\", "traceback": "\x10"}
    return Ended(claim, Outcome(cause, None if cause else f'"\\u0000 {claim.id} \\\\"', error, 5.5, 0.25), again)


async def fill(db):
    """Make a database in which there is something of everything."""
    store = make_store(checked_database(db))
    await store.open()
    space = Space()
    list(space.fill({name: [name, float("nan"), {"b": 1, "a": "\\"}] for name in NAMES}))
    await store.seed(space, "error")
    worker = await store.register(30)
    claims = {c.name: c for c in (await store.record(Record(worker, idle=len(NAMES) - 1))).claims}
    done = [ended(claims[name]) for name in NAMES[:5]]
    await store.record(
        Record(worker, [*done, ended(claims["failed"], "exception"), ended(claims["tried"], "timeout", again=True)])
    )
    await store.record(Record(worker, due=[claims["tried"]]))
    await store.record(Record(worker, [ended(claims["held"], "timeout", again=True)]))
    with make_control(checked_database(db), "write") as control:
        assert control.retry(["7"], status="completed") == 1
        control.set_concurrency(3)
    return store, space


def seen(db, without=()):
    """Return all that people can see."""
    with make_control(checked_database(db)) as control:
        attempts = {e["name"]: [a for a in control.attempts(e["name"]) if a.outcome] for e in control.evaluations()}
        evaluations = [e for e in load_evals(db) if e["name"] not in without]
        return repr([evaluations, attempts, control.overview().settings])


async def test_a_copy_shows_what_the_source_shows_but_that_nothing_is_in_progress(pair):
    source, target = pair
    store, space = await fill(source)
    assert await asyncio.to_thread(copy, source, target) == (10, 8)
    assert seen(source, without=("running",)) == seen(target, without=("running",))
    (running,) = [e for e in load_evals(target) if e["name"] == "running"]
    assert (running["status"], running["attempts"], running["worker"]) == ("pending", 0, None)
    with make_control(checked_database(source)) as control:
        assert control.overview().in_progress == 1
    with make_control(checked_database(target)) as control:
        assert (control.overview().settings, control.overview().workers) == (Settings(False, 3), ())
        assert not any(finding.is_error for finding in control.check().findings)
    await store.close()
    space.close()


async def test_a_copy_is_gone_on_with_as_the_source_would_have_been(pair):
    source, target = pair
    store, space = await fill(source)
    space.close()
    await asyncio.to_thread(copy, source, target)
    await store.close()
    called = []

    def function(args):
        called.append(args[0])

    eval_space = {name: [name, float("nan"), {"b": 1, "a": "\\"}] for name in NAMES}
    summary = await aio.speval(function, eval_space | {"more": [""]}, target, executor="thread")
    assert (summary.completed, summary.failed) == (10, 1)
    assert sorted(called) == sorted(["7", "tried", "running", "held", "new", ""])
    by_name = {e["name"]: e for e in load_evals(target)}
    assert [by_name[name]["attempts"] for name in ("7", "tried", "running", "held", "new", "more")] == [2, 2, 1, 2, 1, 1]
    ids = rows(target, "SELECT id FROM evaluations ORDER BY id")
    assert ids == [(i,) for i in range(1, 12)]
    seqs = [seq for (seq,) in rows(target, "SELECT seq FROM attempts ORDER BY seq")]
    assert len(seqs) == len(set(seqs)) == 14


async def test_there_and_back_it_is_the_same(make):
    there, between, back = make("sqlite", "there"), make("postgres", "between"), make("sqlite", "back")
    store, space = await fill(there)
    for (worker,) in rows(there, "SELECT id FROM workers"):
        await store.leave(worker)
    await store.close()
    space.close()
    await asyncio.to_thread(copy, there, between)
    await asyncio.to_thread(copy, between, back)
    assert seen(there) == seen(between) == seen(back)
    for table in ("evaluations", "attempts"):
        assert rows(there, f"SELECT * FROM {table} ORDER BY 1") == rows(back, f"SELECT * FROM {table} ORDER BY 1")


def unmarked(db):
    """Return all that is in a database, without the mark that tells which -wal belongs to a file."""
    if isinstance(db, str):
        return content(db)
    with closing(sqlite3.connect(db)) as connection:
        return [line for line in connection.iterdump() if "VALUES('log'" not in line]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_target_with_evaluations_is_left_as_it_is(make, kind):
    source, target = make("sqlite", "source"), make(kind, "target")
    await aio.speval(abs, [1, 2, 3], source, executor="thread")
    await aio.speval(abs, [7], target, executor="thread")
    before = unmarked(target)
    with pytest.raises(DatabaseNotEmptyError, match="already has evaluations"):
        await asyncio.to_thread(copy, source, target)
    assert unmarked(target) == before


@pytest.mark.parametrize("kind", KINDS)
async def test_a_missing_source_is_an_error_and_makes_no_target(make, kind):
    source, target = make(kind, "source"), make(kind, "target")
    with pytest.raises(DatabaseMissingError):
        await asyncio.to_thread(copy, source, target)
    assert not exists(target)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_copy_that_breaks_off_leaves_nothing_in_the_target(make, kind, monkeypatch):
    source, target = make("sqlite", "source"), make(kind, "target")
    await aio.speval(abs, range(3000), source, executor="thread")
    connection = sqlite3.connect(source)
    connection.execute("UPDATE evaluations SET name = '0' WHERE id = 2999")  # as text: to people, the name of another one
    connection.commit()
    connection.close()
    signed(source)
    with pytest.raises(DatabaseError):
        await asyncio.to_thread(copy, source, target)
    assert rows(target, "SELECT count(*) FROM evaluations") == rows(target, "SELECT count(*) FROM attempts") == [(0,)]


async def test_a_source_is_copied_while_workers_write(make):
    source, target = make("postgres", "source"), make("sqlite", "target")

    async def function(args):
        await asyncio.sleep(0.001)
        return args

    running = asyncio.create_task(aio.speval(function, range(3000), source, concurrency=5))
    while not (exists(source) and len(load_evals(source, status="completed")) > 100):
        await asyncio.sleep(0.01)
    copied = await asyncio.to_thread(copy, source, target)
    evaluations = load_evals(target)
    assert len(evaluations) == copied.evaluations == 3000
    assert {e["status"] for e in evaluations} <= {"pending", "completed"}
    assert sum(e["status"] == "completed" for e in evaluations) == copied.attempts
    await running
