"""The identity of a process, and whether it still runs.

Owns all questions about processes of this machine. Invariant: a process is reported as gone only when it has certainly ended.
If that is unknown, it counts as alive, and the lease decides.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Process", "is_gone", "this_process"]


@dataclass(frozen=True, slots=True)
class Process:
    """A process, identified by its machine, its pid and its start time.

    Attributes:
        host: The name of the host, for display.
        pid: The process id, valid within ``machine``.
        machine: The boot id, the PID namespace of the pid, and the time namespace in which ``start`` was read; empty if the
            system does not provide them.
        start: The start time in kernel ticks, which detects a reused pid; empty if unknown.
    """

    host: str
    pid: int
    machine: str
    start: str


_this: Process | None = None  # found out once, since every call of speval asks


def this_process() -> Process:
    """Return the calling process."""
    global _this
    pid = os.getpid()
    if _this is not None and _this.pid == pid:
        return _this
    found = Process(socket.gethostname(), pid, _machine(), _stat(pid)[1])
    if found.machine and found.start:  # else what could not be read may be readable the next time
        _this = found
    return found


def _forget() -> None:
    """Forget which process this is: a forked child in a new PID namespace may have the pid of its parent."""
    global _this
    _this = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def is_gone(process: Process, machine: str) -> bool:
    """Tell whether the process has certainly ended, as seen from ``machine``."""
    if not machine or process.machine != machine:
        return False
    if sys.platform == "linux":
        state, start = _stat(process.pid)
        # A dead process that its parent has not reaped still has a pid, and kill(pid, 0) succeeds.
        if state in ("Z", "X") or (start and process.start and start != process.start):
            return True
        if state:
            return False
        # Not in /proc; but /proc may hide the processes of other users.
    try:
        os.kill(process.pid, 0)
    except (ProcessLookupError, OverflowError):  # OverflowError: the number is too large for a pid
        return True
    except OSError:
        pass
    return False


def _stat(pid: int) -> tuple[str, str]:
    """Return (state letter, start in ticks since boot) on Linux; empty strings if the process does not exist."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "", ""
    except OSError:
        return "?", ""  # the process exists, and reading it is not permitted
    fields = text.rpartition(")")[2].split()  # the command name may contain any characters, also ")"
    return fields[0], fields[19]


def _machine() -> str:
    try:
        if sys.platform == "linux":
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            # The kernel shifts the start time of a process by the offset of the reader's time namespace.
            namespaces = [path.stat().st_ino for name in ("pid", "time") if (path := Path("/proc/self/ns", name)).exists()]
            return " ".join([boot, *map(str, namespaces)])
        if sys.platform == "darwin":
            command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        pass
    return ""
