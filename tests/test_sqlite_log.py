"""The -wal: doctor says what keeps it from being moved into the database."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from speval import speval
from speval.stores import make_control
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
