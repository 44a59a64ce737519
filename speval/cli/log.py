"""Log output of ``speval run``.

Owns the handler that prints warnings. Invariant: text from the user's function never reaches the terminal as an escape
sequence.
"""

from __future__ import annotations

import logging

from ..model import Summary
from .format import escaped

__all__ = ["show_warnings"]


class _Shown(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record), lines=True)


def show_warnings() -> None:
    """Print warnings and errors of speval to stderr."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_Shown("%(message)s"))
    # The command prints the summary itself.
    handler.addFilter(lambda record: not (isinstance(record.args, tuple) and any(isinstance(a, Summary) for a in record.args)))
    logging.getLogger("speval").addHandler(handler)
