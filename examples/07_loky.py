"""Run evaluations in a pool of loky, joblib's.

Shows:
    An existing pool as the executor; other code may use it too.

Run:
    $ pip install loky
    $ python examples/07_loky.py

    The database is the first argument, by default 07_loky.db in the current folder.

Prints:
    20 evaluations: 20 completed in 0.4 s (20 by this call)
    sum of the squares: 2470
"""

import sys

from loky import get_reusable_executor

from speval import load_evals, speval


def square(number: int) -> int:
    return number**2


db = sys.argv[1] if len(sys.argv) > 1 else "07_loky.db"
pool = get_reusable_executor(max_workers=2)
print(speval(square, range(20), db, executor=pool, concurrency=2, progress=False))
print("sum of the squares:", sum(e["result"] for e in load_evals(db)))
