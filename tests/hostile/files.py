# ruff: noqa: E501
"""What is done to a database of ours to make a hostile one of it."""

from __future__ import annotations

import random
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

__all__ = ["DAMAGED", "ENDLESS", "ODD", "REFUSED", "flipped"]

Change = Callable[[Path], object]

_PAGE = 4096
_ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT {} FROM n"
_COLUMNS = {
    "meta": "i AS key, i AS value",
    "evaluations": "i AS id, i AS name, '1' AS args",
    "fresh": "i AS first, i AS last, 0 AS updated_at",
    "claimed": "i AS first, i AS last, 1 AS worker, 0 AS ahead, 0 AS updated_at",
    "queue": "i AS id, 1 AS attempt, 0 AS released, 0 AS forgiven, 0 AS suspect, 0 AS updated_at",
    "running": "i AS id, 1 AS attempt, 0 AS released, 0 AS forgiven, 0 AS suspect, 0 AS ahead, 0 AS held, 1 AS worker, 0 AS updated_at",
    "attempts": "i AS seq, i AS evaluation, 1 AS attempt, 1 AS worker, 0 AS started_at, 0 AS duration, 0 AS ended_at,"
    " 'completed' AS outcome, '1' AS result, '' AS error_type, '' AS error_message, '' AS error_traceback,"
    " 1 AS final, 0 AS released, 0 AS suspect",
    "workers": "i AS id, '' AS host, 1 AS pid, '' AS machine, '' AS start, 1 AS lease, 0 AS beat, 0 AS dead, 0 AS started_at,"
    " 0 AS last_seen, NULL AS ended_at",
}


def _sql(script: str, path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
        connection.execute("PRAGMA journal_mode = DELETE")


def sql(script: str) -> Change:
    """Return what executes a script."""
    return partial(_sql, script)


def _crafted_schema(statement: str, parameters: tuple[object, ...], path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(statement, parameters)
        connection.commit()


def crafted(statement: str, *parameters: object) -> Change:
    """Return what changes sqlite_master itself."""
    return partial(_crafted_schema, statement, parameters)


def in_place_of(table: str, kind: str) -> Change:
    """Return what puts something with the name of a table in its place."""
    if kind == "view":
        return sql(f"DROP TABLE {table}; CREATE VIEW {table} AS {_ENDLESS.format(_COLUMNS[table])};")
    if kind == "virtual":
        return sql(f"DROP TABLE {table}; CREATE VIRTUAL TABLE {table} USING fts5(id, name, args, status);")
    return sql(f"ALTER TABLE {table} ADD COLUMN computed GENERATED ALWAYS AS (length(zeroblob(1000000000))) VIRTUAL;")


def _bytes(change: Callable[[bytearray], object], path: Path) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def in_bytes(change: Callable[[bytearray], object]) -> Change:
    """Return what changes the bytes of the file."""
    return partial(_bytes, change)


def _put(place: int, what: bytes) -> Callable[[bytearray], object]:
    def put(data: bytearray) -> None:
        data[place : place + len(what)] = what

    return put


def _beside(suffix: str, content: bytes, path: Path) -> None:
    Path(f"{path}{suffix}").write_bytes(content)


def _looping(table: str, path: Path) -> None:
    """Make a table's b-tree one of 400 children at each of ten levels, all of them the same few pages."""
    with closing(sqlite3.connect(path)) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    data = bytearray(path.read_bytes())
    count = len(data) // _PAGE
    leaf = data[(root - 1) * _PAGE : root * _PAGE]
    levels = 10
    pages = [_interior(count + level + 1) for level in range(1, levels)] + [bytes(leaf)]
    data[(root - 1) * _PAGE : root * _PAGE] = _interior(count + 1)
    data += b"".join(pages)
    data[28:32] = struct.pack(">I", len(data) // _PAGE)
    data[92:96] = data[24:28]
    path.write_bytes(data)


def _interior(child: int) -> bytes:
    cells = 400
    page = bytearray(_PAGE)
    content = _PAGE - 6 * cells
    page[:12] = struct.pack(">BHHHBI", 5, 0, cells, content, 0, child)
    for number in range(cells):
        place = content + 6 * number
        page[12 + 2 * number : 14 + 2 * number] = struct.pack(">H", place)
        key = number + 128
        page[place : place + 6] = struct.pack(">IBB", child, 0x80 | key >> 7, key & 0x7F)
    return bytes(page)


def _utf16(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        script = "\n".join(connection.iterdump())
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA encoding = 'UTF-16le'")
        connection.executescript(script)
        connection.execute(f"PRAGMA application_id = {application}")
        connection.execute(f"PRAGMA user_version = {version}")


def flipped(seed: int, bits: int, path: Path) -> None:
    """Turn some bits over, most of them where SQLite keeps its own numbers."""
    rng = random.Random(seed)
    data = bytearray(path.read_bytes())
    for _ in range(bits):
        page = rng.randrange(len(data) // _PAGE) * _PAGE
        place = page + rng.choice([rng.randrange(_PAGE), rng.randrange(120), _PAGE - 1 - rng.randrange(600)])
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


# Refused by everyone before a row is read.
REFUSED: dict[str, Change] = {
    **{
        f"{table} is a {kind}": in_place_of(table, kind) for table in _COLUMNS for kind in ("view", "virtual", "computed column")
    },
    "trigger": sql("CREATE TRIGGER t AFTER UPDATE ON queue BEGIN DELETE FROM attempts; END;"),
    "trigger on meta": sql("CREATE TRIGGER t BEFORE DELETE ON meta BEGIN UPDATE queue SET attempt = 0; END;"),
    "trigger on the view evals": sql("CREATE TRIGGER t INSTEAD OF INSERT ON evals BEGIN DELETE FROM attempts; END;"),
    "trigger that says it is a table": crafted(
        "INSERT INTO sqlite_master VALUES ('table', 'harmless', 'harmless', 0, ?)",
        "CREATE TRIGGER t AFTER UPDATE ON queue BEGIN DELETE FROM attempts; END",
    ),
    "trigger behind a long comment": crafted(
        "INSERT INTO sqlite_master VALUES ('table', 'harmless', 'harmless', 0, ?)",
        f"CREATE /*{' ' * 30_000}*/ TRIGGER t AFTER UPDATE ON states BEGIN DELETE FROM attempts; END",
    ),
    "index that computes": sql("CREATE INDEX i ON queue (length(hex(zeroblob(attempt * 1000))));"),
    "index with a condition": sql("CREATE INDEX i ON attempts (seq) WHERE length(hex(zeroblob(seq * 0))) > 7;"),
    "table without an index of ours": sql("DROP INDEX attempts_final;"),
    "table that is not there": sql("DROP TABLE workers;"),
    "table of other columns": sql("ALTER TABLE attempts RENAME COLUMN result TO answer;"),
    "check that computes": crafted(
        "UPDATE sqlite_master SET sql = replace(sql, 'updated_at REAL NOT NULL', 'updated_at REAL CHECK (hex(zeroblob(1)))')"
        " WHERE name = 'queue'"
    ),
    "schema version of 0": sql("PRAGMA user_version = 0;"),
    "schema version below 0": sql("PRAGMA user_version = -7;"),
    "meta of a later release is a view": sql(
        f"DROP TABLE meta; CREATE VIEW meta AS {_ENDLESS.format(_COLUMNS['meta'])}; PRAGMA user_version = 77;"
    ),
    "evals of 0.1.1 is a view": sql(
        "PRAGMA application_id = 0; PRAGMA user_version = 0; DROP VIEW evals; DROP TABLE evaluations; DROP TABLE fresh; DROP TABLE claimed; DROP TABLE queue; DROP TABLE running;"
        "DROP TABLE attempts; DROP TABLE workers; DROP TABLE meta;"
        "CREATE VIEW evals AS SELECT '1' AS name, 'completed' AS status, 0 AS updated, '1' AS result, '1' AS args;"
    ),
}  # fmt: skip

# Take for ever, unless somebody ends them.
ENDLESS: dict[str, Change] = {
    f"b-tree of {table} without end": partial(_looping, table) for table in ("evaluations", "queue", "attempts")
}

# Files that hold what no speval writes, in tables that are ours.
ODD: dict[str, Change] = {
    "view evals without end": sql(f"DROP VIEW evals; CREATE VIEW evals AS {_ENDLESS.format('i AS name')};"),
    "table of somebody else": sql("CREATE TABLE notes (note); CREATE VIEW more AS SELECT * FROM notes;"),
    "text for numbers": sql("UPDATE queue SET attempt = 'y', updated_at = 'z'; UPDATE attempts SET final = 'x' WHERE seq % 2;"),
    "text for ranges": sql("INSERT INTO fresh VALUES (1, 'x', 'y'); INSERT INTO claimed VALUES (3, 'x', 'y', 'z', x'00');"),
    "text for times": sql("UPDATE attempts SET ended_at = 'x', started_at = 'y', duration = 'z';"),
    "final 99": sql("UPDATE attempts SET final = 99 WHERE seq % 3 = 0;"),
    "final of a fraction": sql("UPDATE attempts SET final = 1.5 WHERE seq % 3 = 0;"),
    "all fresh, and further": sql("INSERT INTO fresh VALUES (-5, 4611686018427387904, 0.0);"),
    "all claimed, and further": sql("INSERT INTO claimed VALUES (1, 9223372036854775807, 7, 0, 0.0);"),
    "ranges that overlap": sql("INSERT INTO fresh VALUES (1, 9, 0.0), (2, 8, 0.0), (3, 7, 0.0), (9, 4, 0.0);"),
    "names of bytes": sql("UPDATE evaluations SET name = CAST(id || x'00ff' AS BLOB);"),
    "names of a megabyte": sql("UPDATE evaluations SET name = hex(zeroblob(500000)) || id WHERE id < 3;"),
    "args of bytes": sql("UPDATE evaluations SET args = x'ff00';"),
    "large zeroblobs": sql("UPDATE attempts SET result = zeroblob(300000), error_message = zeroblob(1000);"),
    "results that are too deep": sql("UPDATE attempts SET result = replace(hex(zeroblob(50000)), '0', '[');"),
    "args that are too deep": sql(
        "UPDATE evaluations SET args = replace(hex(zeroblob(20000)), '00', '[') || replace(hex(zeroblob(20000)), '00', ']');"
    ),
    "results of 9,000 digits": sql("UPDATE attempts SET result = replace(hex(zeroblob(4500)), '0', '7');"),
    "args of 9,000 digits": sql("UPDATE evaluations SET args = replace(hex(zeroblob(4500)), '0', '7');"),
    "numbers beyond all floats": sql("UPDATE attempts SET result = '1e999', duration = 9e999, ended_at = -9e999;"),
    "lease beyond all time": sql("UPDATE workers SET lease = 1e300;"),
    "lease of infinity": sql("UPDATE workers SET lease = 9e999;"),
    "lease below zero": sql("UPDATE workers SET lease = -1e300, last_seen = 1e300;"),
    "times of 1e300": sql("UPDATE queue SET updated_at = 1e300; UPDATE attempts SET ended_at = 1e300, started_at = -1e300;"),
    "workers of another world": sql("UPDATE workers SET pid = 1 << 62, started_at = 1e300, ended_at = NULL, last_seen = 'x';"),
    "held by bytes": sql("UPDATE attempts SET final = 0; INSERT INTO running SELECT id, 2, 0, 1, 0, 0, 0, x'00ff', 0.0 FROM evaluations WHERE true ON CONFLICT DO NOTHING;"),
    "largest ids": sql("UPDATE evaluations SET id = 9223372036854775807 - id; UPDATE attempts SET evaluation = 9223372036854775807 - evaluation;"),
    "ids below zero": sql("UPDATE evaluations SET id = -id; UPDATE attempts SET evaluation = -evaluation;"),
    "attempts numbered to the end": sql("UPDATE attempts SET seq = 9223372036854775807 - seq;"),
    "attempts beyond counting": sql("UPDATE attempts SET attempt = 9223372036854775807, released = -9223372036854775807;"),
    "sequence at its end": sql("UPDATE sqlite_sequence SET seq = 9223372036854775807;"),
    "odd settings": sql("INSERT OR REPLACE INTO meta VALUES ('concurrency', 1e300), ('paused', 0), ('args_version', 'x'), ('space', x'ff');"),
    "concurrency of a text": sql("INSERT OR REPLACE INTO meta VALUES ('concurrency', 'many');"),
    "concurrency of 5,000 digits": sql("INSERT OR REPLACE INTO meta VALUES ('concurrency', replace(hex(zeroblob(2500)), '0', '9'));"),
    "journal mode of a text": sql("UPDATE meta SET value = 'off' WHERE key = 'journal_mode';"),
    "cut by a NUL": sql("UPDATE attempts SET result = '\"a' || char(0) || '\"', error_type = 'a' || char(0);"),
    "UTF-16": _utf16,
    "pages of 512 bytes": sql("PRAGMA page_size = 512; VACUUM;"),
    "pages of 65,536 bytes": sql("PRAGMA page_size = 65536; VACUUM;"),
    "vacuums by itself": sql("PRAGMA auto_vacuum = FULL; VACUUM;"),
}  # fmt: skip

DAMAGED: dict[str, Change] = {
    "cut in the middle": in_bytes(lambda data: data.__delitem__(slice(len(data) // 2, None))),
    "cut within a page": in_bytes(lambda data: data.__delitem__(slice(_PAGE + 700, None))),
    "only a header": in_bytes(lambda data: data.__delitem__(slice(100, None))),
    "512 bytes": in_bytes(lambda data: data.__delitem__(slice(512, None))),
    "page size of 3": in_bytes(_put(16, b"\0\3")),
    "page size of 32,768": in_bytes(_put(16, b"\x80\0")),
    "reserved bytes": in_bytes(_put(20, b"\xff")),
    "format of the future": in_bytes(_put(18, b"\7\7")),
    "encoding of 9": in_bytes(_put(56, struct.pack(">I", 9))),
    "schema format of 99": in_bytes(_put(44, struct.pack(">I", 99))),
    "free pages that are none": in_bytes(_put(32, struct.pack(">II", 3, 2**31))),
    "schema of garbage": in_bytes(_put(108, b"\xff" * 2000)),
    "garbage in the second page": in_bytes(_put(_PAGE, bytes(range(256)) * 16)),
    "garbage as -wal": partial(_beside, "-wal", bytes(range(256)) * 64),
    "header and garbage as -wal": partial(
        _beside, "-wal", struct.pack(">IIII", 0x377F0682, 3007000, _PAGE, 0) + bytes(range(256)) * 64
    ),
    "garbage as -journal": partial(_beside, "-journal", bytes(range(256)) * 64),
    "header and garbage as -journal": partial(
        _beside, "-journal", bytes.fromhex("d9d505f920a163d7") + b"\xff" * 504 + bytes(range(256)) * 64
    ),
    "garbage as -shm": partial(_beside, "-shm", bytes(range(256)) * 128),
}  # fmt: skip
