"""The command group with all subcommands.

Owns the group and the subcommand ``completion``. Invariant: the code of every other subcommand is in its own module.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from .. import __version__
from .completion import get_completion_class
from .export import export
from .look import best, doctor, ls, show, status
from .repair import compact, salvage
from .run import run
from .steer import copy, drop, pause, resume, retry, set_, unset
from .watch import watch

__all__ = ["ClosedPipe", "speval"]


class ClosedPipe(Exception):
    """The reader of the output has closed the pipe; click would exit with 1."""


class _Group(click.Group):
    """Lists its subcommands in the order in which users need them."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError as error:
            raise ClosedPipe from error
        return code

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="speval %(version)s")
@click.pass_context
def speval(context: click.Context) -> int:
    """Evaluate a Python function over many arguments; inspect, control and export the results.

    DB is the database: a file name, or a postgresql:// URL.

    Exit codes: 0 success; 1 evaluations failed or are unfinished; 2 the command could not run; 130 interrupted.
    """
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")
        return 2
    return 0


@click.command(short_help="Print the completion script for a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell. Usage: eval "$(speval completion bash)"."""
    kind = get_completion_class(shell)
    assert kind is not None
    sys.stdout.write(kind(speval, {}, "speval", "_SPEVAL_COMPLETE").source() + "\n")


_STEERING = (retry, pause, resume, set_, unset, drop)
for _command in (run, status, watch, ls, show, best, export, *_STEERING, copy, compact, doctor, salvage, completion):
    speval.add_command(_command)
