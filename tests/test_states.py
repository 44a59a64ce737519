"""Ranges of evaluations: what is taken out of them, and what stays."""

import random
import sqlite3
from contextlib import closing
from importlib import resources

import pytest

from speval.stores.sqlite.states import CLAIMED, take_out


@pytest.mark.parametrize("seed", range(5))
def test_what_is_taken_out_of_ranges_is_gone_and_all_else_stays(seed):
    rng = random.Random(seed)
    schema = resources.files("speval.stores.sqlite").joinpath("schema.sql").read_text()
    with closing(sqlite3.connect(":memory:")) as c:
        c.executescript(schema)
        for _ in range(200):
            c.execute("DELETE FROM claimed")
            owners, first = {}, 1
            while first < 40:
                last, owner = first + rng.randint(0, 5), rng.randint(1, 2)
                if rng.random() < 0.8:
                    c.execute("INSERT INTO claimed VALUES (?, ?, ?, 0, 0.0)", (first, last, owner))
                    owners |= dict.fromkeys(range(first, last + 1), owner)
                first = last + 1
            ids = sorted(rng.sample(range(45), rng.randint(0, 30)))
            holder = rng.choice([None, 1, 2])
            expected = {id for id in ids if id in owners and holder in (None, owners[id])}
            assert take_out(c, CLAIMED, ids, holder) == expected
            ranges = c.execute("SELECT first, last, worker FROM claimed").fetchall()
            left = [(id, owner) for first, last, owner in ranges for id in range(first, last + 1)]
            assert sorted(left) == [(id, owner) for id, owner in sorted(owners.items()) if id not in expected]
