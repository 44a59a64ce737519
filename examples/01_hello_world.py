"""Say hello a hundred times, with as many copies of this script as you like.

Shows:
    The basics of speval: a function, its arguments, a database. All running copies take evaluations from the database, and each
    evaluation runs once. One that takes longer than ``timeout`` seconds is stopped and tried again.

Run:
    $ python examples/01_hello_world.py
    $ for i in {1..20}; do python examples/01_hello_world.py & done; wait

    The first takes 200 seconds; stop it at any time with Ctrl-C. The second starts twenty copies, which share what is left
    and need 10 seconds for all hundred. The database is the first argument, by default 01_hello_world.db in the current
    folder. Once everything is done, further runs print nothing; delete the database to start again.

Prints:
    Hello world: 0
    Hello world: 1
    Hello world: 2
    ...
"""

import sys
import time

from speval import speval


def greet(number: int) -> None:
    print(f"Hello world: {number}", flush=True)
    time.sleep(2)


db = sys.argv[1] if len(sys.argv) > 1 else "01_hello_world.db"
speval(greet, range(100), db, timeout=60, progress=False)
