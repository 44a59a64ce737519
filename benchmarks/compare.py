"""speval beside what one would write without it: evaluations per second of a function that does nothing.

Run: ``python -m benchmarks.compare [EVALUATIONS]``. All candidates take turns for several rounds in one run; the table shows
the median of each and its ratio to a bare loop over sqlite3 that commits each claim together with the last result, as durable
as speval. Those marked with a star keep nothing: after a crash they start from nothing.
"""

import asyncio
import json
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from speval import aio, load_evals, speval

ROUNDS = 5


def nothing(args: int) -> int:
    return args


async def nothing_async(args: int) -> int:
    return args


class Candidates:
    """Each method evaluates a space of ``count`` once, in a folder of its own."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count
        self.number = 0

    def fresh(self) -> Path:
        self.number += 1
        return self.folder / f"{self.number}.db"

    def sqlite_loop(self) -> None:
        connection = sqlite3.connect(self.fresh(), isolation_level=None)
        connection.execute("PRAGMA journal_mode = wal")
        connection.execute("PRAGMA synchronous = normal")
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, status INTEGER, args TEXT, result TEXT)")
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO t VALUES (?, 0, ?, NULL)", ((i, str(i)) for i in range(self.count)))
        connection.execute("CREATE INDEX pending ON t (id) WHERE status = 0")
        connection.execute("COMMIT")
        claim = "UPDATE t SET status = 1 WHERE id = (SELECT id FROM t WHERE status = 0 ORDER BY id LIMIT 1) RETURNING id, args"
        last = None
        while True:
            connection.execute("BEGIN IMMEDIATE")
            if last is not None:
                connection.execute("UPDATE t SET status = 2, result = ? WHERE id = ?", last)
            row = connection.execute(claim).fetchone()
            connection.execute("COMMIT")
            if row is None:
                break
            last = (json.dumps(nothing(json.loads(row[1]))), row[0])
        connection.close()

    def speval_coroutine(self) -> None:
        speval(nothing_async, range(self.count), self.fresh(), concurrency=100, progress=False)

    def speval_awaited(self) -> None:
        asyncio.run(aio.speval(nothing_async, range(self.count), self.fresh(), concurrency=100, progress=False))

    def speval_thread(self) -> None:
        speval(nothing, range(self.count), self.fresh(), executor="thread", progress=False)

    def speval_process(self) -> None:
        speval(nothing, range(self.count), self.fresh(), executor="process", concurrency=2, progress=False)

    def gather(self) -> None:
        async def main() -> None:
            limit = asyncio.Semaphore(100)

            async def one(args: int) -> int:
                async with limit:
                    return await nothing_async(args)

            await asyncio.gather(*(one(i) for i in range(self.count)))

        asyncio.run(main())

    def pool(self) -> None:
        with ProcessPoolExecutor(2) as pool:
            for future in [pool.submit(nothing, i) for i in range(self.count)]:
                future.result()

    def pool_in_chunks(self) -> None:
        with ProcessPoolExecutor(2) as pool:
            list(pool.map(nothing, range(self.count), chunksize=64))


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    with tempfile.TemporaryDirectory() as folder:
        c = Candidates(Path(folder), count)
        entries: dict[str, Callable[[], None]] = {
            "sqlite3 loop, a commit each": c.sqlite_loop,
            "speval, coroutines": c.speval_coroutine,
            "speval, coroutines, awaited": c.speval_awaited,
            "speval, one thread": c.speval_thread,
            "speval, two processes": c.speval_process,
            "asyncio.gather with a semaphore *": c.gather,
            "ProcessPoolExecutor, two processes *": c.pool,
            "ProcessPoolExecutor.map in chunks of 64 *": c.pool_in_chunks,
        }
        times: dict[str, list[float]] = {name: [] for name in entries}
        for _ in range(ROUNDS):
            for name, work in entries.items():
                times[name].append(seconds(work))
        assert len(load_evals(Path(folder, "2.db"), status="completed")) == count
    base = statistics.median(times["sqlite3 loop, a commit each"])
    print(f"{count} evaluations that do nothing, median of {ROUNDS} rounds, start and seeding included\n")
    print("| candidate | evaluations/s | beside the sqlite3 loop |\n| --- | --: | --: |")
    for name, taken in times.items():
        median = statistics.median(taken)
        print(f"| {name} | {count / median:,.0f} | {base / median:.2f} |")


if __name__ == "__main__":
    main()
