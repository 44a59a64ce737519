"""Whatever is in a file, in a value or in an exception: an error that names it, or an answer, and nothing else."""

import asyncio
import json
import math
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speval import aio
from speval.errors import ForeignDatabaseError, SpevalError

PROFILE: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": False,
}
WITHIN = 20  # seconds a call may take before it counts as one that hangs


@pytest.fixture
def run() -> Iterator:
    """Run coroutines one after the other, in one loop for all examples of a test."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        yield lambda coroutine: runner.run(asyncio.wait_for(coroutine, WITHIN))


# Files


def failing(args):
    if args % 3 == 0:
        raise ValueError(f"no {args}")
    return {"double": args * 2, "text": "x" * args}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """Return a database of ours with some of everything, as one file."""
    db = tmp_path_factory.mktemp("whole") / "runs.db"
    space = {**{str(i): i for i in range(40)}, "a name": 7, "07": 9}

    async def make():
        await aio.speval(failing, space, db, executor="thread", progress=False)
        await aio.retry(db, ["3", "6"])
        return db.read_bytes()

    return asyncio.run(make())


def damage(whole: bytes, how: str, places: list[tuple[float, int]], extra: bytes) -> bytes:
    """Return the file with something done to it; places are shares of its length."""
    data = bytearray(whole)
    if how == "bytes changed":
        for share, byte in places:
            data[int(share * (len(data) - 1))] = byte
    elif how == "cells changed":  # near the ends of pages, where the rows are
        for share, byte in places:
            page = int(share * 1000) % (len(data) // 4096)
            data[page * 4096 + 4095 - int(share * 1e6) % 600] = byte
    elif how == "cut":
        del data[int(places[0][0] * len(data)) :]
    elif how == "part overwritten":
        start = int(places[0][0] * (len(data) - 1))
        data[start : start + len(extra)] = extra
    elif how == "header and garbage":
        data = data[:100] + extra
    elif how == "magic and garbage":
        data = bytearray(b"SQLite format 3\0" + extra)
    else:
        data = bytearray(extra)
    return bytes(data)


def error_of(run, coroutine) -> SpevalError | None:
    """Return the error of ours that a call ends in; every other one is raised."""
    try:
        run(coroutine)
    except SpevalError as error:
        return error
    return None


ways = st.sampled_from(
    ["bytes changed", "cells changed", "cut", "part overwritten", "header and garbage", "magic and garbage", "garbage"]
)
places = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8)


def test_whatever_is_in_a_file_it_is_used_or_refused_by_name_and_a_foreign_one_is_left_as_it_was(whole, run):
    @settings(max_examples=120, **PROFILE)
    @given(how=ways, places=places, extra=st.binary(max_size=3000))
    def refused_or_used(how, places, extra):
        data = damage(whole, how, places, extra)
        for call in (aio.load_evals, aio.retry, partial(again, space=range(42))):
            with tempfile.TemporaryDirectory() as folder:
                db = Path(folder, "some.db")
                db.write_bytes(data)
                error = error_of(run, call(db))
                assert error is None or "some.db" in str(error)
                if isinstance(error, ForeignDatabaseError):
                    assert db.read_bytes() == data
                    assert [path.name for path in Path(folder).iterdir()] == ["some.db"]

    refused_or_used()


COLUMNS = {
    "meta": ["key", "value"],
    "evaluations": ["name", "args"],
    "fresh": ["first", "last", "updated_at"],
    "claimed": ["first", "last", "worker", "ahead", "updated_at"],
    "queue": ["id", "attempt", "released", "forgiven", "suspect", "updated_at"],
    "running": ["id", "attempt", "released", "forgiven", "suspect", "ahead", "held", "worker", "updated_at"],
    "attempts": [
        *("evaluation", "attempt", "worker", "started_at", "duration", "ended_at", "outcome", "result", "error_type"),
        *("final", "released", "suspect"),
    ],
    "workers": ["host", "pid", "machine", "start", "lease", "beat", "dead", "started_at", "last_seen", "ended_at"],
}
odd_values = st.sampled_from([None, -1, 7, 2**62, 0.5, "", "text", "[1", "\x00", b"", b"\xff\x00", "9" * 30])


def test_whatever_a_stranger_has_written_into_a_column_is_used_or_refused_by_name(whole, run):
    @settings(max_examples=60, **PROFILE)
    @given(
        column=st.sampled_from([(table, column) for table, columns in COLUMNS.items() for column in columns]),
        value=odd_values,
        row=st.integers(0, 45),
    )
    def refused_or_used(column, value, row):
        table, name = column
        with tempfile.TemporaryDirectory() as folder:
            db = Path(folder, "some.db")
            db.write_bytes(whole)
            connection = sqlite3.connect(db)
            with suppress(sqlite3.IntegrityError), connection:
                key = "key" if table == "meta" else "rowid"
                one = f"SELECT {key} FROM {table} LIMIT 1 OFFSET {row} % (SELECT count(*) FROM {table})"
                connection.execute(f"UPDATE {table} SET {name} = ? WHERE {key} IN ({one})", (value,))
            connection.close()
            for call in (aio.load_evals, partial(again, space=range(42)), aio.retry, partial(again, space=range(43))):
                error = error_of(run, call(db))
                assert error is None or "some.db" in str(error)

    refused_or_used()


def again(db, space):
    return aio.speval(failing, space, db, executor="thread", on_changed="keep", lease=1.0, progress=False, max_attempts=1)


# Values

characters = st.characters()  # lone surrogates too
texts = st.text(characters, max_size=20)
numbers = st.one_of(
    st.integers(),
    st.integers(-(10**4200), 10**4200),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=3).map(tuple), st.dictionaries(texts, inner, max_size=4)
    ),
    max_leaves=12,
)


def nested(value, depth):
    for number in range(depth):
        value = {"in": value} if number % 2 else [value]
    return value


deep_values = st.builds(nested, values, st.integers(0, 150))
storable_names = st.text(st.characters(codec="utf-8"), max_size=10)


def as_json(value) -> str:
    """Return a text by which values are told apart that == does not: NaN, -0.0, 1 and True, the order of keys."""
    return json.dumps(value)


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_any_value_comes_back_from_args_and_results_as_json_has_it(executor, run):
    @settings(max_examples=40 if executor == "thread" else 8, **PROFILE)
    @given(space=st.dictionaries(storable_names, st.one_of(values, deep_values), min_size=1, max_size=60))
    def comes_back(space):
        with tempfile.TemporaryDirectory() as folder:
            db = Path(folder, "values.db")
            options = {"executor": executor, "concurrency": 2, "progress": False}
            summary = run(aio.speval(lambda args: [args, {"again": args}], space, db, **options))
            assert summary.completed == len(space)
            evaluations = run(aio.load_evals(db))
            assert [e["name"] for e in evaluations] == list(space)
            for evaluation, args in zip(evaluations, space.values(), strict=True):
                assert as_json(evaluation["args"]) == as_json(args)
                assert as_json(evaluation["result"]) == as_json([args, {"again": args}])
            # What is stored is what was given, whatever form it took on the way.
            again = run(aio.speval(lambda args: 1 / 0, space, db, **options))
            assert (again.completed, again.recorded) == (len(space), 0)

    comes_back()


# Exceptions


class TextThatFailsError(Exception):
    def __str__(self):
        raise self.args[0]


class TextThatIsNoneError(Exception):
    def __str__(self):
        return None


class EndlessTextError(Exception):
    def __str__(self):
        return str(self)


class OddInitError(Exception):
    def __init__(self, one, *, other):
        self.one, self.other = one, other


class UnlikeOthersError(Exception):
    @property  # type: ignore[misc]
    def __class__(self):
        raise RuntimeError("not telling")

    def __reduce__(self):
        raise RuntimeError("not going")

    def __bool__(self):
        raise RuntimeError("neither")

    def __eq__(self, other):
        raise RuntimeError("not comparing")

    __hash__ = None


class OddText(str):
    """A string of which only the class is odd."""

    __slots__ = ()

    def encode(self, *args, **kwargs):
        raise RuntimeError("not encoding")

    def __len__(self):
        raise RuntimeError("not measuring")


class OddTextError(Exception):
    def __str__(self):
        return OddText("odd")


class NamelessType(type):
    def __getattribute__(cls, name):
        if name in ("__qualname__", "__name__"):
            raise RuntimeError("no name")
        return super().__getattribute__(name)


class NamelessError(Exception, metaclass=NamelessType):
    pass


class OddResult(dict):
    def items(self):
        raise OddTextError

    def values(self):
        raise OddTextError

    def __iter__(self):
        raise OddTextError


def with_cause_loop(text):
    one, other = ValueError(text), KeyError(text)
    one.__cause__, other.__cause__ = other, one
    one.__context__ = other
    return one


def with_itself(text):
    error = ValueError(text)
    error.args = (error, [error])
    return error


def with_notes(text):
    error = ValueError(text)
    error.__notes__ = [text, 5, TextThatFailsError(ValueError(text))]  # type: ignore[list-item]
    return error


def with_strange_notes(text):
    error = ValueError(text)
    error.__notes__ = 17  # type: ignore[assignment]
    return error


def deep_group(text):
    error: Exception = ValueError(text)
    for _ in range(200):
        error = ExceptionGroup(text or "group", [error])
    return error


def long_chain(text):
    error = ValueError(text)
    for _ in range(3000):
        above = ValueError(text)
        above.__cause__ = error
        error = above
    return error


EXCEPTIONS = {
    "plain": ValueError,
    "huge": lambda text: ValueError((text or "x") * 200_000),
    "no str": lambda text: TextThatFailsError(ValueError(text)),
    "str exits": lambda text: TextThatFailsError(SystemExit(3)),
    "str interrupts": lambda text: TextThatFailsError(KeyboardInterrupt()),
    "str is none": TextThatIsNoneError,
    "endless str": EndlessTextError,
    "odd init": lambda text: OddInitError(text, other=text),
    "unpicklable": lambda text: ValueError(threading.Lock(), text),
    "unlike others": UnlikeOthersError,
    "odd text": OddTextError,
    "nameless": NamelessError,
    "in itself": with_itself,
    "causes in a circle": with_cause_loop,
    "notes": with_notes,
    "strange notes": with_strange_notes,
    "group": lambda text: ExceptionGroup(text, [ValueError(text), ExceptionGroup("", [TextThatFailsError(ValueError())])]),
    "deep group": deep_group,
    "base group": lambda text: BaseExceptionGroup(text, [KeyboardInterrupt(), SystemExit(text)]),
    "long chain": long_chain,
    "strange type": lambda text: type("\ud800" + text.replace("\0", ""), (Exception,), {"__module__": text})(text),
    "module no text": lambda text: type("T", (Exception,), {"__module__": 5})(text),
    "type of odd text": lambda text: type("T", (Exception,), {"__qualname__": OddText("T")})(text),
    "syntax": lambda text: SyntaxError(text, (text, 5, -3, text, 2**40, 0)),
    "unicode": lambda text: UnicodeEncodeError("utf-8", text + "\ud800", 0, 10**9, text),
    "os": lambda text: OSError(2, text, text),
    "key": KeyError,
    "stop": StopIteration,
    "stop async": StopAsyncIteration,
    "generator exit": GeneratorExit,
    "cancelled": asyncio.CancelledError,
    "interrupt": KeyboardInterrupt,
    "exit": SystemExit,
    "recursion": RecursionError,
    "memory": MemoryError,
}


def misbehave(args):
    kind, text = args
    if kind == "fine":
        return text
    if kind == "odd result":
        return OddResult(a=1)
    raise EXCEPTIONS[kind](text)


misbehaviours = st.lists(
    st.tuples(st.sampled_from(["fine", "odd result", *EXCEPTIONS]), st.text(characters, max_size=6)), min_size=1, max_size=12
)


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_any_exception_is_its_evaluations_failure_and_touches_no_other(executor, run):
    @settings(max_examples=30 if executor == "thread" else 6, **PROFILE)
    @given(some=misbehaviours)
    def touches_no_other(some):
        space = [*some, ("fine", "the last")]
        with tempfile.TemporaryDirectory() as folder:
            db = Path(folder, "exceptions.db")
            options = {"executor": executor, "concurrency": 2, "progress": False, "retry_on": (ZeroDivisionError,)}
            summary = run(aio.speval(misbehave, space, db, max_attempts=1, **options))
            assert summary.total == summary.completed + summary.failed
            for evaluation in run(aio.load_evals(db)):
                kind, text = evaluation["args"]
                if kind == "fine":
                    assert (evaluation["status"], evaluation["result"]) == ("completed", text)
                    continue
                assert evaluation["status"] == "failed"
                error = evaluation["error"]
                assert error["cause"] == ("unserializable" if kind == "odd result" else error["cause"])
                assert error["cause"] in ("exception", "crash", "unserializable")
                assert len(error["message"]) < 100_000
                json.dumps(error, ensure_ascii=False).encode()

    touches_no_other()


@pytest.mark.parametrize("kind", sorted(EXCEPTIONS))
async def test_each_odd_exception_in_a_thread_is_a_failure_that_can_be_read(kind, db):
    space = [("fine", "1"), (kind, "text"), ("fine", "2")]
    summary = await asyncio.wait_for(aio.speval(misbehave, space, db, executor="thread", progress=False), WITHIN)
    assert (summary.completed, summary.failed) == (2, 1)
    assert (await aio.load_evals(db))[1]["error"]["cause"] == "exception"
