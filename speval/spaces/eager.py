"""An eager eval space: read and encoded before the run.

Owns the conversion of the user's space to rows of (name, args as JSON text). Invariant: the space is read exactly once, in
order, before the database is opened, and is never in memory as a whole. A space that can't be encoded leaves no trace.
"""

from __future__ import annotations

import hashlib
import json
import operator
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from ..codec import encode
from ..errors import OptionError, SpaceError
from ..model import EvalSpace

__all__ = ["Key", "Space", "checked_name", "name_to_key"]

# The stored form of a name: a decimal number is an integer, so the names of a list space are inserted in index order.
Key = int | str

_SPOOL_IN_MEMORY = 8 * 2**20  # bytes; a larger space goes to a temporary file
_STEP = 1000  # evaluations encoded before other tasks may run


def name_to_key(name: str) -> Key:
    """Return the stored form of a name: 17 for "17", but "017" for "017"."""
    if name.isascii() and name.isdigit() and len(name) <= 18 and (name == "0" or name[0] != "0"):
        return int(name)
    return name


class Space:
    """An encoded eval space.

    Attributes:
        count: Evaluations in it.
        digest: A hash over all names and args in their order.
    """

    def __init__(self) -> None:
        self.count = 0
        self.digest = ""
        self._spool = tempfile.SpooledTemporaryFile(_SPOOL_IN_MEMORY)  # noqa: SIM115 - closed with the space

    def __repr__(self) -> str:
        return f"<Space of {self.count}>"

    def fill(self, eval_space: EvalSpace) -> Iterator[None]:
        """Encode the eval space, yielding after every thousand evaluations.

        Raises:
            OptionError: the space is neither a mapping nor an iterable.
            SpaceError: a key is not a valid name, or two keys are the same name.
            UnserializableError: some args can't be written as JSON.
        """
        named = _named(eval_space)
        hashed = hashlib.blake2b(digest_size=16)
        lines: list[str] = []
        for key, args in named:
            # A line is name, tab, args: a number needs no quotes, and JSON has no raw tabs.
            name = key if type(key) is int else json.dumps(key)
            what = f"the args of evaluation {str(key)!r}"
            lines.append(f"{name}\t{encode(args, what)}\n")
            if len(lines) == _STEP:
                self._write(hashed, lines)
                yield
        self._write(hashed, lines)
        self.digest = hashed.hexdigest()
        yield

    def _write(self, hashed: Any, lines: list[str]) -> None:
        data = "".join(lines).encode()
        hashed.update(data)
        self._spool.write(data)
        self.count += len(lines)
        lines.clear()

    def rows(self) -> Iterator[tuple[Key, str]]:
        """Yield (key, args as JSON text) in the order of the space; may be called repeatedly."""
        self._spool.seek(0)
        for line in self._spool:
            name, _, args = line.decode().rstrip("\n").partition("\t")
            yield (json.loads(name) if name[0] == '"' else int(name)), args

    def close(self) -> None:
        """Release the memory or the temporary file of the spool."""
        self._spool.close()


def _named(eval_space: EvalSpace) -> Iterator[tuple[Key, Any]]:
    if isinstance(eval_space, Mapping):
        return _from_mapping(eval_space)
    if isinstance(eval_space, str | bytes | bytearray):
        raise OptionError("eval_space", repr(eval_space)[:40], "text is a single value; pass a list or a dict of args")
    try:
        return enumerate(iter(eval_space))  # type: ignore[arg-type]
    except TypeError:
        expected = "pass a list, a dict, another mapping or iterable of args, an async iterator or a generator function"
        raise OptionError("eval_space", repr(eval_space)[:60], expected) from None


def _from_mapping(eval_space: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
    # Only a dict whose keys are all strings can't contain a name twice.
    seen: set[Key] | None = None
    if type(eval_space) is not dict or not all(type(key) is str for key in eval_space):
        seen = set()
    for name, args in eval_space.items():
        key = checked_name(name)
        if seen is not None:
            if key in seen:
                raise SpaceError(repr(str(key)), "two evaluations have this name (names are compared as strings)")
            seen.add(key)
        yield key, args


def checked_name(name: Any) -> Key:
    """Return the stored form of a user's name.

    Raises:
        SpaceError: it is not a valid name.
    """
    if isinstance(name, str):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise SpaceError(ascii(name), "the name contains a lone surrogate, which can't be stored") from None
        return name_to_key(str.__str__(name))  # the value itself: str() of an enum member is something else
    if not isinstance(name, bool):
        with suppress(TypeError, ValueError):  # not a whole number, or one with more digits than Python converts
            return name_to_key(str(operator.index(name)))
    raise SpaceError(repr(name), f"a name must be a string, not {type(name).__name__}; convert the key with str(...)")
