"""One file on a network filesystem: a real one in user space (GlusterFS), mounted twice, as two machines would have it."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from speval import load_evals
from speval.stores.sqlite.mount import check_locks, is_network

from .conftest import REQUIRED, rows, wait_for
from .postgres_server import free_port

BRICK = """
volume brick
  type storage/posix
  option directory {folder}/brick
end-volume
"""
LOCKS = """
volume locks
  type features/locks
  subvolumes brick
end-volume
"""
SERVER = """
volume server
  type protocol/server
  option transport-type tcp
  option transport.socket.listen-port {port}
  option transport.socket.bind-address 127.0.0.1
  option auth.addr.{top}.allow 127.0.0.1
  subvolumes {top}
end-volume
"""
CLIENT = """
volume client
  type protocol/client
  option transport-type tcp
  option remote-host 127.0.0.1
  option remote-port {port}
  option remote-subvolume {top}
end-volume
"""
UNCACHED = ("--direct-io-mode=enable", "--attribute-timeout=0", "--entry-timeout=0")


class Shared:
    """A folder on a server, and two machines that have mounted it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gl", dir="/tmp"))
        self.brick, self.one, self.other = (self.folder / name for name in ("brick", "one", "other"))
        for folder in (self.brick, self.one, self.other):
            folder.mkdir()
        self._port = free_port()
        self._mounted: list[Path] = []
        self._pid = self.folder / "pid"

    def mount(self, *options: str, locks: bool = True) -> None:
        values = {"folder": self.folder, "port": self._port, "top": "locks" if locks else "brick"}
        server, client = self.folder / "server.vol", self.folder / "client.vol"
        server.write_text((BRICK + (LOCKS if locks else "") + SERVER).format(**values))
        client.write_text(CLIENT.format(**values))
        log = self.folder / "log"
        subprocess.run(["glusterfsd", "-f", server, "-l", log, "-p", self._pid], check=True)
        for folder in (self.one, self.other):
            subprocess.run(["glusterfs", "-f", client, "-l", log, *options, folder], check=True)
            self._mounted.append(folder)
            wait_for(lambda folder=folder: os.path.ismount(folder) and os.access(folder, os.W_OK))

    def close(self) -> None:
        for folder in self._mounted:
            subprocess.run(["umount", "-l", folder], check=True)
        if self._pid.exists():
            os.kill(int(self._pid.read_text()), signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def shared():
    is_there = os.geteuid() == 0 and Path("/dev/fuse").exists() and shutil.which("glusterfsd")
    if not is_there and "glusterfs" not in REQUIRED:
        pytest.skip("needs root, FUSE and GlusterFS")
    shared = Shared()
    try:
        yield shared
    finally:
        shared.close()


SCRIPT = """
import logging, os, sys, time
logging.basicConfig(level=logging.INFO)
from speval import speval
log = os.open("calls", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
def function(args):
    time.sleep(0.05)
    os.write(log, f"{args}\\n".encode())
    return args
speval(function, range(60), sys.argv[1])
"""


def start(scripts, *databases):
    script = scripts.write(SCRIPT)
    return [scripts.start(script, str(db)) for db in databases]


def test_copies_on_two_machines_share_a_file_on_a_mount_without_caches_and_one_dies(shared, scripts, tmp_path):
    shared.mount(*UNCACHED)
    here, there = shared.one / "runs.db", shared.other / "runs.db"
    copies = start(scripts, here, there, here, there)
    wait_for(lambda: there.exists() and len(load_evals(there, status="completed")) >= 10)
    copies[0].kill()
    copies[0].wait()
    ends = [copy.communicate(timeout=100)[1] for copy in copies[1:]]
    assert [copy.returncode for copy in copies[1:]] == [0] * 3, ends
    assert all("is on a network filesystem (fuse.glusterfs)" in err for err in ends)
    assert [(e["status"], e["result"]) for e in load_evals(here)] == [("completed", i) for i in range(60)]
    assert rows(there, "SELECT count(*) FROM attempts WHERE outcome = 'completed'") == [(60,)]
    assert rows(there, "PRAGMA journal_mode") == [("delete",)]
    calls = Counter((tmp_path / "calls").read_text().split())
    assert len(calls) == 60
    assert sum(calls.values()) <= 61  # the one that was cut off


def test_a_machine_that_is_shown_old_data_ends_before_it_writes_over_what_others_have_recorded(shared, scripts, tmp_path):
    shared.mount()
    here, there = shared.one / "runs.db", shared.other / "runs.db"
    copies = start(scripts, here, there)
    ends = [copy.communicate(timeout=100)[1] for copy in copies]
    assert sorted(copy.returncode for copy in copies) == [0, 1], ends
    (told,) = [err for copy, err in zip(copies, ends, strict=True) if copy.returncode]
    assert "its filesystem (fuse.glusterfs) shows old data on this machine" in told
    # Not where GlusterFS keeps it, which gives each file a second name there.
    shutil.copy(shared.brick / "runs.db", tmp_path / "seen.db")
    recorded = [(e["status"], e["result"]) for e in load_evals(tmp_path / "seen.db")]
    assert recorded == [("completed", i) for i in range(60)]


def test_a_mount_without_locks_is_refused(shared, scripts):
    shared.mount(*UNCACHED, locks=False)
    (copy,) = start(scripts, shared.one / "runs.db")
    err = copy.communicate(timeout=100)[1]
    assert copy.returncode == 1
    assert "file locks don't work on its filesystem (fuse.glusterfs)" in err


@pytest.mark.skipif(sys.platform != "linux", reason="tries locks of Linux")
def test_locks_that_work_pass_and_leave_nothing_behind(tmp_path):
    check_locks(tmp_path / "runs.db", "runs.db", "nfs4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kind",
    [
        *("nfs", "nfs4", "lustre", "gpfs", "ceph", "cifs", "smb3", "9p", "virtiofs", "fuse.sshfs", "fuse.juicefs"),
        *("fuse", "fakeowner", "drvfs", "dvs", "quobyte", "unknown", "one that is yet to be made"),
    ],
)
def test_filesystems_that_several_machines_may_share_are_recognised(kind):
    assert is_network(kind)
    assert not any(is_network(kind) for kind in ("ext4", "xfs", "btrfs", "overlay", "tmpfs", "apfs", "fuseblk", None))
