"""The errors speval raises.

Owns every exception type and its text. Invariant: each one survives pickling, because its constructor takes exactly
the values it hands to ``super().__init__`` and the text is built from them in ``__str__``.
"""

from __future__ import annotations

from .escape import visible

TYPE_CHECKING = False  # worker processes import this module, and typing takes longer than all of it
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ArgsChangedError",
    "CalledInWorkerError",
    "DatabaseError",
    "DatabaseLockedError",
    "DatabaseMissingError",
    "DatabaseNotEmptyError",
    "DatabaseUnavailableError",
    "EvaluationDamagedError",
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
    "StoreClosedError",
    "SystemLimitError",
    "UnknownNameError",
    "UnserializableError",
]


class SpevalError(Exception):
    """The root of everything speval raises on purpose."""


class OptionError(SpevalError, ValueError):
    """A call got an argument with an invalid value."""

    def __init__(self, option: str, value: str, expected: str) -> None:
        super().__init__(option, value, expected)
        self.option, self.value, self.expected = option, value, expected

    def __str__(self) -> str:
        return f"invalid {self.option}={self.value}: {self.expected}"


class FunctionError(SpevalError, TypeError):
    """The function can't run in worker processes."""

    def __init__(self, function: str, problem: str) -> None:
        super().__init__(function, problem)
        self.function, self.problem = function, problem

    def __str__(self) -> str:
        return f"{self.function} can't run in worker processes: {self.problem}\nexecutor='thread' runs it in this process"


class ExecutorError(SpevalError, RuntimeError):
    """The executor object that the caller passed accepts no more calls."""

    def __init__(self, executor: str, problem: str) -> None:
        super().__init__(executor, problem)
        self.executor, self.problem = executor, problem

    def __str__(self) -> str:
        return f"executor={self.executor} accepts no more calls ({self.problem}); recorded results are safe; pass a new one"


class CalledInWorkerError(SpevalError, RuntimeError):
    """A module that a worker process imports called speval."""

    def __init__(self, call: str) -> None:
        super().__init__(call)
        self.call = call

    def __str__(self) -> str:
        return (
            f"a worker process imports this module for the function, and the module calls {self.call}() at its top level; "
            'a worker process does not start a second run. Move the call into a function, or under if __name__ == "__main__"'
        )


class SystemLimitError(SpevalError, RuntimeError):
    """The system starts no more threads."""

    def __init__(self, thread: str) -> None:
        super().__init__(thread)
        self.thread = thread

    def __str__(self) -> str:
        return f"can't start {self.thread}: the system allows no more threads; raise `ulimit -u`, or the container's pids limit"


class SpaceError(SpevalError, ValueError):
    """The eval space is invalid: a name has the wrong type, or two evaluations have the same name."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"evaluation {self.name}: {self.problem}"


class UnserializableError(SpevalError, TypeError):
    """A value can't be written as JSON."""

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(what, problem)
        self.what, self.problem = what, problem

    def __str__(self) -> str:
        return f"{self.what} can't be written as JSON: {self.problem}"


class ArgsChangedError(SpevalError):
    """The database has evaluations with the same names and different args."""

    def __init__(self, db: str, count: int, examples: Sequence[tuple[str, str, str]]) -> None:
        super().__init__(db, count, examples)
        self.db, self.count, self.examples = db, count, examples

    def __str__(self) -> str:
        lines = "\n".join(
            f"  {name!r}: stored {visible(stored)}, now {visible(given)}" for name, stored, given in self.examples
        )
        more = "" if self.count <= len(self.examples) else f"\n  and {self.count - len(self.examples)} more"
        noun = "evaluation has" if self.count == 1 else "evaluations have"
        return (
            f"{self.db}: {self.count} {noun} different args in the database and in the eval space; nothing was changed:\n"
            f"{lines}{more}\nA random space needs a fixed seed. A list may grow only at its end, a dict anywhere. Or pass "
            'on_changed="keep" to continue with the stored args, or on_changed="rerun" to evaluate these again with the new '
            "args, or use another database."
        )


class DatabaseError(SpevalError):
    """The database can't be used in its present state."""

    def __init__(self, db: str, problem: str) -> None:
        super().__init__(db, problem)
        self.db, self.problem = db, problem

    def __str__(self) -> str:
        return visible(f"{self.db}: {self.problem}")


class DatabaseMissingError(DatabaseError, FileNotFoundError):
    """The database does not exist."""

    def __init__(self, db: str) -> None:
        super().__init__(db, "this database does not exist; speval() creates a database, reading does not")
        self.args = (db,)


class DatabaseLockedError(DatabaseError, TimeoutError):
    """Another program kept the database locked for too long."""

    def __init__(self, db: str, seconds: float) -> None:
        super().__init__(
            db, f"another program has locked the database for {seconds:.0f} s; find it with `fuser {db}`, then try again"
        )
        self.args = (db, seconds)


class EvaluationDamagedError(DatabaseError):
    """The stored data of one evaluation is corrupt."""

    def __init__(self, db: str, name: str, problem: str) -> None:
        fix = f"`speval drop {db} NAME` deletes it, `speval salvage {db} NEW` saves all others"
        super().__init__(db, f"evaluation {name!r} is damaged: {problem}; {fix}")
        self.args = (db, name, problem)
        self.name, self.what = name, problem


class DatabaseNotEmptyError(DatabaseError):
    """The target of a copy already has evaluations."""

    def __init__(self, db: str) -> None:
        super().__init__(db, "this database already has evaluations and was not changed; copy to a new database")
        self.args = (db,)


class DatabaseUnavailableError(DatabaseError):
    """The database can't be read or written at the moment: a full disk, an I/O error."""


class ForeignDatabaseError(DatabaseError):
    """The file is not a speval database."""

    def __init__(self, db: str, found: str) -> None:
        super().__init__(db, f"this is not a speval database but {found}; it was not changed. Choose another name")
        self.args = (db, found)


class NewerSchemaError(DatabaseError):
    """A later release of speval wrote the database."""

    def __init__(self, db: str, schema: int, known: int, release: str) -> None:
        super().__init__(
            db,
            f"the database has schema version {schema}, and this release of speval reads versions up to {known}; it was not "
            f"changed. Install a newer release: pip install 'speval>={release}'",
        )
        self.args = (db, schema, known, release)


class MissingExtraError(SpevalError, ImportError):
    """A feature needs a package that is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(what, package, extra)
        self.what, self.package, self.extra = what, package, extra

    def __str__(self) -> str:
        return f"{self.what} needs {self.package}: pip install 'speval[{self.extra}]'"


class StoreClosedError(SpevalError, RuntimeError):
    """A closed store was used."""

    def __init__(self, db: str) -> None:
        super().__init__(db)
        self.db = db

    def __str__(self) -> str:
        return f"{self.db}: this store is closed"


class UnknownNameError(SpevalError, KeyError):
    """The database has no evaluation with this name."""

    def __init__(self, db: str, names: Sequence[str]) -> None:
        super().__init__(db, names)
        self.db, self.names = db, names

    def __str__(self) -> str:
        names = ", ".join(repr(name) for name in self.names[:5])
        more = "" if len(self.names) <= 5 else f" and {len(self.names) - 5} more"
        return f"{self.db}: no evaluation is named {names}{more}; load_evals() and `speval ls` list the names"


class InProgressError(SpevalError):
    """Evaluations in progress can't be dropped."""

    def __init__(self, db: str, names: Sequence[str]) -> None:
        super().__init__(db, names)
        self.db, self.names = db, names

    def __str__(self) -> str:
        names = ", ".join(repr(name) for name in self.names[:5])
        more = "" if len(self.names) <= 5 else f" and {len(self.names) - 5} more"
        return f"{self.db}: in progress: {names}{more}; nothing was dropped. Wait until they end, or stop the workers"


class EvaluationsFailed(SpevalError):
    """Raised by ``Summary.raise_for_failures()`` when evaluations failed."""

    def __init__(self, failed: int, total: int, causes: str) -> None:
        super().__init__(failed, total, causes)
        self.failed, self.total, self.causes = failed, total, causes

    def __str__(self) -> str:
        return (
            f"{self.failed} of {self.total} evaluations failed ({self.causes}); "
            'load_evals(db, status="failed") returns their errors, retry(db) makes them pending again'
        )
