"""Run evaluations in a process pool of the standard library.

Shows:
    Any executor of ``concurrent.futures`` works. This one needs the main guard, as its documentation says. speval's worker
    processes (``executor="process"``) don't need it, and only they can stop a function that runs too long.

Run:
    $ python examples/06_process_pool.py

    The database is the first argument, by default 06_process_pool.db in the current folder.

Prints:
    10 evaluations: 10 completed in 0.2 s (10 by this call)
    the 10th number with 7 factors is 704
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

from speval import load_evals, speval


def number_with_factors(position: int) -> int:
    """Return the number at this position among those with seven prime factors."""
    number = found = 0
    while found < position:
        number += 1
        rest, factors, divisor = number, 0, 2
        while rest > 1:
            while rest % divisor == 0:
                rest //= divisor
                factors += 1
            divisor += 1
        found += factors == 7
    return number


if __name__ == "__main__":
    db = sys.argv[1] if len(sys.argv) > 1 else "06_process_pool.db"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        print(speval(number_with_factors, range(1, 11), db, executor=pool, concurrency=2, progress=False))
    print(f"the 10th number with 7 factors is {load_evals(db)[9]['result']}")
