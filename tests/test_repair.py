"""Putting a database in order: compacting it, and saving what is sound in a damaged one."""

import random
import sqlite3
from contextlib import closing

import pytest
from click.testing import CliRunner

from speval import DatabaseNotEmptyError, load_evals, speval
from speval.cli.commands import speval as command
from speval.errors import DatabaseError, OptionError
from speval.options import checked_database
from speval.stores import make_control
from speval.stores.copying import salvage

from .conftest import rows


def work(args):
    return [args, "x" * 50]


def change(db, *statements):
    with closing(sqlite3.connect(db)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


@pytest.fixture
def filled(db):
    speval(work, {f"name {n}": n for n in range(3000)}, db, executor="thread")
    return db


@pytest.mark.parametrize("zeroed", range(4))
def test_what_is_sound_in_a_damaged_file_is_saved_and_the_rest_is_named(filled, tmp_path, zeroed):
    truth = {e["name"]: e for e in load_evals(filled)}
    pages = filled.stat().st_size // 4096
    rng = random.Random(zeroed)
    with filled.open("r+b") as file:
        for _ in range(3):
            file.seek(rng.randrange(20, pages) * 4096)
            file.write(bytes(4096))
    saved = salvage(filled, tmp_path / "new.db")
    found = load_evals(tmp_path / "new.db")
    assert len(found) == saved.copied.evaluations > 2500
    for e in found:
        assert e["args"] == truth[e["name"]]["args"]
        if e["status"] == "completed":
            assert e["result"] == truth[e["name"]]["result"]
    missing = len(truth) - sum(e["status"] == "completed" for e in found)
    assert saved.lost_count >= missing or not missing
    assert speval(work, {f"name {n}": n for n in range(3000)}, tmp_path / "new.db", executor="thread").completed == 3000
    with make_control(tmp_path / "new.db") as control:
        assert not any(finding.is_error for finding in control.check().findings)


@pytest.mark.parametrize("table", ["evaluations", "queue", "fresh", "attempts", "workers"])
def test_a_table_that_is_gone_as_a_whole_costs_no_more_than_that_table(filled, tmp_path, table):
    ((page,),) = rows(filled, "SELECT rootpage FROM sqlite_master WHERE name = ?", table)
    with filled.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)
    saved = salvage(filled, tmp_path / "new.db")
    completed = len(load_evals(tmp_path / "new.db", status="completed"))
    assert saved.copied.evaluations == (0 if table == "evaluations" else 3000)
    assert completed == (0 if table in ("evaluations", "attempts") else 3000)


def test_the_command_names_what_is_lost(filled, tmp_path):
    change(filled, "UPDATE attempts SET result = '1' WHERE evaluation = 5")
    done = CliRunner().invoke(command, ["salvage", str(filled), str(tmp_path / "new.db")], standalone_mode=False)
    assert done.return_value == 1
    assert "lost 'name 4': its result or its status is lost; it is pending" in done.output
    assert "3000 evaluations and 2999 attempts saved to" in done.output
    assert [e["name"] for e in load_evals(tmp_path / "new.db", status="pending")] == ["name 4"]


def test_nothing_is_salvaged_into_a_database_with_evaluations_nor_from_a_server(filled):
    with pytest.raises(DatabaseNotEmptyError):
        salvage(filled, filled)
    with pytest.raises(OptionError, match="name a file"):
        salvage("postgresql://localhost/x", filled)


def test_compacting_gives_back_the_room_of_what_was_dropped(filled):
    speval(work, {"name 1": 1}, filled, executor="thread", on_changed="keep")  # a worker that ends without an attempt
    before = load_evals(filled)
    with make_control(filled, "write") as control:
        assert control.drop([f"name {n}" for n in range(100, 3000)]) == 2900
        done = control.compact()
        again = control.compact()
    assert done.after < done.before / 3
    assert (done.workers, again.workers, again.after) == (1, 0, done.after)
    assert load_evals(filled) == before[:100]
    assert speval(work, {f"name {n}": n for n in range(200)}, filled, executor="thread").completed == 200


def test_compacting_is_refused_while_workers_are_at_work(anywhere):
    speval(str, range(3), anywhere, executor="thread")
    if isinstance(anywhere, str):
        with make_control(checked_database(anywhere), "write") as control:
            assert control.compact().workers == 0
        return
    change(anywhere, "UPDATE workers SET ended_at = NULL")
    with make_control(anywhere, "write") as control, pytest.raises(DatabaseError, match="1 worker alive"):
        control.compact()
