"""Calls that a type checker must refuse: each is marked with the error of mypy, and a mark without an error is one itself."""

from __future__ import annotations

from speval import Database, Evaluation, Summary, aio, as_completed, load_evals, retry, speval, to_frame


def square(x: int) -> int:
    return x * x


def two(x: int, y: int) -> int:
    return x * y


def what_is_no_function_of_one_argument() -> None:
    speval("square", [1], "runs.db")  # type: ignore[arg-type]
    speval(two, [1], "runs.db")  # type: ignore[arg-type]
    as_completed(None, [1], "runs.db")  # type: ignore[arg-type]


def what_is_no_space_or_database() -> None:
    speval(square, 5, "runs.db")  # type: ignore[arg-type]
    speval(square, [1], b"runs.db")  # type: ignore[arg-type]
    speval(square, [1])  # type: ignore[call-arg]
    load_evals(None)  # type: ignore[arg-type]


def options_after_the_fourth_are_named() -> None:
    speval(square, [1], "runs.db", 1.0, 8)  # type: ignore[call-arg]
    load_evals("runs.db", "failed")  # type: ignore[call-arg]
    retry("runs.db", None, "failed")  # type: ignore[call-arg]


def values_that_no_option_has() -> None:
    speval(square, [1], "runs.db", executor="processes")  # type: ignore[arg-type]
    speval(square, [1], "runs.db", on_changed="ignore")  # type: ignore[arg-type]
    speval(square, [1], "runs.db", durability="none")  # type: ignore[arg-type]
    speval(square, [1], "runs.db", concurrency=None)  # type: ignore[arg-type]
    speval(square, [1], "runs.db", concurrency=1.5)  # type: ignore[arg-type]
    speval(square, [1], "runs.db", retry_on=ValueError("no type"))  # type: ignore[arg-type]
    speval(square, [1], "runs.db", retry_on=KeyboardInterrupt)  # type: ignore[arg-type]
    speval(square, [1], "runs.db", workers=4)  # type: ignore[call-arg]
    load_evals("runs.db", status="done")  # type: ignore[arg-type]
    retry("runs.db", status="pending")  # type: ignore[arg-type]
    to_frame("runs.db", library="numpy")  # type: ignore[call-overload]


def what_no_database_does(db: Database) -> None:
    db.evaluations("failed")  # type: ignore[call-arg]
    db.retry(status="pending")  # type: ignore[arg-type]
    db.set(4)  # type: ignore[call-arg]
    db.set(concurrency=None)  # type: ignore[arg-type]
    db.unset("paused")  # type: ignore[arg-type]
    db.status().completed = 0  # type: ignore[misc]


async def what_is_awaited_and_what_is_not() -> None:
    await speval(square, [1], "runs.db")  # type: ignore[misc]
    await aio.as_completed(square, [1], "runs.db")  # type: ignore[misc]
    for _ in aio.as_completed(square, [1], "runs.db"):  # type: ignore[attr-defined]
        pass
    async for _ in as_completed(square, [1], "runs.db"):  # type: ignore[attr-defined]
        pass


def what_can_not_be_changed_or_is_not_there(summary: Summary, evaluation: Evaluation) -> None:
    summary.failed = 0  # type: ignore[misc]
    summary.total = 0  # type: ignore[misc]
    summary.causes["crash"] = 1  # type: ignore[index]
    evaluation["cause"]  # type: ignore[typeddict-item]
    evaluation["error"]["cause"]  # type: ignore[index]
