"""Every way to end a process, at random moments, on both kinds of database.

A short run of what ``-m slow`` does longer and ``python -m benchmarks.chaos`` at length.
"""

import secrets
from random import Random

import pytest

from .crashes.chaos import Chaos


@pytest.mark.parametrize(("times", "count"), [(8, 120), pytest.param(20, 300, marks=pytest.mark.slow)])
def test_copies_killed_stopped_interrupted_and_terminated_at_random_lose_nothing_and_leave_nothing(
    tmp_path, anywhere, times, count
):
    seed = secrets.randbits(32)
    print(f"seed: {seed}")
    ways = Chaos(tmp_path, Random(seed), anywhere, count=count).run(times)
    print(ways)
    assert not ways.problems
    assert ways.seen >= count
