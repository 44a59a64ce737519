"""Copies ended in every way a process can be ended, at random moments, on either kind of database.

Run: ``python -m benchmarks.chaos --minutes 30``, and with ``--postgres`` on a server of its own. KILL, STOP, INT once and
twice, and TERM hit four copies that run coroutines, threads and processes; afterwards everything is compared with what the
function itself has written. It ends with 1 if anything was lost, recorded twice, wrong, stuck or left over; the folders of such
rounds are kept.
"""

import argparse
import logging
import shutil
import signal
import tempfile
import time
from pathlib import Path
from random import Random

from tests.crashes.chaos import Chaos, Ways
from tests.postgres_server import Server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--copies", type=int, default=4, help="alive at a time")
    parser.add_argument("--per-round", type=int, default=40, help="signals to one database's copies")
    parser.add_argument("--count", type=int, default=400, help="evaluations of one database")
    parser.add_argument("--postgres", action="store_true", help="on PostgreSQL instead of SQLite")
    given = parser.parse_args()
    # What is ignored here would be so in the copies: a shell starts jobs in the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.disable(logging.WARNING)
    print(f"seed: {given.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    random, total, started = Random(given.seed), Ways(), time.monotonic()
    server = Server() if given.postgres else None
    try:
        if server is not None:
            server.start()
        while time.monotonic() - started < given.minutes * 60:
            one = folder / f"round-{total.rounds + 1}"
            one.mkdir()
            db = one / "runs.db" if server is None else str(server.url(namespace=f"round_{total.rounds + 1}"))
            ways = Chaos(one, Random(random.getrandbits(32)), db, count=given.count, copies=given.copies).run(given.per_round)
            total += ways
            for problem in ways.problems:
                print(f"{one.name}: {problem}", flush=True)
            if not ways.problems:
                shutil.rmtree(one)
            print(f"{time.monotonic() - started:.0f} s, {total}", flush=True)
    finally:
        if server is not None:
            server.close()
    if total.problems:
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
