"""The command ``speval``.

Owns its entry point and its exit codes. Invariant: an error that the user can fix is one line on stderr, never a traceback.
The rest of speval does not import this package.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

__all__ = ["main"]

INTERRUPTED = 130
CLOSED_PIPE = 141


def main() -> None:
    """Run the command and exit.

    The exit code is 0 on success, 1 when evaluations failed or are unfinished, 2 when the command could not run, 130 after
    Ctrl-C, and 141 when the reader of the output has closed the pipe.
    """
    import click

    from ..codec import MOST_DIGITS
    from ..errors import SpevalError
    from .commands import ClosedPipe, speval
    from .format import escaped

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent: the next opened file would get its descriptor number
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # some terminals take only ASCII
    sys.set_int_max_str_digits(MOST_DIGITS)  # print every number that the codec reads
    try:
        code = speval.main(prog_name="speval", standalone_mode=False) or 0
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context is not None else ""
        code = _complain(escaped(error.format_message(), lines=True) + hint)
    except (KeyboardInterrupt, click.Abort):
        code = _complain("interrupted", INTERRUPTED)
    except ClosedPipe:
        # Buffered output has no reader, and the interpreter would report an error when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = CLOSED_PIPE
    except (SpevalError, OSError) as error:
        code = _complain(escaped(str(error), lines=True))
    sys.exit(code)


def _complain(message: str, code: int = 2) -> int:
    print(f"speval: {message}", file=sys.stderr)  # noqa: T201
    return code
