"""Evaluate a function over many arguments, in parallel, and never lose an answer.

Owns the names users import. Invariant: importing it is quick and starts nothing; a name's module is imported when the name
is first used.
"""

from __future__ import annotations

from .errors import (
    ArgsChangedError,
    CalledInWorkerError,
    DatabaseError,
    DatabaseLockedError,
    DatabaseMissingError,
    DatabaseNotEmptyError,
    DatabaseUnavailableError,
    EvaluationsFailed,
    ExecutorError,
    ForeignDatabaseError,
    FunctionError,
    InProgressError,
    MissingExtraError,
    NewerSchemaError,
    OptionError,
    SpaceError,
    SpevalError,
    SystemLimitError,
    UnknownNameError,
    UnserializableError,
)

TYPE_CHECKING = False  # type checkers read it as True; importing typing would double the time of this import
if TYPE_CHECKING:
    from . import aio
    from .database import Database
    from .flat import to_frame
    from .model import Evaluation, Summary
    from .sync import as_completed, load_evals, retry, speval

__all__ = [
    "ArgsChangedError",
    "CalledInWorkerError",
    "Database",
    "DatabaseError",
    "DatabaseLockedError",
    "DatabaseMissingError",
    "DatabaseNotEmptyError",
    "DatabaseUnavailableError",
    "Evaluation",
    "EvaluationsFailed",
    "ExecutorError",
    "ForeignDatabaseError",
    "FunctionError",
    "InProgressError",
    "MissingExtraError",
    "NewerSchemaError",
    "OptionError",
    "SpaceError",
    "SpevalError",
    "Summary",
    "SystemLimitError",
    "UnknownNameError",
    "UnserializableError",
    "aio",
    "as_completed",
    "load_evals",
    "retry",
    "speval",
    "to_frame",
]

__version__ = "1.0.0.dev0"

_MODULES = {
    "Database": "database",
    "Evaluation": "model",
    "Summary": "model",
    "as_completed": "sync",
    "load_evals": "sync",
    "retry": "sync",
    "speval": "sync",
    "to_frame": "flat",
}

if not TYPE_CHECKING:  # type checkers would take every name for one of ours

    def __getattr__(name: str) -> object:
        """Return a public name whose module is not imported yet."""
        from importlib import import_module

        if name == "aio":
            return import_module(".aio", __name__)
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
