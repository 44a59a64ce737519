"""Evaluate a function over many arguments, in parallel, and never lose an answer.

Owns the names users import. Invariant: importing it is quick and starts nothing.
"""

from __future__ import annotations

from . import aio
from .database import Database
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
