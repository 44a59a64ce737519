"""Side files: results that could not be recorded, kept beside the database until the next start takes them in.

Owns writing, finding, reading and removing them. Invariant: a file that is spoken of is on the disk, none is ever overwritten,
and one is removed only when the database holds all that is in it. One JSON object a line; docs/guarantees.md names its keys.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

from ..errors import SpevalError
from ..model import Claim, Outcome, counted
from ..stores.base import Ended, Store, TakenIn

__all__ = ["keep", "take_in"]

logger = logging.getLogger("speval.worker")

_MARK = ".unrecorded-"
_REFUSED = ".refused"
_SHOWN = 3  # evaluations that a message names
_CAUSES = (None, "exception", "timeout", "crash", "lost", "unserializable")


def keep(beside: Path, ended: Sequence[Ended]) -> tuple[Path | None, str]:
    """Write results to a new file, which is on the disk when this returns.

    Args:
        beside: The database's path, which the file is named after; it goes to the temporary folder where there is no room.
        ended: The attempts.

    Returns:
        Where they are, None if nowhere; and what to say of it.
    """
    text = "".join(f"{json.dumps(_as_line(one))}\n" for one in ended).encode()
    results, problems = counted(len(ended), "result"), []
    for base in (beside, _elsewhere(beside)):
        try:
            path = _write(base, text)
        except OSError as error:
            problems.append(f"{base.parent}: {error.strerror or error}")
        else:
            return path, f"{results} kept in {path}; the next start records what is in it"
    names = ", ".join(repr(one.claim.name) for one in ended[:_SHOWN])
    more = ", ..." if len(ended) > _SHOWN else ""
    return None, f"{results} lost ({names}{more}), no folder takes a file: {'; '.join(problems)}"


async def take_in(store: Store) -> None:
    """Record what earlier runs could not, and say what became of it."""
    for path in _found(store.beside):
        try:
            with _locked(path) as file:
                if file is not None:
                    await _take_in(store, path, file)
        except (OSError, SpevalError) as error:
            logger.warning("the results in %s could not be recorded now, and stay there: %s", path, error)


async def _take_in(store: Store, path: Path, file: IO[str]) -> None:
    ended, unreadable = [], 0
    for line in file:
        try:
            ended.append(_as_ended(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError):
            unreadable += 1
    taken = await store.take_in(ended) if ended else TakenIn()
    if taken.recorded:
        logger.warning("%s of an earlier run recorded, from %s", counted(len(taken.recorded), "result"), path)
    if taken.waits:
        logger.warning("%s in %s not recorded now, the next start tries again: %s", *_told(taken.waits, path))
    if taken.refused:
        logger.warning("%s in %s not recorded: %s", *_told(taken.refused, path))
    if unreadable:
        logger.warning("%s in %s can't be read", counted(unreadable, "line"), path)
    if not taken.waits:
        _settle(path, whole=not (taken.refused or unreadable))


def _settle(path: Path, *, whole: bool) -> None:
    """Remove a file that the database holds all of; keep another one where no start reads it."""
    if whole:
        path.unlink()
        return
    path.rename(f"{path}{_REFUSED}")
    logger.warning("%s is kept as %s%s; speval does not read it again", path, path.name, _REFUSED)


def _told(some: Sequence[tuple[Claim, str]], path: Path) -> tuple[str, Path, str]:
    text = "; ".join(f"{claim.name!r}: {why}" for claim, why in some[:_SHOWN])
    return counted(len(some), "result"), path, text + ("; ..." if len(some) > _SHOWN else "")


def _elsewhere(beside: Path) -> Path:
    """Return what a file is named after that belongs to the same database and lies in the temporary folder, in one of ours."""
    digest = hashlib.sha256(os.fsencode(beside)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"speval-{os.getuid()}" / f"{digest}-{beside.name[:100]}"


def _write(base: Path, text: bytes) -> Path:
    if base.parent.name == f"speval-{os.getuid()}":
        base.parent.mkdir(mode=0o700, exist_ok=True)
    for number in count(1):
        path = Path(f"{base}{_MARK}{number}.jsonl")
        if os.path.lexists(f"{path}{_REFUSED}"):
            continue
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        break
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            with suppress(OSError):  # a filesystem without locks
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is complete; before, it is empty, and left alone
            view = memoryview(text)
            while view:
                view = view[file.write(view) :]
            os.fsync(file)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # a filesystem without such a thing
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path


def _found(beside: Path) -> Iterator[Path]:
    """Yield the files of a database, the oldest number first."""
    for base in (beside, _elsewhere(beside)):
        pattern = re.compile(re.escape(f"{base.name}{_MARK}") + r"([0-9]{1,9})\.jsonl")
        found = []
        with suppress(OSError), os.scandir(base.parent) as entries:
            found = [(int(match[1]), entry.path) for entry in entries if (match := pattern.fullmatch(entry.name))]
        for _, path in sorted(found):
            yield Path(path)


@contextmanager
def _locked(path: Path) -> Iterator[IO[str] | None]:
    """Open a side file and lock it; None if another process writes, records or has recorded it.

    Raises:
        OSError: it can't be read, or does not belong to this user, root or the owner of the folder.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (os.getuid(), 0, path.parent.stat().st_uid):
            raise OSError("it belongs to another user or is not a regular file; check it, then move it away")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(path.lstat(), status) and os.fstat(descriptor).st_size > 0
        except (BlockingIOError, FileNotFoundError):
            is_there = False
        yield file if is_there else None


def _as_line(one: Ended) -> dict[str, Any]:
    (id, attempt, charged, name, args, worker), outcome, again = one
    line = {"evaluation": id, "name": name, "args": args, "attempt": attempt, "charged": charged, "worker": worker}
    line |= {"started_at": outcome.started_at, "duration": outcome.duration, "cause": outcome.cause}
    return line | {"result": outcome.result, "error": outcome.error, "again": again}


def _as_ended(line: dict[str, Any]) -> Ended:
    """Return what a line stands for.

    Raises:
        ValueError, TypeError, KeyError: nothing that speval has written.
    """
    attempt, charged = _whole(line["attempt"], 2**30), _whole(line["charged"], 2**30)
    worker = _whole(line["worker"], 2**62)
    claim = Claim(_whole(line["evaluation"], 2**62), attempt, charged, _text(line["name"]), _text(line["args"]), worker)
    error, result, cause = line["error"], line["result"], line["cause"]
    if cause not in _CAUSES or (result is None) != (cause is not None) or (error is None) != (cause is None):
        raise ValueError("neither a result nor an error")
    if result is not None:
        json.loads(_text(result))
    json.loads(claim.args)
    told = None if error is None else {key: _text(error[key]) for key in ("cause", "type", "message", "traceback")}
    outcome = Outcome(cause, result, told, float(line["started_at"]), float(line["duration"]))  # type: ignore[arg-type]
    return Ended(claim, outcome, line["again"] is True)


def _whole(value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError("a number out of bounds")
    return value


def _text(value: object) -> str:
    if type(value) is not str:
        raise TypeError("no text")
    return value
