"""Values to JSON text and back.

Owns the stored form of args and results. Invariant: ``decode(encode(x))`` is the same for every worker and every call: a
function always gets decoded JSON. NaN and infinities are preserved, which the JSON standard does not require.
"""

from __future__ import annotations

from .errors import UnserializableError

# Importing json imports re, which takes nearly as long as starting the interpreter of a worker process. _json is json's C part.
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
    """The value contains an array of Python objects; the keys of their dicts need the same check as other keys."""


def _from_numpy(value: Any) -> Any:
    """Convert a value that the JSON encoder does not support.

    Raises:
        TypeError: the value has no JSON form, or the conversion would lose information.
    """
    # This does not import NumPy: a caller that passes an array has imported it.
    if _is_numpy(value):
        if value.dtype.kind == "O":
            raise _ObjectArray
        plain = _lossless(value).tolist()
        if type(plain) is not type(value):
            return plain
    supported = "dict, list, tuple, str, int, float, bool, None and NumPy data"
    raise TypeError(f"{type(value).__qualname__} is not supported; supported are {supported}")


def _is_numpy(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist") and hasattr(value, "dtype")


def _lossless(value: Any) -> Any:
    """Return the NumPy value if a list or a number can represent it.

    Raises:
        TypeError: the conversion would lose information.
    """
    kind = value.dtype.kind
    if kind in "mM":
        fix = "use str() of it, or a number under a key that names the unit"
        raise TypeError(f"{value.dtype} would lose its unit; {fix}")
    if kind == "V":
        raise TypeError(f"NumPy data of type {value.dtype} would lose its fields; use a dict with a list for each field")
    if type(value).__module__.startswith("numpy.ma"):
        raise TypeError("a masked array would lose its mask; use .filled(...), or .tolist(), which has None for masked items")
    return value


class _Plain:
    """The settings that the scanner reads from a decoder: plain JSON."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int = float, int
    parse_constant = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}.__getitem__


def _whole(text: str) -> int:
    """Return the whole number of a text, also with more digits than this process converts at once."""
    if len(text) > MOST_DIGITS:  # the time grows with the square
        raise ValueError(f"a whole number of {len(text)} digits is too long; the limit is {MOST_DIGITS}")
    if len(text) <= _DIGITS_AT_ONCE:
        return int(text)
    value = 0
    digits = text.lstrip("-")
    for start in range(0, len(digits), _DIGITS_AT_ONCE):
        part = digits[start : start + _DIGITS_AT_ONCE]
        value = value * 10 ** len(part) + int(part)
    return -value if text[0] == "-" else value


def _encoder(*, ascii: bool = False, sort_keys: bool = False) -> Callable[[Any], str]:
    """Return an encode function; created once, because json.dumps() creates an encoder per call, which doubles the cost."""
    if make_encoder is None:
        import json

        return json.JSONEncoder(
            ensure_ascii=ascii, check_circular=False, sort_keys=sort_keys, separators=(",", ":"), default=_from_numpy
        ).encode
    strings = encode_basestring_ascii if ascii else encode_basestring
    # None: no check for cycles; a value that contains itself exceeds the recursion limit.
    parts = make_encoder(None, _from_numpy, strings, None, ":", ",", sort_keys, False, True)
    return lambda value: "".join(parts(value, 0))


def _decoder() -> Callable[[str], Any]:
    """Return a decode function: json.loads() without its overhead for common texts."""

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
            return loads(text)  # raises the error, or reads a number of many digits
        return value if end == len(text) else loads(text)  # trailing white space, or an error

    return decode


_encode = _encoder()
_encode_ascii = _encoder(ascii=True)
_encode_sorted = _encoder(sort_keys=True)
decode = _decoder()

_CONTAINERS = (dict, list, tuple)
_LONGEST = 250_000_000  # characters of four bytes at most; a database takes a billion bytes
_DEEPEST = 200  # levels of containers that are written; the limit is the same for every Python and every depth of calls
_READABLE = _DEEPEST + 64  # levels that are read: a NumPy array has up to 64 dimensions and counts as one level when written


def encode(value: Any, what: str) -> str:
    """Write a value as JSON text, dict keys in the order given.

    Args:
        value: The value. Dict keys become strings and tuples lists; NumPy scalars and arrays become numbers and lists.
        what: A description of the value for the error ("args of evaluation '17'").

    Returns:
        Text that UTF-8 can encode, without line breaks.

    Raises:
        UnserializableError: the value has no JSON form, would be a different value when decoded, is nested more than 200
            levels deep, contains itself, or has two keys that become the same string.
    """
    try:
        if type(value) is int:  # a shortcut for the most common args of a large space: three times as fast
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
            except UnicodeEncodeError:  # a lone surrogate, which must be escaped
                _refuse_pairs(text)
                text = _encode_ascii(value)
        if len(text) > _LONGEST:
            raise ValueError(f"{len(text) / 1e6:.0f} MB are too large; write the data to a file and return the file's name")
        return text
    except RecursionError:
        raise UnserializableError(what, "the call stack is too deep; call speval from fewer nested calls") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise UnserializableError(what, str(error)) from error


def _refuse_pairs(text: str) -> None:
    """Refuse two adjacent lone surrogates: when escaped, they would be decoded as one character."""
    was_high = False
    for c in text:
        if was_high and "\udc00" <= c <= "\udfff":
            raise ValueError(
                "the text has a surrogate pair as two characters; "
                "repair it with text.encode('utf-16', 'surrogatepass').decode('utf-16')"
            )
        was_high = "\ud800" <= c <= "\udbff"


def _has_other_keys(value: Any, deepest: int = _DEEPEST) -> bool:
    """Tell whether a dict anywhere in the value has a key that is not a plain string.

    Raises:
        ValueError: containers are nested too deeply.
    """
    # The encoder converts the key 1 to "1", but silently drops one item of {1: a, "1": b}.
    if not isinstance(value, _CONTAINERS):
        return False
    has_other = isinstance(value, dict) and any(type(key) is not str for key in value)
    path = [iter(value.values() if isinstance(value, dict) else value)]
    while path:
        for item in path[-1]:
            if isinstance(item, _CONTAINERS):
                if len(path) == deepest:
                    raise ValueError(f"the value is nested more than {deepest} levels deep, or contains itself")
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
        raise ValueError(f"the value is nested more than {_DEEPEST} levels deep, or contains itself")
    if isinstance(value, dict):
        copy: dict[str, Any] = {}
        for key, item in value.items():
            text = _key_text(key)
            if text in copy:
                raise ValueError(f"two dict keys become the same string {text!r}")
            copy[text] = _with_string_keys(item, depth + 1)
        return copy
    if isinstance(value, list | tuple):
        return [_with_string_keys(item, depth + 1) for item in value]
    return value


def _key_text(key: Any) -> str:
    if isinstance(key, str):
        return str.__str__(key)  # the value itself, as the encoder writes it: str() of an enum member is something else
    if not isinstance(key, int | float | None):
        plain = _lossless(key).tolist() if _is_numpy(key) else None
        if not isinstance(plain, int | float):
            raise TypeError(f"a dict key must be a string or a number, not {type(key).__qualname__}")
        key = plain
    text: str = _encode(key)
    return text


def read(text: str) -> Any:
    """Decode stored JSON.

    Raises:
        TypeError: the value is not text.
        ValueError: the text is not JSON, or is nested deeper than ``encode`` allows.
    """
    try:
        value = decode(text)
    except RecursionError:
        raise ValueError("the value is nested too deeply") from None
    if text.count("[") + text.count("{") > _READABLE:
        _has_other_keys(value, _READABLE)
    return value


def same(one: str, other: str) -> bool:
    """Tell whether two JSON texts have the same value; the order of keys and white space are ignored, 1 and 1.0 differ."""
    return one == other or _encode_sorted(read(one)) == _encode_sorted(read(other))
