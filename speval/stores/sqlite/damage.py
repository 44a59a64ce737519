"""SQLite's integrity check of a file.

Owns the separate process that runs it. Invariant: a file on which SQLite crashes ends only that process, and Ctrl-C ends it at
once.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

from ...errors import DatabaseLockedError
from .contents import tables
from .errors import BUSY

__all__ = ["damage"]

_PATIENCE = 60  # seconds for the lock of another program
# SQLite descends a tree page by page on its stack, and a crafted tree can be very deep. It would also execute expressions in
# tables of other programs, so if there are such tables, only ours are checked.
_CHECK = """
import json, signal, sqlite3, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
uri, patience, *ours = sys.argv[1:]
try:
    c = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=float(patience))
    c.execute("PRAGMA trusted_schema = OFF")
    c.execute("BEGIN")
    there = {name for (name,) in c.execute("SELECT name FROM sqlite_master WHERE type = 'table'")} - {"sqlite_sequence"}
    found = []
    for argument in there & set(ours) if there & set(ours) and there - set(ours) else [10]:
        found += [text for (text,) in c.execute(f"PRAGMA integrity_check({argument})") if text != "ok"]
    print(json.dumps([found[:10], 0]))
except sqlite3.Error as error:
    print(json.dumps([[str(error)], getattr(error, "sqlite_errorcode", 0) & 255]))
"""


def damage(path: Path, shown: str, *, is_immutable: bool) -> tuple[list[str], str | None]:
    """Return up to ten problems that SQLite finds in a file, and the reason if the check could not run.

    Args:
        path: The file.
        shown: The display name for errors.
        is_immutable: Whether to open it as immutable.

    Raises:
        DatabaseLockedError: another program keeps it locked.
    """
    uri = f"file:{quote(str(path))}?mode=rw{'&immutable=1' if is_immutable else ''}"
    # Without site packages and without modules of the current folder.
    command = [sys.executable, "-S", "-P", "-c", _CHECK, uri, str(_PATIENCE), *tables()]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    except OSError as error:  # for example, this user may not execute the interpreter
        return [], f"{sys.executable}: {error.strerror}"
    if done.returncode == -signal.SIGINT:
        raise KeyboardInterrupt
    if done.returncode < 0:
        return [f"SQLite crashes while it checks the file ({signal.Signals(-done.returncode).name})"], None
    if done.returncode:
        return [], (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
    found, code = json.loads(done.stdout)
    if code in BUSY:
        raise DatabaseLockedError(shown, _PATIENCE)
    return [str(text) for text in found], None
