"""The PostgreSQL store beside the task queues that keep theirs there: evaluations of a function that does nothing.

Run: ``pip install -e '.[dev,bench]'`` and ``python -m benchmarks.postgres``, some four minutes. It brings its own server,
with the settings of a fresh installation but for ``max_wal_size``; each commit is synced. Every candidate has a fresh
database, filled before the time begins, and as many processes as ``--workers`` says, which are ready and begin together; the
time ends with the last of them. With ``--million`` speval evaluates a million too, once with a transaction open beside it
that keeps every dead row.
"""

import argparse
import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psycopg

from tests.postgres_server import Server

from .harness import ROOT, machine, shown, table

OURS, PROCRASTINATE, PGQUEUER = "speval", "procrastinate", "pgqueuer"
COUNTS = {OURS: 100_000, PROCRASTINATE: 2_000, PGQUEUER: 20_000}


async def nothing(args: object) -> object:
    return args


class Speval:
    """Coroutines; every copy of the script seeds, and finds it done."""

    def __init__(self, url: str) -> None:
        self.url = url

    def fill(self, count: int) -> None:
        from speval.spaces.eager import Space
        from speval.stores import make_store
        from speval.url import PostgresUrl

        async def seed() -> None:
            space = Space()
            list(space.fill(range(count)))
            store = make_store(PostgresUrl.parse(self.url))
            await store.open()
            await store.seed(space, "error")
            await store.close()
            space.close()

        asyncio.run(seed())

    def prepare(self, count: int):
        from speval import speval

        return lambda: speval(nothing, range(count), self.url, concurrency=50, progress=False)


class Procrastinate:
    """Its worker at a concurrency of 50, which ends when the queue is empty."""

    def __init__(self, url: str) -> None:
        import procrastinate

        self.app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url, max_size=20))
        self.task = self.app.task(name="nothing")(nothing)

    def fill(self, count: int) -> None:
        async def fill() -> None:
            async with self.app.open_async():
                await self.app.schema_manager.apply_schema_async()
                for low in range(0, count, 10_000):
                    await self.task.batch_defer_async(*({"args": i} for i in range(low, min(low + 10_000, count))))

        asyncio.run(fill())

    def prepare(self, count: int):
        logging.getLogger("procrastinate").setLevel(logging.WARNING)

        async def run() -> None:
            async with self.app.open_async():
                await self.app.run_worker_async(concurrency=50, wait=False, install_signal_handlers=False)

        return lambda: asyncio.run(run())


class PgQueuer:
    """Its queue manager in batches of 50, which ends when the queue is empty."""

    def __init__(self, url: str) -> None:
        self.url = url

    def fill(self, count: int) -> None:
        from pgqueuer.db import PsycopgDriver
        from pgqueuer.queries import Queries

        async def fill() -> None:
            async with await psycopg.AsyncConnection.connect(self.url, autocommit=True) as connection:
                queries = Queries(PsycopgDriver(connection))
                await queries.install()
                for low in range(0, count, 10_000):
                    n = min(10_000, count - low)
                    await queries.enqueue(["nothing"] * n, [b"1"] * n, [0] * n)

        asyncio.run(fill())

    def prepare(self, count: int):
        from pgqueuer import PgQueuer as Manager
        from pgqueuer.db import PsycopgDriver
        from pgqueuer.types import QueueExecutionMode

        async def run() -> None:
            async with await psycopg.AsyncConnection.connect(self.url, autocommit=True) as connection:
                manager = Manager(PsycopgDriver(connection))
                manager.entrypoint("nothing")(nothing)
                await manager.run(batch_size=50, mode=QueueExecutionMode.drain)

        return lambda: asyncio.run(run())


CANDIDATES: dict[str, Callable[[str], Any]] = {OURS: Speval, PROCRASTINATE: Procrastinate, PGQUEUER: PgQueuer}


def work(candidate: str, url: str, count: int) -> None:
    """Be one of the processes: say that it is ready, and begin when told to."""
    run = CANDIDATES[candidate](url).prepare(count)
    print("ready", flush=True)
    sys.stdin.readline()
    run()


def measure(server: Server, candidate: str, count: int, workers: int, number: int, *, is_old: bool) -> float:
    """Return evaluations a second; with an old transaction beside it, all dead rows are kept."""
    name = f"bench{number}"
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = server.url(name)
    command = [sys.executable, "-m", "benchmarks.postgres", "--work", candidate, url, str(count)]
    subprocess.run([*command, "--fill"], cwd=ROOT, check=True)
    old = psycopg.connect(url)
    if is_old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT txid_current()")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(workers)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait() for process in processes] == [0] * workers
    seconds = time.monotonic() - began
    for process in processes:
        process.stdin.close()
        process.stdout.close()
    old.close()
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    return count / seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.postgres", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--million", action="store_true", help="evaluate a million too")
    parser.add_argument("--only", choices=CANDIDATES, help="measure one candidate alone")
    parser.add_argument("--work", nargs=3, metavar=("CANDIDATE", "URL", "COUNT"), help=argparse.SUPPRESS)
    parser.add_argument("--fill", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        candidate, url, count = options.work
        if options.fill:
            CANDIDATES[candidate](url).fill(int(count))
        else:
            work(candidate, url, int(count))
        return
    server = Server(max_wal_size="4GB", shared_buffers="128MB", autovacuum_naptime="60s")
    rates: dict[tuple[str, int, str], list[float]] = {}
    number = 0
    try:
        server.start()
        names = [options.only] if options.only else list(CANDIDATES)
        runs = [(name, COUNTS[name], "") for _ in range(options.rounds) for name in names]
        if options.million:
            runs += [(OURS, 10_000, ""), (OURS, 1_000_000, ""), (OURS, 1_000_000, "an old snapshot")]
        for name, count, beside in runs:
            number += 1
            rate = measure(server, name, count, options.workers, number, is_old=bool(beside))
            rates.setdefault((name, count, beside), []).append(rate)
            print(f"{name} {count} {beside} {rate:.0f}/s", file=sys.stderr)
    finally:
        server.close()
    about = machine()
    print(f"{about['cores']} cores, {about['system']}, Python {about['python']}, {options.workers} workers, {about['at']}.\n")
    rows = [
        [f"{name}{', beside ' + beside if beside else ''}", f"{count:,}", shown(sorted(some)[len(some) // 2])]
        for (name, count, beside), some in rates.items()
    ]
    print(table(["candidate", " evaluations", " evaluations/s"], rows))


if __name__ == "__main__":
    main()
