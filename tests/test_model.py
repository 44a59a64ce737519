"""The store against a model of it; what happens is in ``tests/model``."""

import pytest

from .model import PostgresKind, SqliteKind, Workers, run_workers

slow = pytest.mark.slow
OFTEN = {"failed as lost", "taken back uncharged", "a stale token refused", "due", "released"}
# A renewal between look and verdict is too rare to be found at will; tests/test_store.py has it by itself.
RARE = {"taken back in its backoff", "interrupted in taking back", "forged", "found itself lost"}
RARE |= {"refused to renew", "unlisted", "rerun while in_progress", "retried failed", "args changed, refused"}


@pytest.mark.timeout(600)  # of which it takes as much only to find the shortest way to a failure
@pytest.mark.parametrize(
    ("kind", "runs", "happens"),
    [
        *((SqliteKind, 25, OFTEN), pytest.param(SqliteKind, 120, OFTEN | RARE, marks=slow)),
        *((PostgresKind, 10, OFTEN), pytest.param(PostgresKind, 50, OFTEN | RARE, marks=slow)),
    ],
    ids=["sqlite", "sqlite at length", "postgres", "postgres at length"],
)
def test_whatever_workers_do_to_each_other_the_store_keeps_its_promises(postgres, kind, runs, happens):
    PostgresKind.server = postgres
    Workers.happened.clear()
    run_workers(kind, runs, 50, derandomize=True)
    assert happens <= {what for what, count in Workers.happened.items() if count}, (
        "the steps say nothing about what never happened"
    )
