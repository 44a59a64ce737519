"""Run evaluations on a Dask cluster.

Shows:
    The executor of a Dask client. The cluster here is two processes of this machine; for a real one, change only the address.
    The workers of the cluster need speval installed, but no access to the database.

Run:
    $ pip install 'speval[dask]'
    $ python examples/08_dask.py

    The database is the first argument, by default 08_dask.db in the current folder.

Prints:
    200 evaluations: 200 completed in 1.1 s (200 by this call)
    pi is about 3.1394
"""

import random
import sys

from distributed import Client, LocalCluster

from speval import load_evals, speval


def share_inside(seed: int) -> float:
    """Return the share of random points of the unit square that lie in the quarter of a circle."""
    chance = random.Random(seed)
    inside = sum(chance.random() ** 2 + chance.random() ** 2 < 1 for _ in range(5000))
    return inside / 5000


if __name__ == "__main__":
    db = sys.argv[1] if len(sys.argv) > 1 else "08_dask.db"
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        print(speval(share_inside, range(200), db, executor=client.get_executor(), concurrency=4, progress=False))
    shares = [e["result"] for e in load_evals(db)]
    print(f"pi is about {4 * sum(shares) / len(shares):.4f}")
