"""A database file and the -wal beside it: another file in the place of the database is told before the two are merged."""

import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from speval import load_evals
from speval.errors import DatabaseError
from speval.stores.sqlite.file import SqliteFile
from speval.stores.sqlite.pair import check_pair

from .conftest import WAIT, wait_for

# Its answers fill the -wal, which begins anew after a thousand pages, several times; it is killed with answers in the -wal.
STUDY = """
import os, signal, sys
from speval import as_completed

count, is_killed = int(sys.argv[1]), len(sys.argv) > 2
for number, _ in enumerate(as_completed(lambda x: str(x) * 10_000, range(count), "runs.db", executor="thread", progress=False)):
    if is_killed and number == count - 20:
        os.kill(os.getpid(), signal.SIGKILL)
"""
# One of many copies that write for as long as there is a file "go".
WRITER = """
import os
from pathlib import Path
from speval.stores.sqlite.file import SqliteFile

file, number = SqliteFile(Path("runs.db"), "write"), 0
while os.path.exists("go"):
    number += 1
    file.write(lambda c: c.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"k{os.getpid()}-{number % 50}", "x" * 1000)))
    if number % 10 == 0:
        file.connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
os._exit(0)  # like a kill: nothing is moved into the file
"""


def study(scripts, count: int, *how: str) -> None:
    done = scripts.run(STUDY, str(count), *how)
    assert done.returncode == (-signal.SIGKILL if how else 0), done.stderr


def assert_refused_and_left_alone(db: Path) -> None:
    files = [db, Path(f"{db}-wal")]
    before = [file.read_bytes() for file in files]
    with pytest.raises(DatabaseError, match=r"runs\.db-wal does not belong to this file, .* move .*-wal away"):
        load_evals(db)
    shown = subprocess.run(
        [sys.executable, "-m", "speval", "status", str(db)], capture_output=True, text=True, timeout=WAIT, check=False
    )
    assert shown.returncode != 0
    assert "does not belong to this file" in shown.stderr
    with pytest.raises(DatabaseError, match="does not belong to this file"):
        SqliteFile(db, "write")
    assert [file.read_bytes() for file in files] == before


def test_an_old_backup_beside_a_newer_wal_is_refused_and_the_right_file_goes_on(db, scripts, tmp_path):
    study(scripts, 300)
    backup, right = tmp_path / "backup", tmp_path / "right"
    shutil.copy(db, backup)
    study(scripts, 1500, "killed")
    shutil.copy(db, right)
    shutil.copy(backup, db)
    assert_refused_and_left_alone(db)
    shutil.copy(right, db)
    study(scripts, 1500)
    assert [e["result"] for e in load_evals(db)] == [str(x) * 10_000 for x in range(1500)]


def test_with_the_wal_moved_away_an_old_backup_is_used_as_it_is(db, scripts, tmp_path):
    study(scripts, 300)
    shutil.copy(db, tmp_path / "backup")
    study(scripts, 1000, "killed")
    shutil.copy(tmp_path / "backup", db)
    Path(f"{db}-wal").rename(tmp_path / "away")
    assert [e["result"] for e in load_evals(db)] == [str(x) * 10_000 for x in range(300)]


def test_a_newer_file_and_the_file_of_another_study_beside_a_wal_are_refused(db, scripts, tmp_path):
    study(scripts, 600, "killed")
    old_log = tmp_path / "old-wal"
    shutil.copy(f"{db}-wal", old_log)
    study(scripts, 1500)
    assert not Path(f"{db}-wal").exists()
    shutil.copy(old_log, f"{db}-wal")
    assert_refused_and_left_alone(db)

    Path(f"{db}-wal").unlink()
    db.unlink()
    study(scripts, 300)
    shutil.copy(old_log, f"{db}-wal")
    assert_refused_and_left_alone(db)


def test_the_file_is_never_refused_while_copies_write_and_move_the_wal_into_it(db, scripts):
    with closing(SqliteFile(db, "create")):
        pass
    go = db.with_name("go")
    go.touch()
    script = scripts.write(WRITER)
    writers = [scripts.start(script) for _ in range(3)]
    numbers = set()
    try:
        while len(numbers) < 10:  # the -wal begins anew under the looks
            assert all(writer.poll() is None for writer in writers)
            check_pair(db, "runs.db")
            if Path(f"{db}-wal").exists():
                numbers.add(Path(f"{db}-wal").read_bytes()[16:20])
    finally:
        go.unlink()
    for writer in writers:
        wait_for(lambda writer=writer: writer.poll() is not None, "a writer to end")
    check_pair(db, "runs.db")  # nor after the death of all of them
    with closing(SqliteFile(db, "read")) as file:
        assert file.read(lambda c: c.execute("PRAGMA integrity_check").fetchall()) == [("ok",)]


def test_a_copy_of_the_file_from_under_its_own_wal_is_taken_for_what_it_is(db, scripts, tmp_path):
    study(scripts, 20, "killed")
    with closing(SqliteFile(db, "write")) as file:
        file.write(lambda c: c.execute("INSERT INTO meta VALUES ('more', 1)"))
        shutil.copy(db, tmp_path / "copy")
        file.checkpoint()
        file.write(lambda c: c.execute("INSERT INTO meta VALUES ('last', 1)"))
        moved = tmp_path / "moved.db"
        shutil.copy(tmp_path / "copy", moved)
        shutil.copy(f"{db}-wal", f"{moved}-wal")
        check_pair(db, "runs.db")
    # The -wal has begun anew since, so without what it held the copy has lost something.
    with pytest.raises(DatabaseError, match="does not belong to this file"):
        check_pair(moved, "moved.db")


def test_a_database_without_a_mark_is_opened(db):
    with closing(SqliteFile(db, "create")):
        pass
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("DELETE FROM meta WHERE key = 'log'")
        connection.execute("INSERT INTO meta VALUES ('something', 1)")
        connection.commit()
        assert Path(f"{db}-wal").stat().st_size
        check_pair(db, "runs.db")
