"""The command group with all subcommands.

Owns the group, its list of subcommands and the subcommand ``completion``. Invariant: the code of every other subcommand is in
its own module, which is imported when that subcommand runs, prints its help or completes its arguments.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import click

from .. import __version__

__all__ = ["ClosedPipe", "speval"]


class ClosedPipe(Exception):
    """The reader of the output has closed the pipe; click would exit with 1."""


class _Listed(click.Command):
    """A subcommand whose module is not imported yet.

    Args:
        name: The name of the subcommand.
        where: Its module in this package and its name in that module.
        help: Its line in the help of the group.
    """

    def __init__(self, name: str, where: str, help: str) -> None:
        super().__init__(name, short_help=help)
        self._where = where

    def imported(self) -> click.Command:
        """Return the subcommand itself."""
        module, _, name = self._where.partition(".")
        command: click.Command = getattr(import_module(f"{__package__}.{module}"), name)
        return command


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

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.imported() if isinstance(command, _Listed) else command, rest


@click.group(
    cls=_Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
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


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell. Usage: eval "$(speval completion bash)"."""
    from .completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    sys.stdout.write(kind(speval, {}, "speval", "_SPEVAL_COMPLETE").source() + "\n")


for _name, _where, _help in (
    ("run", "run.run", "Evaluate a function over an eval space."),
    ("status", "look.status", "Count evaluations and list workers."),
    ("watch", "watch.watch", "Watch the workers live."),
    ("ls", "look.ls", "List evaluations."),
    ("show", "look.show", "Show one evaluation with all its attempts."),
    ("best", "look.best", "Print the best completed evaluations."),
    ("export", "export.export", "Write evaluations as CSV, JSON lines or Parquet."),
    ("retry", "steer.retry", "Make evaluations pending again."),
    ("pause", "steer.pause", "Stop all workers from claiming evaluations."),
    ("resume", "steer.resume", "Let workers claim evaluations again."),
    ("set", "steer.set_", "Set the concurrency of all workers."),
    ("unset", "steer.unset", "Return to the concurrency of each call."),
    ("drop", "steer.drop", "Delete evaluations."),
    ("copy", "steer.copy", "Copy a database to another one."),
    ("compact", "repair.compact", "Return unused disk space to the system."),
    ("doctor", "look.doctor", "Find problems of a database."),
    ("salvage", "repair.salvage", "Copy everything readable out of a damaged file."),
    ("completion", "commands.completion", "Print the completion script for a shell."),
):
    speval.add_command(_Listed(_name, _where, _help))
