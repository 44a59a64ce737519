"""Print the best lines that the grid and the random search of 03_fit_line.py have found.

Shows:
    Python's ``min`` over the result of ``load_evals`` finds the best evaluation.

Run:
    $ python examples/03_fit_line.py
    $ python examples/03_get_best_fit.py

    The database is the first argument of both, by default 03_fit_line.db in the current folder.

Prints:
    the points were made from y = 1.70 x - 0.80
    best of 441 by grid: y = 1.75 x - 0.75, error 0.3119
    best of 441 by random: y = 1.73 x - 0.79, error 0.3060
"""

import sys

from speval import load_evals

db = sys.argv[1] if len(sys.argv) > 1 else "03_fit_line.db"
evaluations = load_evals(db, status="completed")

print("the points were made from y = 1.70 x - 0.80")
for search in ("grid", "random"):
    tried = [e for e in evaluations if e["name"].startswith(search)]
    best = min(tried, key=lambda e: e["result"])
    slope, intercept = best["args"]["slope"], best["args"]["intercept"]
    sign = "-" if intercept < 0 else "+"
    print(f"best of {len(tried)} by {search}: y = {slope:.2f} x {sign} {abs(intercept):.2f}, error {best['result']:.4f}")
