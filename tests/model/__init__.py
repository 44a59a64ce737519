"""A store against a model of it in plain Python, under everything that workers do to each other.

Several copies of a script, each with connections and clocks of its own, seed, claim, record, stall, wake up late and die on
one real database, in an order that Hypothesis makes up. The model says what each step has to bring; after each step the
database has to hold what the model says, and at the end one worker alone has to bring everything to an end.
"""

from .kinds import PostgresKind, SqliteKind
from .workers import Workers, run_workers

__all__ = ["PostgresKind", "SqliteKind", "Workers", "run_workers"]
