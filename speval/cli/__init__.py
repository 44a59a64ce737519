"""The command ``speval``.

Owns its entry point and its exit codes. Invariant: an error that the user can fix is one line on stderr, never a traceback.
The rest of speval does not import this package.
"""

from __future__ import annotations

import gc
import io
import os
import sys

__all__ = ["main"]

INTERRUPTED = 130
CLOSED_PIPE = 141
_WIDEST = 100  # columns of a help text


def main() -> None:
    """Run the command and exit.

    The exit code is 0 on success, 1 when evaluations failed or are unfinished, 2 when the command could not run, 130 after
    Ctrl-C, and 141 when the reader of the output has closed the pipe.
    """
    gc.disable()  # imports leave no garbage, and looking for it is a twentieth of what --help costs
    import click

    from ..codec import MOST_DIGITS
    from ..errors import SpevalError
    from .commands import ClosedPipe, speval

    if "_SPEVAL_COMPLETE" in os.environ:
        from . import completion  # noqa: F401 - it tells click how it completes in each shell
    gc.enable()

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent: the next opened file would get its descriptor number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - pathlib takes longer to import than the group
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # some terminals take only ASCII
    sys.set_int_max_str_digits(MOST_DIGITS)  # print every number that the codec reads
    try:
        code = speval.main(prog_name="speval", standalone_mode=False, terminal_width=_width()) or 0
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context is not None else ""
        code = _complain(error.format_message() + hint)
    except (KeyboardInterrupt, click.Abort):
        code = _complain("interrupted", INTERRUPTED)
    except ClosedPipe:
        # Buffered output has no reader, and the interpreter would report an error when it flushes at exit.
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
    from .format import escaped

    print(f"speval: {escaped(message, lines=True)}", file=sys.stderr)  # noqa: T201
    return code
