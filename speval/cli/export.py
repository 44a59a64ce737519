"""The subcommand export: writes evaluations to files.

Owns the formats. Invariant: a file gets its final name only when it is complete.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import click

from ..database import Database
from ..flat import flattened, needs, ordered, table, unmixed
from ..model import Cause, Evaluation, Status
from ..stores.sqlite.errors import permission
from .format import escaped, json_line
from .params import as_private_as, database, filters

__all__ = ["export"]

Format = Literal["csv", "jsonl", "parquet"]
_SUFFIXES: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # noqa: RUF001 - a spreadsheet reads text that starts with one of these as a formula
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_CSV_END = "\r\n"  # csv quotes fields with these characters, so a lone "\r" can't start a row; written lines end with "\n"
_SPOOL_IN_MEMORY = 8 * 2**20  # bytes


@click.command()
@database
@click.option(
    "--format", "-f", "format_", type=click.Choice(["csv", "jsonl", "parquet"]), help="[default: by the file's name, or csv]"
)
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="The file to write. [default: stdout]")
@click.option("--flat", is_flag=True, help="Flat keys in JSON lines, too.")
@filters
def export(
    db: str,
    format_: Format | None,
    output: Path | None,
    flat: bool,
    status: Status | None,
    cause: Cause | None,
    pattern: str | None,
) -> None:
    """Write evaluations as a table or as JSON lines, in eval-space order.

    Tables (csv, parquet) have a column for each argument and each key of the result: args.lr, result.loss. JSON lines have the
    keys that load_evals() returns. CSV text that starts like a formula (= + - @) gets a leading apostrophe. A new file gets the
    permissions of the database.
    """
    chosen: Format = format_ or _SUFFIXES.get(output.suffix.lower() if output else "", "csv")
    if chosen == "parquet":
        needs("pyarrow", "parquet", "parquet")
        if output is None and sys.stdout.isatty():
            raise click.ClickException("refusing to write binary Parquet to a terminal; use --output")
    with Database(db) as opened:
        found = opened.evaluations(status=status, cause=cause, pattern=pattern)
        with as_private_as(db), _target(output) as file:
            if chosen == "parquet":
                _write_parquet(found, file)
            elif chosen == "csv":
                _write_csv(found, file)
            else:
                for evaluation in found:
                    file.write(json_line(flattened(evaluation) if flat else evaluation).encode())


@contextmanager
def _target(path: Path | None) -> Iterator[IO[bytes]]:
    """Open the output; a file gets its final name when it is complete."""
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if path.exists() and not path.is_file():  # a device or a pipe
        with path.open("wb") as file:
            yield file
        return
    path = path.resolve()
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        why = f"; {permission(path.parent, 'wx')}" if error.errno == errno.EACCES else ""
        raise click.ClickException(f"can't write {path}: {error.strerror}{why}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        mode = 0o666 & ~umask
        Path(name).chmod(mode & stat.S_IMODE(path.stat().st_mode) if path.exists() else mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _write_csv(evaluations: Iterable[Evaluation], file: IO[bytes]) -> None:
    # The columns are known only after the last row, and the rows may not fit in memory.
    seen: dict[str, None] = {}
    with tempfile.SpooledTemporaryFile(_SPOOL_IN_MEMORY) as spool:
        for evaluation in evaluations:
            row = flattened(evaluation)
            seen.update(dict.fromkeys(row))
            spool.write(json_line(row).encode())
        spool.seek(0)
        columns = ordered(seen)
        lines = _Encoded(file)
        writer = csv.writer(lines, lineterminator=_CSV_END)
        writer.writerow(columns)
        for line in spool:
            row = json.loads(line)
            writer.writerow([_cell(row.get(column)) for column in columns])


class _Encoded:
    """Writes text as UTF-8, escaped for a terminal. ``io.TextIOWrapper`` would close the file it wraps."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._is_terminal = file.isatty()

    def write(self, text: str) -> int:
        text = text.removesuffix(_CSV_END) + "\n"
        if self._is_terminal:
            text = escaped(text, lines=True)
        return self._file.write(text.encode("utf-8", "surrogatepass"))


def _cell(value: Any) -> Any:
    """Return a value as a CSV cell: None is empty; booleans, lists and dicts are JSON.

    Text that a spreadsheet would run as a formula gets a leading apostrophe, which marks it as text. A number stays as it is.

    Source:
        https://owasp.org/www-community/attacks/CSV_Injection
    """
    if isinstance(value, str) and value.startswith(_FORMULA) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, bool | list | dict) else value


def _write_parquet(evaluations: Iterable[Evaluation], file: IO[bytes]) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {column: pyarrow.array(unmixed(values)) for column, values in table(evaluations).items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
