"""What is read is what was written, and what is not keeps nothing else from being read."""

import logging
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from speval import as_completed, load_evals, retry, speval
from speval.bitmap import Bitmap
from speval.errors import DatabaseError, EvaluationDamagedError, UnknownNameError
from speval.model import Outcome
from speval.options import checked_database
from speval.spaces.eager import Space
from speval.stores import make_control, make_store
from speval.stores.base import Ended, Record
from speval.stores.control import Choice
from speval.stores.copying import copy

from .conftest import rows, signed

NAMES = ["a", "a\0b", "a\0", "\0", "a\x10", "a\x100", "b"]


def change(db, *statements):
    with closing(sqlite3.connect(db)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def names(db, **choice):
    return [e["name"] for e in load_evals(db, **choice)]


# Names


def test_only_the_named_one_is_dropped_or_retried_whatever_is_in_a_name(anywhere):
    speval(str, dict.fromkeys(NAMES, 1), anywhere)
    assert retry(anywhere, ["a\0b", "\0"], status="completed") == 2
    assert names(anywhere, status="pending") == ["a\0b", "\0"]
    with make_control(checked_database(anywhere), "write") as control:
        assert control.drop(["a\0b", "a\x10"]) == 2
        assert names(anywhere) == ["a", "a\0", "\0", "a\x100", "b"]
        for unknown in ("a\0c", "b\0", "\0a"):
            with pytest.raises(UnknownNameError):
                control.drop([unknown])
            with pytest.raises(UnknownNameError):
                retry(anywhere, [unknown])


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a", ["a"]),
        ("a?", ["a\0", "a\x10"]),
        ("a??", ["a\0b", "a\x100"]),
        ("*b", ["a\0b", "b"]),
        ("a\0*", ["a\0b", "a\0"]),
        ("\0", ["\0"]),
        ("*", NAMES),
    ],
)
def test_a_pattern_fits_whole_names_whatever_is_in_them(anywhere, pattern, found):
    speval(str, dict.fromkeys(NAMES, 1), anywhere)
    with make_control(checked_database(anywhere)) as control:
        assert [e["name"] for e in control.evaluations(pattern=pattern)] == found


def test_a_name_may_be_as_long_as_it_likes(anywhere):
    rng = random.Random(1)
    long = ["".join(chr(rng.randrange(33, 0x2FFF)) for _ in range(length)) for length in (900, 2_700, 100_000)]
    space = {name + end: end for name in long for end in ("", "x", "y")}
    assert speval(str, space, anywhere).completed == 9
    assert speval(str, space, anywhere).recorded == 0
    assert names(anywhere) == list(space)
    assert retry(anywhere, [long[2] + "x"], status="completed") == 1
    assert names(anywhere, status="pending") == [long[2] + "x"]


# Damage

DAMAGE = {
    "its result": "UPDATE attempts SET result = '65' WHERE evaluation = 6",
    "its result, no more": "UPDATE attempts SET result = NULL WHERE evaluation = 6",
    "its args": "UPDATE evaluations SET args = '77' WHERE id = 6",
    "its time": "UPDATE attempts SET duration = 77 WHERE evaluation = 6",
    "its attempt's evaluation": "UPDATE attempts SET evaluation = -7 WHERE evaluation = 6",
    "its attempt's number": "UPDATE attempts SET attempt = 9 WHERE evaluation = 6",
    "its last attempt": "UPDATE attempts SET final = 0 WHERE evaluation = 6",
    "its status, completed": "UPDATE attempts SET outcome = 'completed' WHERE evaluation = 4",
    "its status, failed": "UPDATE attempts SET outcome = 'exception' WHERE evaluation = 6",
    "its status, pending": "INSERT INTO queue VALUES (6, 1, 0, 0, 0, 0.0)",
    "its status, never claimed": "INSERT INTO fresh VALUES (6, 6, 0.0)",
    "its status, claimed": "INSERT INTO claimed VALUES (6, 6, 7, 0, 0.0)",
    "its status, in progress": "INSERT INTO running VALUES (6, 1, 0, 0, 0, 0, 0, 7, 0.0)",
    "its attempts, given back": "UPDATE attempts SET released = 7 WHERE evaluation = 6",
    "its checksum": "UPDATE attempts SET crc = NULL WHERE evaluation = 6",
    "its name": "UPDATE evaluations SET name = 'other' WHERE id = 6",
    "its attempt, gone": "DELETE FROM attempts WHERE evaluation = 6",
    "its status, gone": "DELETE FROM attempts WHERE evaluation = 6 AND final",
    "its args, gone": "DELETE FROM evaluations WHERE id = 6",
    "its result, too deep": "UPDATE attempts SET result = printf('%.300c%.300c', '[', ']') WHERE evaluation = 6",
}


def work(args):
    if args == 3:
        raise ValueError("three")
    return args * 2


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "sound.db"
    speval(work, range(10), path, executor="thread")
    return path


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_one_damaged_evaluation_is_left_out_and_named_and_the_others_are_there(sound, db, caplog, damage):
    truth = load_evals(sound)
    shutil.copy(sound, db)
    change(db, damage)
    if "printf" in damage:
        signed(db)
    good = load_evals(db)
    assert len(good) == 9
    assert all(e in truth for e in good)
    assert "skipped: 1 evaluation is damaged" in caplog.text
    with make_control(db) as control:
        assert list(control.evaluations()) == good
        assert any(finding.is_error for finding in control.check().findings)
    copied = copy(db, db.with_name("copy.db"))
    assert copied.evaluations in (9, 10)
    assert all(e in truth or e["status"] == "pending" for e in load_evals(db.with_name("copy.db")))


@pytest.mark.parametrize(
    "damage", ["its result", "its args", "its status, pending", "its attempt, gone", "its result, too deep"]
)
def test_a_damaged_evaluation_asked_for_by_its_name_is_an_error(sound, db, damage):
    shutil.copy(sound, db)
    change(db, DAMAGE[damage])
    if "deep" in damage:
        signed(db)
    with make_control(db) as control, pytest.raises(EvaluationDamagedError, match=r"runs\.db: evaluation '5' is damaged: "):
        control.evaluation("5")


def test_nothing_is_evaluated_with_args_that_are_not_those_that_were_written(sound, db):
    shutil.copy(sound, db)
    retry(db, ["5"], status="completed")
    change(db, "UPDATE evaluations SET args = '77' WHERE id = 6")
    called = []
    with pytest.raises(EvaluationDamagedError, match="evaluation '5' is damaged"):
        speval(called.append, range(10), db, executor="thread", on_changed="keep")
    assert called == []
    with make_control(db, "write") as control:
        assert control.drop(["5"]) == 1
    assert speval(work, range(10), db, executor="thread").completed == 9


def test_no_bit_that_flips_changes_an_answer(tmp_path):
    db = tmp_path / "runs.db"
    speval(work, range(120), db, executor="thread")
    truth = {e["name"]: e for e in load_evals(db)}
    raw = db.read_bytes()
    rng = random.Random(7)
    logging.getLogger("speval.store").setLevel("CRITICAL")
    told = 0
    try:
        for _ in range(400):
            data = bytearray(raw)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            flipped = tmp_path / "flipped.db"
            flipped.write_bytes(data)
            try:
                found = load_evals(flipped)
            except DatabaseError:
                told += 1
                continue
            told += len(found) < len(truth)
            for e in found:
                assert [e[key] for key in ("status", "args", "result", "updated")] == [
                    truth[e["name"]][key] for key in ("status", "args", "result", "updated")
                ]
    finally:
        logging.getLogger("speval.store").setLevel("NOTSET")
    assert told > 40


def test_a_copy_of_a_damaged_source_names_the_source_and_not_the_target(tmp_path):
    source, target = tmp_path / "source.db", tmp_path / "target.db"
    speval(str, {f"name {i}": "x" * 200 for i in range(2000)}, source, executor="thread")
    (page,) = rows(source, "SELECT rootpage FROM sqlite_master WHERE name = 'evaluations'")[0]
    with source.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)
    with pytest.raises(DatabaseError, match=r"source\.db: damaged") as caught:
        copy(source, target)
    assert "target" not in str(caught.value)


# Pages


async def large(db, count, size):
    """Make a database with so many results of so many bytes."""
    store = make_store(checked_database(db))
    await store.open()
    space = Space()
    list(space.fill(range(count)))
    await store.seed(space, "error")
    worker = await store.register(30)
    for claim in (await store.record(Record(worker, idle=count))).claims:
        await store.record(Record(worker, [Ended(claim, Outcome(None, f'"{"x" * size}"', None, 1.0, 1.0), False)]))
    await store.leave(worker)
    space.close()
    return store


async def test_a_page_of_reading_is_bounded_in_bytes(anywhere):
    store = await large(anywhere, 30, 1_000_000)
    try:
        sizes = []
        cursor = 0
        with make_control(checked_database(anywhere)) as control:
            after = 0
            while after is not None:
                after, rows = control._page(Choice(), after, 500)
                sizes.append(len(rows))
        cursor = 0
        while True:
            cursor, ended = await store.ended_since(cursor, 1000)
            if not ended:
                break
            sizes.append(len(ended))
        assert sum(sizes) == 60
        assert max(sizes) <= 10
        with make_control(checked_database(anywhere)) as control:
            assert len(list(control.evaluations())) == 30
    finally:
        await store.close()


async def test_as_completed_needs_a_few_pages_of_memory_for_results_of_any_size(anywhere):
    await (await large(anywhere, 100, 1_500_000)).close()
    code = f"""
import resource
from speval import as_completed
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for _ in as_completed(str, range(100), {str(anywhere)!r}, progress=False))
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    count, megabytes = map(int, done.stdout.split())
    assert count == 100
    assert megabytes < 100


def test_an_id_far_away_costs_no_memory(db):
    speval(str, range(3), db, executor="thread")
    change(
        db,
        "UPDATE evaluations SET id = 20000000000 WHERE id = 3",
        "UPDATE attempts SET evaluation = 20000000000 WHERE evaluation = 3",
    )
    signed(db)
    assert len(list(as_completed(str, range(3), db, executor="thread"))) == 3


def test_a_bitmap_is_a_set():
    bitmap, numbers = Bitmap(), [0, 1, 7, 8, 1023, 1024, 2**62, -1, 5 * 10**9]
    assert [bitmap.add(n) for n in numbers] == [True] * len(numbers)
    assert [bitmap.add(n) for n in numbers] == [False] * len(numbers)
    assert [n in bitmap for n in (*numbers, 2, 1025, -2)] == [True] * len(numbers) + [False] * 3
    assert len(bitmap._parts) == 5
