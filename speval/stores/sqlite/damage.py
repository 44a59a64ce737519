"""What SQLite finds wrong in a file.

Owns the process of its own in which SQLite looks. Invariant: a file that SQLite itself crashes on ends that process only, and
Ctrl-C ends it at once.
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
# SQLite goes down a tree page by page, on its stack, however deep a crafted one is. And of a stranger's own tables, which
# nothing else reads, it would compute the expressions, so with such tables only ours are checked.
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
    """Return what SQLite finds wrong in a file, at most ten of it; and what kept it from looking, if something did.

    Args:
        path: The file.
        shown: What errors call it.
        is_immutable: Whether it has to be read as one that nobody changes.

    Raises:
        DatabaseLockedError: another program keeps its lock.
    """
    uri = f"file:{quote(str(path))}?mode=rw{'&immutable=1' if is_immutable else ''}"
    # Neither packages nor modules of the folder we are in.
    command = [sys.executable, "-S", "-P", "-c", _CHECK, uri, str(_PATIENCE), *tables()]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    except OSError as error:  # such as an interpreter that this user may not execute
        return [], f"{sys.executable}: {error.strerror}"
    if done.returncode == -signal.SIGINT:
        raise KeyboardInterrupt
    if done.returncode < 0:
        return [f"SQLite itself crashes on it ({signal.Signals(-done.returncode).name})"], None
    if done.returncode:
        return [], (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
    found, code = json.loads(done.stdout)
    if code in BUSY:
        raise DatabaseLockedError(shown, _PATIENCE)
    return [str(text) for text in found], None
