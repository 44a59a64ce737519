"""The command ``speval``.

Owns its entry point and its exit codes. Invariant: whatever goes wrong that a person can mend is one line on stderr, never a
traceback; and nothing else of speval imports this package.
"""

from __future__ import annotations

import io
import os
import sys

__all__ = ["main"]

INTERRUPTED = 130
CLOSED_PIPE = 141
_WIDEST = 100  # columns of a help text


def main() -> None:
    """Run the command and exit.

    The exit code is 0 when all is well, 1 when evaluations failed or are unfinished, 2 when the command could not be carried
    out, 130 after Ctrl-C, and 141 when whoever read the output has gone.
    """
    import click

    from ..codec import MOST_DIGITS
    from ..errors import SpevalError
    from .commands import ClosedPipe, speval

    if "_SPEVAL_COMPLETE" in os.environ:
        from . import completion  # noqa: F401 - it tells click how it completes in each shell

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with it closed; the next file opened would take its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - pathlib takes longer to import than the group
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # also where only ASCII can be shown
    sys.set_int_max_str_digits(MOST_DIGITS)  # what can be read can be shown
    try:
        code = speval.main(prog_name="speval", standalone_mode=False, terminal_width=_width()) or 0
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (`{context.command_path} --help` tells more)" if context is not None else ""
        code = _complain(error.format_message() + hint)
    except (KeyboardInterrupt, click.Abort):
        code = _complain("interrupted", INTERRUPTED)
    except ClosedPipe:
        # What is still buffered has nowhere to go, and the interpreter would complain about it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = CLOSED_PIPE
    except (SpevalError, OSError) as error:
        code = _complain(str(error))
    sys.exit(code)


def _width() -> int:
    """Return the columns of a help text. Click finds the same with shutil, whose import is a share of what ``--help`` costs."""
    try:
        columns = int(os.environ.get("COLUMNS", 0))
    except ValueError:
        columns = 0
    if columns <= 0:
        try:
            columns = os.get_terminal_size(sys.stdout.fileno()).columns
        except (OSError, ValueError):  # no terminal
            columns = 80
    return max(min(columns, _WIDEST) - 2, 50)


def _complain(message: str, code: int = 2) -> int:
    from .format import shown

    print(f"speval: {shown(message, lines=True)}", file=sys.stderr)  # noqa: T201
    return code
