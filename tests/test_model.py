"""The store against a model of it; what happens is in ``tests/model``."""

import pytest

from .model import PostgresKind, SqliteKind, Workers, run_workers


@pytest.mark.timeout(600)  # of which it takes as much only to find the shortest way to a failure
@pytest.mark.parametrize(("kind", "runs"), [(SqliteKind, 120), (PostgresKind, 50)], ids=["sqlite", "postgres"])
def test_whatever_workers_do_to_each_other_the_store_keeps_its_promises(postgres, kind, runs):
    PostgresKind.server = postgres
    Workers.happened.clear()
    run_workers(kind, runs, 50, derandomize=True)
    rare = {"failed as lost", "taken back uncharged", "taken back in its backoff", "interrupted in taking back", "forged"}
    # A renewal between look and verdict is too rare to be found at will; tests/test_store.py has it by itself.
    rare |= {"found itself lost", "a stale token refused", "refused to renew", "strangers"}
    rare |= {"rerun while in_progress", "retried failed", "due", "released", "args changed, refused"}
    assert rare <= {what for what, count in Workers.happened.items() if count}, (
        "the steps say nothing about what never happened"
    )
