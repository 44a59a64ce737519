"""Follow some numbers down to 1 by the Collatz rule, and store the results.

Shows:
    The function's result is stored: anything that JSON can express. The eval space is a dict, whose keys name the evaluations.

Run:
    $ python examples/02_store_results.py
    $ python examples/02_retrieve_results.py

    Run the second one at any time, also while copies of the first one run. The database is the first argument of both, by
    default 02_results.db in the current folder. Delete it to start again.

Prints:
    20 evaluations: 20 completed in 4.1 s (20 by this call)
"""

import sys
import time

from speval import speval


def collatz(start: int) -> dict[str, int]:
    time.sleep(0.2)  # so that there is time to look on
    steps, peak, number = 0, start, start
    while number != 1:
        number = 3 * number + 1 if number % 2 else number // 2
        steps, peak = steps + 1, max(peak, number)
    return {"steps": steps, "peak": peak}


eval_space = {f"from {start}": start for start in range(10, 30)}
db = sys.argv[1] if len(sys.argv) > 1 else "02_results.db"
print(speval(collatz, eval_space, db, timeout=60))
