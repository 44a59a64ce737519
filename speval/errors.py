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
    """An argument of a call has a value that can't be used."""

    def __init__(self, option: str, value: str, expected: str) -> None:
        super().__init__(option, value, expected)
        self.option, self.value, self.expected = option, value, expected

    def __str__(self) -> str:
        return f"{self.option}={self.value} can't be used: {self.expected}"


class FunctionError(SpevalError, TypeError):
    """The function can't run in other processes."""

    def __init__(self, function: str, problem: str) -> None:
        super().__init__(function, problem)
        self.function, self.problem = function, problem

    def __str__(self) -> str:
        return f"{self.function} can't run in processes of its own: {self.problem}\nexecutor='thread' runs it in this process"


class ExecutorError(SpevalError, RuntimeError):
    """The executor that was handed in takes no more calls."""

    def __init__(self, executor: str, problem: str) -> None:
        super().__init__(executor, problem)
        self.executor, self.problem = executor, problem

    def __str__(self) -> str:
        return f"executor={self.executor} takes no more calls ({self.problem}); what is recorded stays; make a new one"


class CalledInWorkerError(SpevalError, RuntimeError):
    """speval was called by a module that a worker process imports."""

    def __init__(self, call: str) -> None:
        super().__init__(call)
        self.call = call

    def __str__(self) -> str:
        return (
            f"{self.call}() is called at the top level of a module that a worker process has to import for the function; it is "
            'not started again there. Put the call into a function, or under if __name__ == "__main__"'
        )


class SystemLimitError(SpevalError, RuntimeError):
    """The system starts no more threads."""

    def __init__(self, thread: str) -> None:
        super().__init__(thread)
        self.thread = thread

    def __str__(self) -> str:
        return (
            f"{self.thread} can't be started: the system allows no more threads (`ulimit -u`, or the pids limit of a container)"
        )


class SpaceError(SpevalError, ValueError):
    """The eval space can't be used: a name that is no name, or one that stands for two evaluations."""

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
    """The database holds evaluations of the same names with other args."""

    def __init__(self, db: str, count: int, examples: Sequence[tuple[str, str, str]]) -> None:
        super().__init__(db, count, examples)
        self.db, self.count, self.examples = db, count, examples

    def __str__(self) -> str:
        shown = "\n".join(
            f"  {name!r}: stored {visible(stored)}, now {visible(given)}" for name, stored, given in self.examples
        )
        more = "" if self.count <= len(self.examples) else f"\n  and {self.count - len(self.examples)} more"
        noun = "evaluation is" if self.count == 1 else "evaluations are"
        return (
            f"{self.db}: {self.count} {noun} stored with other args than the eval space has now; nothing was changed:\n"
            f"{shown}{more}\nA random space needs a fixed seed; a list may grow at its end only, a dict anywhere. Otherwise, "
            'pass on_changed="keep" to go on with the stored args, on_changed="rerun" to evaluate these again with the new '
            "ones, or use another database."
        )


class DatabaseError(SpevalError):
    """The database can't be used as it is."""

    def __init__(self, db: str, problem: str) -> None:
        super().__init__(db, problem)
        self.db, self.problem = db, problem

    def __str__(self) -> str:
        return visible(f"{self.db}: {self.problem}")


class DatabaseMissingError(DatabaseError, FileNotFoundError):
    """There is no database of that name."""

    def __init__(self, db: str) -> None:
        super().__init__(db, "there is no such database; speval() creates it, reading does not")
        self.args = (db,)


class DatabaseLockedError(DatabaseError, TimeoutError):
    """Another program held the database for too long."""

    def __init__(self, db: str, seconds: float) -> None:
        super().__init__(db, f"locked by another program for {seconds:.0f} s; find it with `fuser {db}` and try again")
        self.args = (db, seconds)


class EvaluationDamagedError(DatabaseError):
    """One evaluation in the database is not as it was written."""

    def __init__(self, db: str, name: str, problem: str) -> None:
        fix = f"`speval drop {db} NAME` forgets it, `speval salvage {db} NEW` saves all the others"
        super().__init__(db, f"evaluation {name!r} is damaged: {problem}; {fix}")
        self.args = (db, name, problem)
        self.name, self.what = name, problem


class DatabaseNotEmptyError(DatabaseError):
    """Something was to be copied to a database that has evaluations already."""

    def __init__(self, db: str) -> None:
        super().__init__(db, "has evaluations already, and was left as it is; copy to a new one")
        self.args = (db,)


class DatabaseUnavailableError(DatabaseError):
    """The database can't be read or written just now: a full disk, an input or output error."""


class ForeignDatabaseError(DatabaseError):
    """The file is something else than a database of speval."""

    def __init__(self, db: str, found: str) -> None:
        super().__init__(db, f"not a database of speval but {found}; it was left as it is. Choose another name")
        self.args = (db, found)


class NewerSchemaError(DatabaseError):
    """A later release of speval wrote the database."""

    def __init__(self, db: str, schema: int, known: int, release: str) -> None:
        super().__init__(
            db,
            f"has schema {schema}, this release of speval reads up to {known}; it was left as it is. "
            f"Install the one it needs: pip install 'speval>={release}'",
        )
        self.args = (db, schema, known, release)


class MissingExtraError(SpevalError, ImportError):
    """Something wants a package that is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(what, package, extra)
        self.what, self.package, self.extra = what, package, extra

    def __str__(self) -> str:
        return f"{self.what} needs {self.package}: pip install 'speval[{self.extra}]'"


class StoreClosedError(SpevalError, RuntimeError):
    """A store was used after it had been closed."""

    def __init__(self, db: str) -> None:
        super().__init__(db)
        self.db = db

    def __str__(self) -> str:
        return f"{self.db}: used after it had been closed"


class UnknownNameError(SpevalError, KeyError):
    """No evaluation of that name is in the database."""

    def __init__(self, db: str, names: Sequence[str]) -> None:
        super().__init__(db, names)
        self.db, self.names = db, names

    def __str__(self) -> str:
        shown = ", ".join(repr(name) for name in self.names[:5])
        more = "" if len(self.names) <= 5 else f" and {len(self.names) - 5} more"
        return f"{self.db}: no evaluation is named {shown}{more}; load_evals() and `speval ls` list the names"


class InProgressError(SpevalError):
    """Evaluations that a worker holds can't be dropped."""

    def __init__(self, db: str, names: Sequence[str]) -> None:
        super().__init__(db, names)
        self.db, self.names = db, names

    def __str__(self) -> str:
        shown = ", ".join(repr(name) for name in self.names[:5])
        more = "" if len(self.names) <= 5 else f" and {len(self.names) - 5} more"
        return f"{self.db}: in progress: {shown}{more}; nothing was dropped. Wait for their end, or stop the workers"


class EvaluationsFailed(SpevalError):
    """Raised by ``Summary.raise_for_failures()`` when evaluations failed."""

    def __init__(self, failed: int, total: int, causes: str) -> None:
        super().__init__(failed, total, causes)
        self.failed, self.total, self.causes = failed, total, causes

    def __str__(self) -> str:
        return (
            f"{self.failed} of {self.total} evaluations failed ({self.causes}); "
            'load_evals(db, status="failed") has their errors, retry(db) puts them back'
        )
