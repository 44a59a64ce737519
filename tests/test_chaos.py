"""Every way to end a process, at random moments, on both kinds of database.

A short run of what ``python -m benchmarks.chaos`` does at length.
"""

import secrets
from random import Random

from .crashes.chaos import Chaos


def test_copies_killed_stopped_interrupted_and_terminated_at_random_lose_nothing_and_leave_nothing(tmp_path, anywhere):
    seed = secrets.randbits(32)
    print(f"seed: {seed}")
    ways = Chaos(tmp_path, Random(seed), anywhere, count=300).run(20)
    print(ways)
    assert not ways.problems
    assert ways.seen >= 300
