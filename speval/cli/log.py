"""What the log says on a terminal.

Owns the handler that ``speval run`` shows warnings with. Invariant: no text of the user's function reaches the terminal as an
escape sequence.
"""

from __future__ import annotations

import logging

from ..model import Summary
from .format import shown

__all__ = ["show_warnings"]


class _Shown(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record), lines=True)


def show_warnings() -> None:
    """Print warnings and errors of speval to stderr."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_Shown("%(message)s"))
    # The command prints the summary itself.
    handler.addFilter(lambda record: not (isinstance(record.args, tuple) and any(isinstance(a, Summary) for a in record.args)))
    logging.getLogger("speval").addHandler(handler)
