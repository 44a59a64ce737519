"""Let the workers of ``tests/model`` loose on a store, as long as one wants, with other random numbers each time.

Run: ``python -m benchmarks.soak --minutes 10``, on PostgreSQL with ``--postgres``. It needs pytest and hypothesis. It prints
how many steps were done and how often what happened, and ends with the shortest way to the first step that brought anything
else than the model says.
"""

import argparse
import time
import warnings

from tests.model import PostgresKind, SqliteKind, Workers, run_workers
from tests.postgres_server import Server

EXAMPLES = 100  # between two looks at the clock


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to go on (default: 10)")
    parser.add_argument("--steps", type=int, default=80, help="steps on one database (default: 80)")
    parser.add_argument("--postgres", action="store_true", help="on PostgreSQL instead of SQLite")
    options = parser.parse_args()
    if options.postgres:
        PostgresKind.server = Server()
        PostgresKind.server.start()
    warnings.simplefilter("error")
    started = time.monotonic()
    try:
        while time.monotonic() - started < options.minutes * 60:
            run_workers(PostgresKind if options.postgres else SqliteKind, EXAMPLES, options.steps)
            print(f"{Workers.happened['steps']} steps in {time.monotonic() - started:.0f} s", flush=True)
    finally:
        for what, count in Workers.happened.most_common():
            print(f"{count:9} {what}")
        if options.postgres:
            PostgresKind.server.close()


if __name__ == "__main__":
    main()
