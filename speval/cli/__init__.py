"""The command ``speval``.

Owns its entry point and its exit codes. Invariant: whatever goes wrong that a person can mend is one line on stderr, never a
traceback; and nothing else of speval imports this package.
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

    The exit code is 0 when all is well, 1 when evaluations failed or are unfinished, 2 when the command could not be carried
    out, 130 after Ctrl-C, and 141 when whoever read the output has gone.
    """
    import click

    from ..codec import MOST_DIGITS
    from ..errors import SpevalError
    from .commands import ClosedPipe, speval
    from .format import shown

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with it closed; the next file opened would take its number
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # also where only ASCII can be shown
    sys.set_int_max_str_digits(MOST_DIGITS)  # what can be read can be shown
    try:
        code = speval.main(prog_name="speval", standalone_mode=False) or 0
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (`{context.command_path} --help` tells more)" if context is not None else ""
        code = _complain(shown(error.format_message(), lines=True) + hint)
    except (KeyboardInterrupt, click.Abort):
        code = _complain("interrupted", INTERRUPTED)
    except ClosedPipe:
        # What is still buffered has nowhere to go, and the interpreter would complain about it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = CLOSED_PIPE
    except (SpevalError, OSError) as error:
        code = _complain(shown(str(error), lines=True))
    sys.exit(code)


def _complain(message: str, code: int = 2) -> int:
    print(f"speval: {message}", file=sys.stderr)  # noqa: T201
    return code
