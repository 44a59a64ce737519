"""All subcommands together.

Owns the group they stand in, and the scripts for shells. Invariant: what a subcommand does stands in its own module, which is
imported when that subcommand runs, shows its help or is completed; the help of the group and completing a name import none.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import click

from .. import __version__

__all__ = ["ClosedPipe", "speval"]


class ClosedPipe(Exception):
    """Whoever read the output has gone; click would exit with a code of its own."""


class _Listed(click.Command):
    """A subcommand as the group lists it.

    Args:
        name: What it is called.
        where: The module in this package and the name in it.
        help: One line.
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
    """Shows its subcommands in the order in which people need them."""

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
    """Evaluate a Python function over many arguments; look at, steer and read what comes of it.

    DB is the database: a file name, or a postgresql:// URL.

    Exit codes: 0 all is well; 1 evaluations failed or are unfinished; 2 the command could not be carried out; 130
    interrupted.
    """
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")
        return 2
    return 0


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes a shell complete the command: eval "$(speval completion bash)"."""
    from .completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    sys.stdout.write(kind(speval, {}, "speval", "_SPEVAL_COMPLETE").source() + "\n")


for _name, _where, _help in (
    ("run", "run.run", "Evaluate a function over an eval space."),
    ("status", "look.status", "Count evaluations, and say who runs what."),
    ("watch", "watch.watch", "Watch the workers live."),
    ("ls", "look.ls", "List evaluations."),
    ("show", "look.show", "Show one evaluation with all its attempts."),
    ("best", "look.best", "Print the best completed evaluations."),
    ("export", "export.export", "Write evaluations as CSV, JSON lines or Parquet."),
    ("retry", "steer.retry", "Put evaluations back to pending."),
    ("pause", "steer.pause", "Let no worker claim anything more."),
    ("resume", "steer.resume", "Let the workers go on."),
    ("set", "steer.set_", "Set the concurrency of all workers."),
    ("unset", "steer.unset", "Leave the concurrency to each call."),
    ("drop", "steer.drop", "Forget evaluations for good."),
    ("copy", "steer.copy", "Copy all to another database."),
    ("compact", "repair.compact", "Make the file as small as what is in it."),
    ("doctor", "look.doctor", "Look for what is wrong."),
    ("salvage", "repair.salvage", "Save what can be read of a damaged file."),
    ("completion", "commands.completion", "Print what makes a shell complete the command."),
):
    speval.add_command(_Listed(_name, _where, _help))
