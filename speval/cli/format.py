"""Output formatting of the command.

Owns how stored text, numbers and times are printed. Invariant: stored text is never executed, neither by the terminal as an
escape sequence nor by rich as markup.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ..escape import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = [
    "STYLES",
    "brief",
    "columns",
    "console",
    "escaped",
    "failure",
    "instant",
    "isatty",
    "json_line",
    "line",
    "print_json",
    "spelled",
    "text",
]

_NARROWEST = 8  # characters: the minimum width of a column, also in a narrow terminal
Cell = str | tuple[str, str]  # a text, or a text and its style

STYLES = {
    "completed": "green", "failed": "red", "in_progress": "cyan", "pending": "dim", "alive": "green", "silent": "yellow",
    "dead": "red", "paused": "yellow",
}  # fmt: skip


def escaped(value: str, *, lines: bool = False) -> str:
    """Return text with unprintable characters escaped as in Python.

    Args:
        value: Text. A value of another type, from a file that another program has edited, is converted.
        lines: Whether line breaks and tabs stay.
    """
    value = str(value)
    if lines:
        return "\n".join(visible(line) for line in value.expandtabs(4).split("\n"))
    return visible(value)


def spelled(value: Any) -> str:
    """Return a value as JSON."""
    return escaped(json.dumps(value, ensure_ascii=False))


def brief(value: Any) -> str:
    """Return a value in a short form on a terminal, and as JSON in a pipe."""
    if not isatty():
        return spelled(value)
    if isinstance(value, dict) and value:
        return " ".join(f"{escaped(str(key))}={brief(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return escaped(value) if isinstance(value, str) else spelled(value)


def failure(cause: str, type_: str, message: str) -> str:
    """Return one line with the reason of a failure: the exception, or the cause and its message."""
    first = message.strip().partition("\n")[0]
    if cause in ("exception", "unserializable"):
        return escaped(f"{type_}: {first}" if first else type_)
    return escaped(f"{cause}: {first}")


def instant(moment: float | None) -> str:
    """Return a Unix time as local date and time."""
    if moment is None:
        return ""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
    except (OverflowError, TypeError, ValueError, OSError):  # the file was edited by another program
        return escaped(str(moment))


def text(*parts: Cell) -> Text:
    """Return parts, each text or (text, style), as one rich ``Text`` without markup."""
    from rich.text import Text

    fit = [(escaped(part[0]), part[1]) if isinstance(part, tuple) else escaped(part) for part in parts]
    return Text.assemble(*fit, no_wrap=True, overflow="ellipsis")


@cache
def console() -> Console:
    """Return the console for stdout: colours on a terminal, markup always off."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


def isatty() -> bool:
    """Tell whether stdout is a terminal."""
    return sys.stdout.isatty()


def line(*parts: Cell) -> None:
    """Print one line of parts, each text or (text, style); long lines are not truncated."""
    if isatty():
        console().print(text(*parts), soft_wrap=True)
    else:
        sys.stdout.write("".join(_plain(part) for part in parts) + "\n")


def _plain(cell: Cell) -> str:
    return escaped(cell[0] if isinstance(cell, tuple) else cell)


def json_line(value: Any) -> str:
    """Return a value as one line of ASCII JSON, which no terminal can interpret as a control sequence."""
    return json.dumps(value, default=repr) + "\n"


def print_json(value: Any) -> None:
    """Print a value as one line of JSON."""
    sys.stdout.write(json_line(value))


def columns(
    head: Sequence[str], rows: Iterable[Sequence[Cell]], *, right: Collection[int] = (), keep: Collection[int] = ()
) -> None:
    """Print rows as they arrive: on a terminal in columns sized by the first rows, in a pipe separated by tabs.

    Args:
        head: The names of the columns.
        rows: Cells, each text or (text, style).
        right: The columns to align right.
        keep: The columns to shrink last in a narrow terminal.
    """
    if not isatty():
        sys.stdout.write("\t".join(head) + "\n")
        for row in rows:
            sys.stdout.write("\t".join(_plain(cell) for cell in row) + "\n")
        return
    _aligned(head, rows, right, keep)


def _aligned(head: Sequence[str], rows: Iterable[Sequence[Cell]], right: Collection[int], keep: Collection[int]) -> None:
    from itertools import chain, islice

    out = console()
    stream = iter(rows)
    first = list(islice(stream, 200))
    cells = [[text(cell) for cell in row] for row in first]
    wanted = [max([len(head[i]), *(row[i].cell_len for row in cells)]) for i in range(len(head))]
    widths = _fitted(wanted, out.width - 2 * (len(head) - 1), keep)

    def show(row: Sequence[Text], style: str = "") -> None:
        joined = text()
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cell.truncate(width, overflow="ellipsis")
            if i in right:
                cell.pad_left(width - cell.cell_len)
            elif i < len(widths) - 1:
                cell.pad_right(width - cell.cell_len)
            joined.append_text(cell)
            joined.append("  " if i < len(widths) - 1 else "")
        out.print(joined, style=style, no_wrap=True, crop=True)

    show([text(name) for name in head], "bold")
    for row in chain(cells, ([text(cell) for cell in row] for row in stream)):
        show(row)


def _fitted(wanted: list[int], room: int, keep: Collection[int]) -> list[int]:
    """Return widths that fit into ``room`` characters; the widest column shrinks first."""
    widths = [min(width, room) for width in wanted]
    for indices in ([i for i in range(len(widths)) if i not in keep], range(len(widths))):
        while sum(widths) > room and (widest := max(indices, key=widths.__getitem__, default=None)) is not None:
            if widths[widest] <= _NARROWEST:
                break
            widths[widest] -= 1
    return widths
