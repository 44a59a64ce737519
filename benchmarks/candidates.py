"""What is measured beside each other: speval, what one would write without it, and its peers.

Owns how each of them evaluates a space. Invariant: a function here prepares, imports included, and returns what is timed:
everything from the eval space to the last result, which it has seen. Each is set up for speed where its manual says how, with
results that survive ``kill -9`` where it can have that.
"""

import asyncio
import json
import sqlite3
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .work import ASYNC, PLAIN

Run = Callable[[], object]


def ready(candidate: str, work: str, count: int, copies: int, copy: int) -> Run:
    """Prepare a candidate; called in a process of its own."""
    run: Run = CANDIDATES[candidate].prepare(work, count, copies)
    return run


def bare_loop(work: str, count: int, copies: int) -> Run:
    function = PLAIN[work]

    def run() -> None:
        assert [function(i) for i in range(count)] == list(range(count))

    return run


def sqlite_loop(work: str, count: int, copies: int) -> Run:
    """Prepare what one would write by hand: the last result and the next claim in one commit, as durable as speval."""
    function = PLAIN[work]
    claim = "UPDATE t SET status = 1 WHERE id = (SELECT id FROM t WHERE status = 0 ORDER BY id LIMIT 1) RETURNING id, args"

    def run() -> None:
        connection = sqlite3.connect("runs.db", isolation_level=None, timeout=60)
        while True:
            try:  # SQLite does not wait for one that is doing the same just now
                connection.execute("PRAGMA journal_mode = wal")
                break
            except sqlite3.OperationalError:
                time.sleep(0.001)
        connection.execute("PRAGMA synchronous = normal")
        connection.execute("BEGIN IMMEDIATE")
        if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, status INTEGER, args TEXT, result TEXT)")
            rows = ((i, json.dumps(i)) for i in range(count))
            connection.executemany("INSERT INTO t VALUES (?, 0, ?, NULL)", rows)
            connection.execute("CREATE INDEX pending ON t (id) WHERE status = 0")
        connection.execute("COMMIT")
        last = None
        while True:
            connection.execute("BEGIN IMMEDIATE")
            if last is not None:
                connection.execute("UPDATE t SET status = 2, result = ? WHERE id = ?", last)
            row = connection.execute(claim).fetchone()
            connection.execute("COMMIT")
            if row is None:
                break
            last = (json.dumps(function(json.loads(row[1]))), row[0])
        connection.close()

    return run


def speval_with(
    functions: dict[str, Callable[[Any], Any]], options: dict[str, dict[str, Any]]
) -> Callable[[str, int, int], Run]:
    """Return a preparation of speval with options by what is evaluated, those of ``nothing`` for all else."""

    def prepare(work: str, count: int, copies: int) -> Run:
        from speval import speval

        def run() -> None:
            given = options.get(work, options["nothing"])
            assert speval(functions[work], range(count), "runs.db", progress=False, **given).completed == count

        return run

    return prepare


def old_speval(work: str, count: int, copies: int) -> Run:
    from speval import load_evals, speval

    def run() -> None:
        speval(PLAIN[work], list(range(count)), "./runs.db", 60)
        # A copy of the old one ends when nothing is left to claim, so others' last evaluations may still run.
        ended = sum(e["status"] == "completed" for e in load_evals("./runs.db"))
        assert ended > count - copies

    return run


def gather(work: str, count: int, copies: int) -> Run:
    function, most = ASYNC[work], AT_ONCE.get(work, 100)

    async def main() -> None:
        limit = asyncio.Semaphore(most)

        async def one(args: int) -> Any:
            async with limit:
                return await function(args)

        assert await asyncio.gather(*(one(i) for i in range(count))) == list(range(count))

    return lambda: asyncio.run(main())


def process_pool(work: str, count: int, copies: int) -> Run:
    from concurrent.futures import ProcessPoolExecutor

    def run() -> None:
        with ProcessPoolExecutor(2) as pool:
            futures = [pool.submit(PLAIN[work], i) for i in range(count)]
            assert [future.result() for future in futures] == list(range(count))

    return run


def with_joblib(work: str, count: int, copies: int) -> Run:
    import joblib

    def run() -> None:
        assert joblib.Parallel(n_jobs=2)(joblib.delayed(PLAIN[work])(i) for i in range(count)) == list(range(count))

    return run


def with_dask(work: str, count: int, copies: int) -> Run:
    from distributed import Client

    # Seconds to start a cluster are no figure about evaluations.
    client = Client(n_workers=2, threads_per_worker=1, dashboard_address=None)

    def run() -> None:
        assert client.gather(client.map(PLAIN[work], range(count), pure=False)) == list(range(count))

    return run


def optuna_journal(work: str, count: int, copies: int) -> Run:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return _optuna(lambda: JournalStorage(JournalFileBackend("runs.log")), work, count, copies)


def optuna_rdb(work: str, count: int, copies: int) -> Run:
    return _optuna(lambda: "sqlite:///runs.db", work, count, copies)


def _optuna(storage: Callable[[], Any], work: str, count: int, copies: int) -> Run:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    function = PLAIN[work]

    def run() -> None:
        sampler = optuna.samplers.RandomSampler()
        study = optuna.create_study(storage=storage(), sampler=sampler, study_name="runs", load_if_exists=True)
        study.optimize(lambda trial: function(trial.suggest_int("i", 0, count)), n_trials=count // copies)
        assert len(study.trials) >= count // copies

    return run


def with_huey(work: str, count: int, copies: int) -> Run:
    from huey import SqliteHuey

    huey = SqliteHuey(filename="runs.db")
    task = huey.task()(PLAIN[work])

    def run() -> None:
        results = [task(i) for i in range(count)]
        consumer = huey.create_consumer(workers=2, initial_delay=0.001, max_delay=0.01, check_worker_health=False)
        consumer.start()
        assert [result.get(blocking=True, timeout=300, max_delay=0.01) for result in results] == list(range(count))

    return run


def with_jug(work: str, count: int, copies: int) -> Run:
    from jug.jug import main

    Path("jugfile.py").write_text(
        textwrap.dedent(f"""\
        from jug import TaskGenerator
        from benchmarks.work import PLAIN
        function = TaskGenerator(PLAIN[{work!r}])
        results = [function(i) for i in range({count})]
        """)
    )

    def run() -> None:
        try:
            main(["jug", "execute", "--nr-wait-cycles=0", "jugfile.py"])
        except SystemExit as end:
            if end.code:
                raise

    return run


def with_py_experimenter(work: str, count: int, copies: int) -> Run:
    from py_experimenter.experimenter import PyExperimenter

    Path("config.yml").write_text(
        textwrap.dedent(f"""\
        PY_EXPERIMENTER:
          n_jobs: 1
          Database:
            provider: sqlite
            database: runs
            table:
              name: runs
              keyfields:
                i:
                  type: int
                  values:
                    start: 0
                    stop: {count}
                    step: 1
              resultfields:
                r: int
        """)
    )
    function = PLAIN[work]

    def run() -> None:
        experimenter = PyExperimenter(experiment_configuration_file_path="config.yml", use_codecarbon=False, log_level="ERROR")
        experimenter.fill_table_from_config()
        experimenter.execute(lambda keys, results, _: results.process_results({"r": function(keys["i"])}), max_experiments=-1)
        (path,) = Path.cwd().glob("runs*.db")
        with sqlite3.connect(path) as connection:
            assert connection.execute("SELECT count(*) FROM runs WHERE status = 'done'").fetchone() == (count,)

    return run


class Candidate(NamedTuple):
    """Something that is measured.

    Attributes:
        prepare: Given what to evaluate, how many and in how many copies, returns what is timed.
        is_durable: Whether its results survive ``kill -9``.
        count: Evaluations of nothing in a measurement of a few seconds; a rate is compared, so what is slow gets fewer.
        slots: Evaluations at once, of what sleeps.
        is_old: It is speval 0.1.1, which has an environment of its own.
        is_script: More copies of it share the work.
    """

    prepare: Callable[[str, int, int], Run]
    is_durable: bool
    count: int  # type: ignore[assignment]
    slots: int = 1
    is_old: bool = False
    is_script: bool = False


AT_ONCE = {"sleep": 1000, "sleep_50ms": 1000}  # coroutines of one that sleeps
LIMIT = "sqlite3 loop, a commit each"
GATHER = "asyncio.gather with a semaphore"
POOL = "ProcessPoolExecutor, 2 processes"
JOBLIB = "joblib, 2 processes"
COROUTINES, THREADS, PROCESSES = "speval, coroutines", "speval, a thread", "speval, 2 processes"

_coroutines = speval_with(
    ASYNC, {"nothing": {"concurrency": 100}} | {work: {"concurrency": most} for work, most in AT_ONCE.items()}
)
_threads = speval_with(PLAIN, {"nothing": {"executor": "thread"}, "sleep": {"executor": "thread", "concurrency": 100}})
_processes = speval_with(PLAIN, {"nothing": {"executor": "process", "concurrency": 2}})

CANDIDATES: dict[str, Candidate] = {
    "for loop": Candidate(bare_loop, False, 200_000),
    LIMIT: Candidate(sqlite_loop, True, 40_000, is_script=True),
    COROUTINES: Candidate(_coroutines, True, 40_000, 1000),
    THREADS: Candidate(_threads, True, 40_000, 100, is_script=True),
    PROCESSES: Candidate(_processes, True, 40_000, 2),
    GATHER: Candidate(gather, False, 40_000, 1000),
    POOL: Candidate(process_pool, False, 20_000, 2),
    JOBLIB: Candidate(with_joblib, False, 40_000, 2),
    "Dask, 2 processes": Candidate(with_dask, False, 2_000, 2),
    "huey, SQLite, 2 threads": Candidate(with_huey, True, 6_000, 2),
    "jug": Candidate(with_jug, True, 2_000, is_script=True),
    "PyExperimenter, SQLite": Candidate(with_py_experimenter, True, 500),
    "Optuna, journal": Candidate(optuna_journal, True, 1_000, is_script=True),
    "Optuna, RDB with SQLite": Candidate(optuna_rdb, True, 60),
    "speval 0.1.1": Candidate(old_speval, True, 600, is_old=True, is_script=True),
}
