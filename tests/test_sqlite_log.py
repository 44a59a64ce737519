"""The -wal: doctor says what keeps it from being moved into the database."""

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from speval import load_evals, speval
from speval.stores import make_control
from speval.stores.sqlite.file import SqliteFile
from speval.stores.sqlite.mount import kind_of_place

READER = """
import sqlite3, sys
reader = sqlite3.connect(sys.argv[1], isolation_level=None)
reader.execute("BEGIN")
reader.execute("SELECT count(*) FROM attempts").fetchone()
print("reads", flush=True)
sys.stdin.read()
"""


def large(args):
    return "y" * 1_000_000


def findings(db: Path) -> list[str]:
    with make_control(db) as control:
        return [finding.problem for finding in control.check(integrity=False).findings]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/locks")
@pytest.mark.parametrize("has_log", [False, True])
def test_the_doctor_names_the_reader_that_lets_the_log_grow(db, has_log):
    speval(large, range(3), db, executor="thread", progress=False)
    with closing(sqlite3.connect(db, isolation_level=None)) as keeper:  # so that the -wal stays
        if has_log:
            keeper.execute("INSERT INTO meta VALUES ('concurrency', '3')")
        else:
            keeper.execute("SELECT count(*) FROM meta").fetchone()
        with subprocess.Popen(
            [sys.executable, "-c", READER, db], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as reader:
            assert reader.stdout.readline() == "reads\n"
            speval(large, range(14), db, executor="thread", progress=False)
            (found,) = findings(db)
            assert found.startswith("the -wal has grown to 1")
            assert (
                f"its checkpoint is blocked by a transaction kept open by process {reader.pid} ({sys.executable} -c " in found
            )
            reader.stdin.close()
            reader.wait(60)
        assert "no checkpoint has moved" in findings(db)[0]
        keeper.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        assert findings(db) == [], "a large -wal alone is written over from its beginning"


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("nfs4", "a network filesystem (nfs4)"),
        ("fuse.sshfs", "a network filesystem (fuse.sshfs)"),
        ("fuse.mergerfs", "a filesystem that is not known to be local (fuse.mergerfs)"),
        ("unknown", "a filesystem that is not known to be local (unknown)"),
    ],
)
def test_only_a_network_filesystem_is_called_one(kind, place):
    assert kind_of_place(kind) == place


def test_the_first_commit_of_an_empty_wal_waits_for_no_disk_and_all_later_ones_wait_as_usual(db):
    with closing(SqliteFile(db, "create")):
        pass
    log = Path(f"{db}-wal")
    assert not log.exists()
    with closing(SqliteFile(db, "write")) as file:
        assert log.stat().st_size > 0  # written while it was being opened
        assert file.connection.execute("PRAGMA synchronous").fetchone() == (1,)
        size = log.stat().st_size
        with closing(SqliteFile(db, "write")) as another:
            assert another.connection.execute("PRAGMA synchronous").fetchone() == (1,)
            assert log.stat().st_size == size  # it is not empty, so nothing is written to it
    with closing(SqliteFile(db, "write", "power")) as file:
        assert not log.exists() or log.stat().st_size == 0
        assert file.connection.execute("PRAGMA synchronous").fetchone() == (2,)


@pytest.mark.parametrize("lost", [32, 4096, None])
def test_a_power_cut_before_the_first_pages_of_a_wal_are_written_loses_its_commits_and_nothing_else(db, lost):
    speval(abs, range(5), db, executor="thread", progress=False)
    cut = db.with_name("cut.db")
    with closing(sqlite3.connect(db, isolation_level=None)) as keeper:  # so that the -wal stays
        keeper.execute("SELECT count(*) FROM meta").fetchone()
        speval(abs, range(8), db, executor="thread", progress=False)
        shutil.copy(db, cut)
        data = bytearray(Path(f"{db}-wal").read_bytes())
    data[:lost] = bytes(len(data[:lost]))
    Path(f"{cut}-wal").write_bytes(data)
    assert [e["result"] for e in load_evals(cut, status="completed")] == list(range(5))
    assert speval(abs, range(8), cut, executor="thread", progress=False).completed == 8
    with make_control(cut) as control:
        assert not [finding for finding in control.check().findings if finding.is_error]
