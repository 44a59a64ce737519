"""Print what 02_store_results.py has found so far.

Shows:
    ``load_evals`` returns a dict for each evaluation of any status, in eval-space order. It changes nothing and never waits for
    running copies.

Run:
    $ python examples/02_store_results.py
    $ python examples/02_retrieve_results.py

    The database is the first argument of both, by default 02_results.db in the current folder.

Prints:
    name     status       steps   peak
    from 10  completed        6     16
    from 11  completed       14     52
    from 12  completed        9     16
    ...
    from 29  completed       18     88
"""

import sys

from speval import load_evals

db = sys.argv[1] if len(sys.argv) > 1 else "02_results.db"

print("name     status       steps   peak")
for e in load_evals(db):
    found = e["result"] or {"steps": "-", "peak": "-"}
    print(f"{e['name']:<8} {e['status']:<11} {found['steps']:>6} {found['peak']:>6}")
