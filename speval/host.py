"""Who a process is, and whether it still runs.

Owns what can be said about processes of this machine. Invariant: "gone" is said only of a process that is certainly
gone; whatever can't be known counts as alive, and the lease decides.
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
    """A process, told apart from every other one by where it runs and when it started.

    Attributes:
        host: The host's name, for people.
        pid: Its number, only good within ``machine``.
        machine: The boot, the PID namespace the number belongs to, and the time namespace in which ``start`` was read; empty
            where the system can't tell.
        start: When it started in the kernel's own ticks, so that a number used again is noticed; empty if unknown.
    """

    host: str
    pid: int
    machine: str
    start: str


_this: Process | None = None  # found out once, since every call of speval asks


def this_process() -> Process:
    """Return the process that calls."""
    global _this
    pid = os.getpid()
    if _this is not None and _this.pid == pid:
        return _this
    found = Process(socket.gethostname(), pid, _machine(), _stat(pid)[1])
    if found.machine and found.start:  # else what could not be read may be readable the next time
        _this = found
    return found


def _forget() -> None:
    """Forget which process this is: a forked child may have its parent's number, in a PID namespace of its own."""
    global _this
    _this = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def is_gone(process: Process, machine: str) -> bool:
    """Tell whether the process has certainly ended, as seen by one on ``machine``."""
    if not machine or process.machine != machine:
        return False
    if sys.platform == "linux":
        state, start = _stat(process.pid)
        # A dead process whose parent does not reap it still has a number and passes kill(pid, 0).
        if state in ("Z", "X") or (start and process.start and start != process.start):
            return True
        if state:
            return False
        # Not in /proc, which may also show nobody the processes of others.
    try:
        os.kill(process.pid, 0)
    except (ProcessLookupError, OverflowError):  # no process has a number that the system can't even ask for
        return True
    except OSError:
        pass
    return False


def _stat(pid: int) -> tuple[str, str]:
    """Return (state letter, start in ticks since boot) on Linux; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "", ""
    except OSError:
        return "?", ""  # it is there, and may not be looked at
    fields = text.rpartition(")")[2].split()  # the command's name may hold anything, brackets too
    return fields[0], fields[19]


def _machine() -> str:
    try:
        if sys.platform == "linux":
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            # The kernel shifts the start of a process by the offset of the time namespace of the one who reads it.
            spaces = [path.stat().st_ino for name in ("pid", "time") if (path := Path("/proc/self/ns", name)).exists()]
            return " ".join([boot, *map(str, spaces)])
        if sys.platform == "darwin":
            command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        pass
    return ""
