"""The options of a call, validated.

Owns the allowed values of each option. Invariant: an ``Options`` object is valid, so later code does not check again.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import Executor as FutureExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import OptionError
from .escape import shown_number
from .model import LONGEST_LEASE, MOST_CONCURRENCY, Durability, OnChanged, Status
from .url import PostgresUrl, is_conninfo, is_postgres

__all__ = ["ExecutorOption", "Location", "Options", "checked_database", "checked_names", "checked_retry", "checked_status"]

Location = Path | PostgresUrl  # a validated database argument
_DATABASES = "the path of a SQLite file, or a postgresql:// URL"
ExecutorOption = Literal["auto", "coroutine", "thread", "process"] | FutureExecutor


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of ``speval`` and ``as_completed``; the docstring of ``speval`` explains them."""

    timeout: float | None = None
    concurrency: int = 1
    executor: ExecutorOption = "auto"
    max_attempts: int = 3
    retry_on: tuple[type[BaseException], ...] = ()
    backoff: float = 1.0
    lease: float = 30.0
    on_changed: OnChanged = "error"
    wait: bool = True
    max_failures: int | float | None = None
    durability: Durability = "process"
    progress: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "retry_on", _exception_types(self.retry_on))
        if self.timeout is not None:
            _number("timeout", self.timeout, "seconds above 0, or None for no limit", above=0)
        _whole("concurrency", self.concurrency, most=MOST_CONCURRENCY)
        if not isinstance(self.executor, FutureExecutor):
            _one_of("executor", self.executor, ("auto", "coroutine", "thread", "process"))
        _whole("max_attempts", self.max_attempts)
        _number("backoff", self.backoff, "seconds, 0 or more", least=0)
        _number("lease", self.lease, "seconds, from 1 to 86400 (a day)", least=1, most=LONGEST_LEASE)
        _one_of("on_changed", self.on_changed, get_args(OnChanged))
        _one_of("wait", self.wait, (True, False))
        _one_of("progress", self.progress, (True, False, None))
        _one_of("durability", self.durability, get_args(Durability))
        if isinstance(self.max_failures, float):
            _number("max_failures", self.max_failures, "a fraction between 0 and 1, or a whole number", above=0)
            if self.max_failures > 1:
                raise OptionError("max_failures", repr(self.max_failures), "a fraction is at most 1.0; a count is an int")
        elif self.max_failures is not None:
            _whole("max_failures", self.max_failures)

    def failure_limit(self, evaluations: int | None) -> int | None:
        """Return the number of failures at which the run stops, or None for no limit.

        Args:
            evaluations: The size of the eval space; None if it is unknown (a lazy space).

        Raises:
            OptionError: ``max_failures`` is a fraction and the size of the space is unknown.
        """
        if isinstance(self.max_failures, float):
            if evaluations is None:
                expected = "a fraction needs a space of known size, and this space is lazy; pass a whole number"
                raise OptionError("max_failures", repr(self.max_failures), expected)
            return max(1, math.ceil(self.max_failures * evaluations))
        return self.max_failures


def checked_database(db: Any) -> Location:
    """Return the validated database argument; the database need not exist."""
    if isinstance(db, PostgresUrl):
        return db
    if not isinstance(db, str | os.PathLike):
        raise OptionError("db", repr(db)[:60], _DATABASES)
    text = os.fspath(db)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if not text or "\0" in text:
        raise OptionError("db", repr(text), _DATABASES)
    if is_postgres(text):
        return PostgresUrl.parse(text)
    if is_conninfo(text):
        raise OptionError("db", "'host=... dbname=...'", "write it as a URL: postgresql://USER@HOST:PORT/DBNAME")
    if text == ":memory:" or text.startswith("file:"):
        raise OptionError("db", repr(text), "name a file: other workers and later runs need it")
    if "://" in text:
        raise OptionError("db", repr(text.partition("://")[0] + "://..."), _DATABASES)
    # Absolute, because the function may change the current folder.
    return Path(text).expanduser().absolute()


def checked_status(status: Any, allowed: tuple[Status | None, ...]) -> None:
    """Raise OptionError unless ``status`` is one of ``allowed``."""
    _one_of("status", status, allowed)


def checked_retry(db: Any, names: Any, status: Any) -> tuple[Location, list[str] | None]:
    """Return the validated arguments of ``retry``."""
    location = checked_database(db)
    checked_status(status, ("failed", "completed"))
    return location, checked_names(names)


def checked_names(names: Any) -> list[str] | None:
    """Return names as a list, or None; a single text is refused, since it is an iterable of its characters."""
    if isinstance(names, str):
        raise OptionError("names", repr(names)[:60], "a list of names, not a single one")
    return None if names is None else [str(name) for name in names]


def _exception_types(value: Any) -> tuple[type[BaseException], ...]:
    types = (value,) if isinstance(value, type) else tuple(value) if isinstance(value, tuple | list) else None
    if types is None or not all(isinstance(t, type) and issubclass(t, Exception) for t in types):
        raise OptionError("retry_on", repr(value)[:60], "an exception type, or a tuple of them")
    return types


def _whole(option: str, value: Any, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        text = shown_number(value) if isinstance(value, int) else repr(value)[:60]
        raise OptionError(option, text, f"a whole number{', 1 or more' if most is None else f' from 1 to {most}'}")


def _number(
    option: str, value: Any, expected: str, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= above or not least <= value <= most:
        raise OptionError(option, repr(value)[:60], expected)


def _one_of(option: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        raise OptionError(option, repr(value)[:60], f"one of {', '.join(repr(a) for a in allowed)}")
