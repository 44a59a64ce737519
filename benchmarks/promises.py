"""How long the promises with a second in them take: taking over from a killed copy, killing what hangs, Ctrl-C.

Run: ``python -m benchmarks.promises``. It prints the median and the longest of several rounds, in seconds. These are times and
not ratios, because the promises are; on a machine with other work to do they are longer.
"""

import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from speval import load_evals, speval

ROUNDS = 10

COPY = """
import sys, time
from speval import speval
speval(time.sleep, [float(sys.argv[2])] * 4, sys.argv[1], executor=sys.argv[3], concurrency=2, progress=False)
"""


def start(db: Path, seconds: float, executor: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", COPY, str(db), str(seconds), executor]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def query(db: Path, sql: str) -> list[tuple[float]]:
    connection = sqlite3.connect(db, timeout=10)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def wait_until_held(db: Path, count: int) -> None:
    while not db.exists() or len(load_evals(db, status="in_progress")) < count:
        time.sleep(0.02)


def take_over(db: Path) -> float:
    """Return the seconds from the kill of a copy until its evaluations are pending again, or claimed by the other."""
    victim, other = start(db, 60, "thread"), start(db, 60, "thread")
    try:
        wait_until_held(db, 4)
        killed_at = time.time()
        victim.kill()
        while not (lost := query(db, "SELECT ended_at FROM attempts WHERE outcome = 'lost'")):
            time.sleep(0.02)
        return lost[0][0] - killed_at
    finally:
        for copy in (victim, other):
            copy.kill()
            copy.wait()


def grandchild(args: int) -> None:
    subprocess.run(["sleep", str(args)], check=True)


def overdue(db: Path) -> float:
    """Return the seconds by which eight hanging functions, each with a child, outlived a timeout of one second."""
    speval(grandchild, [600] * 8, db, timeout=1, concurrency=8, max_attempts=1, progress=False)
    return max((e["duration"] or 0) - 1 for e in load_evals(db))


def interrupt(db: Path) -> float:
    """Return the seconds from Ctrl-C to the end of a program with two processes at work."""
    copy = start(db, 60, "process")
    try:
        wait_until_held(db, 2)
        started = time.perf_counter()
        copy.send_signal(signal.SIGINT)
        copy.wait()
        return time.perf_counter() - started
    finally:
        copy.kill()
        copy.wait()


def main() -> None:
    import logging

    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        for measure in (take_over, overdue, interrupt):
            times = [measure(Path(folder, f"{measure.__name__}{number}.db")) for number in range(ROUNDS)]
            print(f"{measure.__name__}: median {statistics.median(times):.3f} s, longest {max(times):.3f} s, of {ROUNDS}")


if __name__ == "__main__":
    main()
