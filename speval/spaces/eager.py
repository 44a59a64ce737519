"""The eval space, encoded once and spooled.

Owns the way from whatever the user hands in to rows of (name, args as JSON text). Invariant: the space is read exactly
once, in order, before a database is touched, and never stands in memory as a whole: a space that can't be encoded
leaves no trace.
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

# How names are stored: a decimal number as an integer, since those of a list space then arrive in the index's own order.
Key = int | str

_SPOOL_IN_MEMORY = 8 * 2**20  # bytes; a larger space goes to a temporary file
_STEP = 1000  # evaluations encoded between two chances for others to run


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
        """Encode the eval space, handing control back after every thousand evaluations.

        Raises:
            OptionError: it is neither a mapping nor an iterable.
            SpaceError: a key is no name, or two keys are the same name.
            UnserializableError: some args can't be written as JSON.
        """
        named = _named(eval_space)
        hashed = hashlib.blake2b(digest_size=16)
        lines: list[str] = []
        for key, args in named:
            # A name stands in front of its args, so numbers need no quotes and text ends where JSON says.
            shown = key if type(key) is int else json.dumps(key)
            what = f"the args of evaluation {str(key)!r}"
            lines.append(f"{shown}\t{encode(args, what)}\n")
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
        """Yield (key, args as JSON text) in the order of the space; any number of times."""
        self._spool.seek(0)
        for line in self._spool:
            name, _, args = line.decode().rstrip("\n").partition("\t")
            yield (json.loads(name) if name[0] == '"' else int(name)), args

    def close(self) -> None:
        """Give back the spool's memory or file."""
        self._spool.close()


def _named(eval_space: EvalSpace) -> Iterator[tuple[Key, Any]]:
    if isinstance(eval_space, Mapping):
        return _from_mapping(eval_space)
    if isinstance(eval_space, str | bytes | bytearray):
        raise OptionError("eval_space", repr(eval_space)[:40], "text is one value; pass a list of args, or a dict of them")
    try:
        return enumerate(iter(eval_space))  # type: ignore[arg-type]
    except TypeError:
        expected = "pass a list, a dict, any other mapping or iterable of args, an async iterator or a generator function"
        raise OptionError("eval_space", repr(eval_space)[:60], expected) from None


def _from_mapping(eval_space: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
    # Only a dict with nothing but text for keys can't hold one name twice.
    seen: set[Key] | None = None
    if type(eval_space) is not dict or not all(type(key) is str for key in eval_space):
        seen = set()
    for name, args in eval_space.items():
        key = checked_name(name)
        if seen is not None:
            if key in seen:
                raise SpaceError(repr(str(key)), "two evaluations have this name; names are compared as strings")
            seen.add(key)
        yield key, args


def checked_name(name: Any) -> Key:
    """Return the stored form of what a user gave as a name.

    Raises:
        SpaceError: it is none.
    """
    if isinstance(name, str):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise SpaceError(ascii(name), "the name has a lone surrogate, which can't be stored") from None
        return name_to_key(str.__str__(name))  # what it holds: an enum calls itself otherwise
    if not isinstance(name, bool):
        with suppress(TypeError, ValueError):  # no whole number, or one of more digits than Python writes
            return name_to_key(str(operator.index(name)))
    raise SpaceError(repr(name), f"a name is a string, this is a {type(name).__name__}; use str(...) of it as the key")
