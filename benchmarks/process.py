"""The process executor beside ``concurrent.futures.ProcessPoolExecutor``: no-op calls, and the start to the first result.

Run: ``python -m benchmarks.process``. It prints medians over interleaved rounds and their ratios; a machine's speed drifts, a
ratio of rounds side by side does not. speval records every result durably, the pool records nothing.
"""

import compileall
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from speval import speval

CALLS = 20_000
ROUNDS = 5
SLOTS = 2


def nothing(args: int) -> int:
    return args


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def by_pool(pool: ProcessPoolExecutor) -> None:
    for future in [pool.submit(nothing, i) for i in range(CALLS)]:
        future.result()


def by_speval(folder: str, number: int) -> None:
    summary = speval(nothing, range(CALLS), Path(folder, f"{number}.db"), concurrency=SLOTS, executor="process", progress=False)
    assert summary.completed == CALLS


FIRST = """
import sys, time
from speval.clock import Clock
from speval.executors import make_executor
from speval.options import Options
import asyncio
async def main():
    started = time.perf_counter()
    executor = make_executor(abs, Options(executor="process"), Clock())
    slot = executor.slot(0)
    await slot.call("n", "1", None)
    print(time.perf_counter() - started)
    await slot.close()
    await executor.close()
asyncio.run(main())
"""


def first_result() -> float:
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=True)
    return float(done.stdout)


def bare_start() -> float:
    return seconds(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))


def main() -> None:
    compileall.compile_dir(Path(__file__).parents[1] / "speval", quiet=1)  # as pip does where it installs a package
    pool_rates, speval_rates, firsts, bares = [], [], [], []
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(SLOTS) as pool:
        by_pool(pool)
        for number in range(ROUNDS):
            pool_rates.append(CALLS / seconds(lambda: by_pool(pool)))
            speval_rates.append(CALLS / seconds(lambda number=number: by_speval(folder, number)))
            firsts.append(first_result())
            bares.append(bare_start())
    rows = [
        (
            "no-op calls/s, 2 slots",
            "ProcessPoolExecutor",
            statistics.median(pool_rates),
            "speval, durable",
            statistics.median(speval_rates),
        ),
        (
            "seconds to the first result",
            "bare interpreter",
            statistics.median(bares),
            "speval's executor",
            statistics.median(firsts),
        ),
    ]
    for what, one, first, other, second in rows:
        print(f"{what}: {one} {first:.4g}, {other} {second:.4g}, ratio {second / first:.2f}")


if __name__ == "__main__":
    main()
