"""Values to JSON text and back.

Owns how args and results are written. Invariant: ``decode(encode(x))`` is the same for every worker and every call, so
a function never sees anything but what JSON gives back; NaN and infinities survive, which JSON itself does not demand.
"""

from __future__ import annotations

from .errors import UnserializableError

# json imports re, which takes a worker process nearly as long as its interpreter's start. What is quick in json is this module.
try:
    from _json import encode_basestring, encode_basestring_ascii, make_encoder, make_scanner
except ImportError:  # not CPython
    make_encoder = None  # type: ignore[assignment, misc]

TYPE_CHECKING = False  # worker processes import this module, and typing takes longer than all of it
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["MOST_DIGITS", "decode", "encode", "read", "same"]

MOST_DIGITS = 100_000  # of a whole number that is read
_DIGITS_AT_ONCE = 600  # below any limit that a process may have set


class _ObjectArray(Exception):
    """There is an array of Python objects, whose dicts have to be looked at like all others."""


def _from_numpy(value: Any) -> Any:
    """Turn what the JSON encoder does not know into something it does.

    Raises:
        TypeError: there is no such thing, or something of the value would be lost on the way.
    """
    # NumPy is not imported for this: whoever hands in an array has done so.
    if _is_numpy(value):
        if value.dtype.kind == "O":
            raise _ObjectArray
        plain = _lossless(value).tolist()
        if type(plain) is not type(value):
            return plain
    raise TypeError(f"{type(value).__qualname__} is none of dict, list, tuple, str, int, float, bool, None or NumPy data")


def _is_numpy(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist") and hasattr(value, "dtype")


def _lossless(value: Any) -> Any:
    """Return NumPy's value if a list or a number says as much as it does.

    Raises:
        TypeError: it does not.
    """
    kind = value.dtype.kind
    if kind in "mM":
        fix = "give str() of it, or a number under a key that names the unit"
        raise TypeError(f"{value.dtype} would lose its unit; {fix}")
    if kind == "V":
        raise TypeError(f"NumPy data of type {value.dtype} would lose its fields; give a dict with a list for each field")
    if type(value).__module__.startswith("numpy.ma"):
        raise TypeError("a masked array would lose its mask; give .filled(...) or, with None for what is masked, .tolist()")
    return value


class _Plain:
    """What the scanner asks a decoder for: nothing but what JSON gives back by itself."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int = float, int
    parse_constant = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}.__getitem__


def _whole(text: str) -> int:
    """Return the whole number of a text, also of one with more digits than this process converts at once."""
    if len(text) > MOST_DIGITS:  # the time grows with the square
        raise ValueError(f"a whole number of {len(text)} digits, of which {MOST_DIGITS} are read")
    if len(text) <= _DIGITS_AT_ONCE:
        return int(text)
    value = 0
    digits = text.lstrip("-")
    for start in range(0, len(digits), _DIGITS_AT_ONCE):
        part = digits[start : start + _DIGITS_AT_ONCE]
        value = value * 10 ** len(part) + int(part)
    return -value if text[0] == "-" else value


def _encoder(*, ascii: bool = False, sort_keys: bool = False) -> Callable[[Any], str]:
    """Return what encodes; made once, because json.dumps() makes a new one for each call, which doubles the cost."""
    if make_encoder is None:
        import json

        return json.JSONEncoder(
            ensure_ascii=ascii, check_circular=False, sort_keys=sort_keys, separators=(",", ":"), default=_from_numpy
        ).encode
    strings = encode_basestring_ascii if ascii else encode_basestring
    # None: what contains itself is found by the depth of the recursion, without a note of every container.
    parts = make_encoder(None, _from_numpy, strings, None, ":", ",", sort_keys, False, True)
    return lambda value: "".join(parts(value, 0))


def _decoder() -> Callable[[str], Any]:
    """Return what decodes: json.loads(), done by its own scanner wherever that is enough."""

    def loads(text: str) -> Any:
        import json

        return json.loads(text, parse_int=_whole)

    if make_encoder is None:
        return loads
    scan = make_scanner(_Plain)  # type: ignore[arg-type]

    def decode(text: str) -> Any:
        try:
            value, end = scan(text, 0)
        except (StopIteration, ValueError):
            return loads(text)  # for its error, or for a number of many digits
        return value if end == len(text) else loads(text)  # white space, or an error

    return decode


_encode = _encoder()
_encode_ascii = _encoder(ascii=True)
_encode_sorted = _encoder(sort_keys=True)
decode = _decoder()

_CONTAINERS = (dict, list, tuple)
_LONGEST = 250_000_000  # characters of four bytes at most; a database takes a billion bytes
_DEEPEST = 200  # levels of containers that are written, whatever the Python and however deep the stack of calls
_READABLE = _DEEPEST + 64  # that are read: an array of NumPy's, of 64 dimensions at most, counts as one when it is written


def encode(value: Any, what: str) -> str:
    """Write a value as JSON text, dict keys in the order given.

    Args:
        value: What to write. Dict keys become strings and tuples lists; NumPy scalars and arrays become numbers and lists.
        what: What the value is, for the error ("args of evaluation '17'").

    Returns:
        Text that UTF-8 can carry, without line breaks.

    Raises:
        UnserializableError: the value has something JSON has no form for, would come back as another value, is nested more
            than 200 levels deep, contains itself, or has two keys of one text.
    """
    try:
        if type(value) is int:  # the commonest args of a big space; three times as quick this way
            return int.__repr__(value)
        if _has_other_keys(value):
            value = _with_string_keys(value)
        try:
            text = _encode(value)
        except _ObjectArray:
            text = _encode(value := _with_string_keys(value))
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:  # a lone surrogate, which only an escape can carry
                _refuse_pairs(text)
                text = _encode_ascii(value)
        if len(text) > _LONGEST:
            raise ValueError(f"{len(text) / 1e6:.0f} MB are too many; write it to a file and give the file's name instead")
        return text
    except RecursionError:
        raise UnserializableError(what, "the stack of calls is too deep for it; call speval from fewer calls") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise UnserializableError(what, str(error)) from error


def _refuse_pairs(text: str) -> None:
    """Refuse two lone surrogates that stand side by side: escaped, they would come back as one character."""
    was_high = False
    for c in text:
        if was_high and "\udc00" <= c <= "\udfff":
            raise ValueError(
                "it has a surrogate pair as two characters; text.encode('utf-16', 'surrogatepass').decode('utf-16')"
            )
        was_high = "\ud800" <= c <= "\udbff"


def _has_other_keys(value: Any, deepest: int = _DEEPEST) -> bool:
    """Tell whether a dict somewhere in the value has a key that is no plain string.

    Raises:
        ValueError: containers are nested too deeply.
    """
    # The encoder itself turns 1 into "1", but silently drops one of {1: a, "1": b}.
    if not isinstance(value, _CONTAINERS):
        return False
    has_other = isinstance(value, dict) and any(type(key) is not str for key in value)
    path = [iter(value.values() if isinstance(value, dict) else value)]
    while path:
        for item in path[-1]:
            if isinstance(item, _CONTAINERS):
                if len(path) == deepest:
                    raise ValueError(f"it is nested too deeply, more than {deepest} levels, or contains itself")
                if isinstance(item, dict):
                    has_other = has_other or any(type(key) is not str for key in item)
                    path.append(iter(item.values()))
                else:
                    path.append(iter(item))
                break
        else:
            path.pop()
    return has_other


def _with_string_keys(value: Any, depth: int = 1) -> Any:
    """Return a copy of the value with every dict key a string and every array of objects a list."""
    if not isinstance(value, _CONTAINERS):
        if not (_is_numpy(value) and value.dtype.kind == "O"):
            return value
        value = _lossless(value).tolist()
    if depth > _DEEPEST:
        raise ValueError(f"it is nested too deeply, more than {_DEEPEST} levels, or contains itself")
    if isinstance(value, dict):
        copy: dict[str, Any] = {}
        for key, item in value.items():
            text = _key_text(key)
            if text in copy:
                raise ValueError(f"two of its keys are {text!r} once they are strings")
            copy[text] = _with_string_keys(item, depth + 1)
        return copy
    if isinstance(value, list | tuple):
        return [_with_string_keys(item, depth + 1) for item in value]
    return value


def _key_text(key: Any) -> str:
    if isinstance(key, str):
        return str.__str__(key)  # what it holds, which is what the encoder writes of a value: an enum calls itself otherwise
    if not isinstance(key, int | float | None):
        plain = _lossless(key).tolist() if _is_numpy(key) else None
        if not isinstance(plain, int | float):
            raise TypeError(f"a dict key of type {type(key).__qualname__} is no string")
        key = plain
    text: str = _encode(key)
    return text


def read(text: str) -> Any:
    """Decode what is stored.

    Raises:
        TypeError: it is no text.
        ValueError: it is no JSON, or nested deeper than anything that ``encode`` writes.
    """
    try:
        value = decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if text.count("[") + text.count("{") > _READABLE:
        _has_other_keys(value, _READABLE)
    return value


def same(one: str, other: str) -> bool:
    """Tell whether two JSON texts stand for the same value; the order of keys and white space don't count, 1 is not 1.0."""
    return one == other or _encode_sorted(read(one)) == _encode_sorted(read(other))
