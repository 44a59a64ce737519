"""Seeding of a SQLite file in steps, as for a large space: the tests of seeding again, where each space counts as large."""

import pytest

from .databases import SqlitePlace
from .test_store import (  # noqa: F401 - pytest collects them here too
    database,
    file_database,
    test_a_longer_space_adds_what_is_new,
    test_a_space_that_was_extended_is_not_taken_for_the_seeded_one,
    test_an_empty_space_is_done_at_once,
    test_changed_args_are_an_error_that_shows_the_first_few_and_changes_nothing,
    test_copies_with_different_spaces_seed_at_once_and_lose_none,
    test_keep_goes_on_with_the_stored_args,
    test_many_copies_seed_at_once_and_store_each_evaluation_once,
    test_rerun_evaluates_changed_ones_again_and_refuses_what_runs_with_the_old_args,
    test_seeding_twice_adds_nothing,
    test_the_order_of_keys_is_no_change,
    test_what_is_no_longer_in_the_space_is_counted_and_left_alone,
    test_what_others_add_meanwhile_is_not_of_this_space,
)


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch):
    monkeypatch.setattr("speval.stores.sqlite.seed.SMALL", -1)


@pytest.fixture
def place(db, clock):
    return SqlitePlace(db, clock)
