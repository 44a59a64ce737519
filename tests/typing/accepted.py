"""Calls that a type checker accepts, with the type of what each returns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, assert_type

import pandas as pd
import polars as pl

import speval as package
from speval import (
    Database,
    Evaluation,
    EvaluationsFailed,
    SpevalError,
    Summary,
    aio,
    as_completed,
    load_evals,
    retry,
    speval,
    to_frame,
)

Status = Literal["pending", "in_progress", "completed", "failed"]
Cause = Literal["exception", "timeout", "crash", "lost", "unserializable"]


def square(x: int) -> int:
    return x * x


async def fetch(url: str) -> str:
    return url


async def numbers() -> AsyncIterator[int]:
    yield 1


def grow(ended: Callable[[], list[Evaluation]]) -> Iterator[tuple[str, float] | None]:
    """Look at what has ended, then say what to evaluate next."""
    for evaluation in ended():
        yield evaluation["name"] + "'", 2 * evaluation["args"]
    yield None


async def agrow(ended: Callable[[], Awaitable[list[Evaluation]]]) -> AsyncIterator[tuple[str, float]]:
    for evaluation in await ended():
        yield evaluation["name"] + "'", 2 * evaluation["args"]


def functions_and_spaces() -> None:
    assert_type(speval(square, [1, 2], "runs.db"), Summary)
    assert_type(speval(fetch, {"a": "x"}, Path("runs.db"), 10.0), Summary)
    assert_type(speval(lambda args: args["x"], ({"x": x} for x in range(3)), "postgresql://host/name"), Summary)
    assert_type(speval(square, numbers(), "runs.db"), Summary)
    assert_type(speval(square, grow, "runs.db"), Summary)
    assert_type(speval(square, agrow, "runs.db"), Summary)


def options() -> None:
    with ProcessPoolExecutor() as pool:
        speval(square, [1], "runs.db", executor=pool)
    summary = speval(
        square,
        [1],
        "runs.db",
        timeout=60,
        concurrency=8,
        executor="process",
        max_attempts=5,
        retry_on=(ConnectionError, TimeoutError),
        backoff=0.5,
        lease=60,
        on_changed="keep",
        wait=False,
        max_failures=0.1,
        durability="power",
        progress=True,
    )
    assert_type(summary, Summary)
    speval(square, [1], "runs.db", retry_on=OSError, max_failures=3, max_attempts=1, progress=None, timeout=None)


def generators() -> None:
    generator = as_completed(square, [1, 2], "runs.db", concurrency=2)
    assert_type(generator, Generator[Evaluation, None, None])
    for evaluation in generator:
        assert_type(evaluation, Evaluation)
    generator.close()


def reading() -> None:
    assert_type(load_evals("runs.db"), list[Evaluation])
    assert_type(load_evals(Path("runs.db"), status="failed"), list[Evaluation])
    assert_type(retry("runs.db"), int)
    assert_type(retry("runs.db", ["a", "b"], status="completed"), int)
    assert_type(retry("runs.db", (name for name in "ab")), int)


def databases() -> None:
    with Database(Path("runs.db")) as db:
        assert_type(db, Database)
        assert_type(db.status().completed, int)
        assert_type(db.status().rate, float | None)
        assert_type(db.status().settings.concurrency, int | None)
        assert_type(db.status().workers[0].state, Literal["alive", "silent", "dead", "ended"])
        assert_type(db.evaluations(status="failed", cause="timeout", pattern="a*", limit=3), Iterator[Evaluation])
        assert_type(db.evaluation("a"), Evaluation)
        assert_type(db.attempts("a")[0].number, int)
        assert_type(db.retry(), int)
        assert_type(db.retry(["a"], status="completed"), int)
        assert_type(db.drop(name for name in "ab"), int)
        assert_type(db.drop(status="pending"), int)
        assert_type(db.copy("postgresql://host/name").evaluations, int)
        assert_type(db.compact().before, int)
        assert_type(db.check().findings[0].fix, str)
        db.pause()
        db.resume()
        db.set(concurrency=4)
        db.unset("concurrency")


def frames() -> None:
    assert_type(to_frame("runs.db"), pd.DataFrame)
    assert_type(to_frame(Path("runs.db"), status="completed", library="pandas"), pd.DataFrame)
    assert_type(to_frame("runs.db", library="polars"), pl.DataFrame)


async def in_a_loop() -> None:
    assert_type(await aio.speval(fetch, ["x"], "runs.db", concurrency=1000), Summary)
    assert_type(await aio.speval(square, numbers(), "runs.db", 5.0, executor="thread"), Summary)
    generator = aio.as_completed(fetch, {"a": "x"}, "runs.db")
    assert_type(generator, AsyncGenerator[Evaluation, None])
    async for evaluation in generator:
        assert_type(evaluation, Evaluation)
    await generator.aclose()
    assert_type(await aio.load_evals("runs.db", status="pending"), list[Evaluation])
    assert_type(await aio.retry("runs.db", ["a"]), int)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(aio.speval(fetch, ["x"], "runs.db"))
    assert_type(task.result(), Summary)


def evaluations(evaluation: Evaluation) -> None:
    assert_type(evaluation["name"], str)
    assert_type(evaluation["status"], Status)
    assert_type(evaluation["updated"], float)
    assert_type(evaluation["result"], Any)
    assert_type(evaluation["args"], Any)
    assert_type(evaluation["attempts"], int)
    assert_type(evaluation["started"], float | None)
    assert_type(evaluation["duration"], float | None)
    assert_type(evaluation["worker"], str | None)
    error = evaluation["error"]
    if error is not None:
        assert_type(error["cause"], Cause)
        assert_type(error["type"], str)
        assert_type(error["message"], str)
        assert_type(error["traceback"], str)


def summaries(summary: Summary) -> None:
    assert_type(summary.pending, int)
    assert_type(summary.in_progress, int)
    assert_type(summary.completed, int)
    assert_type(summary.failed, int)
    assert_type(summary.total, int)
    assert_type(summary.recorded, int)
    assert_type(summary.seconds, float)
    assert_type(summary.stopped, str | None)
    assert_type(summary.causes, Mapping[Cause, int])
    try:
        assert_type(summary.raise_for_failures(), None)
    except EvaluationsFailed as error:
        assert_type(error.failed, int)
        assert_type(error.total, int)


def errors() -> None:
    try:
        package.speval(square, [1], "runs.db")
    except package.OptionError as error:
        assert_type(error.option, str)
        value_error: ValueError = error
        root: SpevalError = error
        print(value_error, root)
    except package.UnknownNameError as error:
        key_error: KeyError = error
        print(key_error)
    except package.DatabaseMissingError as error:
        missing: FileNotFoundError = error
        database: package.DatabaseError = error
        print(missing, database)
    except package.DatabaseLockedError as error:
        timeout: TimeoutError = error
        print(timeout)
    assert_type(package.__version__, str)
