"""Fit a line to noisy points, by a grid and by a random search.

Shows:
    Both searches are eval spaces made by plain Python. Their evaluations have different names, so one database holds both.
    Every copy of the script must create the same points and the same arguments, so the random numbers start from a fixed seed.

Run:
    $ python examples/03_fit_line.py
    $ python examples/03_get_best_fit.py

    The database is the first argument of both, by default 03_fit_line.db in the current folder. Delete it to start again.

Prints:
    882 evaluations: 882 completed in 0.2 s (882 by this call)
"""

import random
import sys
from itertools import product

from speval import speval

numbers = random.Random(0)
points = [(x / 10, 1.7 * x / 10 - 0.8 + numbers.gauss(0, 0.5)) for x in range(-20, 21)]


def mean_squared_error(line: dict[str, float]) -> float:
    errors = [y - (line["slope"] * x + line["intercept"]) for x, y in points]
    return sum(error**2 for error in errors) / len(errors)


steps = [step / 4 for step in range(-10, 11)]  # from -2.5 to 2.5
grid = [{"slope": slope, "intercept": intercept} for slope, intercept in product(steps, steps)]
drawn = [{"slope": numbers.uniform(-2.5, 2.5), "intercept": numbers.uniform(-2.5, 2.5)} for _ in grid]

eval_space = {f"grid {number}": line for number, line in enumerate(grid)}
eval_space |= {f"random {number}": line for number, line in enumerate(drawn)}

db = sys.argv[1] if len(sys.argv) > 1 else "03_fit_line.db"
print(speval(mean_squared_error, eval_space, db))
