"""The documentation: every block of code runs and prints what the page shows, and what the page names is there."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

import psycopg
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from speval import aio, load_evals, speval
from speval.model import Cause, Status

from .conftest import Terminal
from .postgres_server import Server

ROOT = Path(__file__).parent.parent
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
WAIT = 60.0  # seconds one block may take on a busy machine

# Commands that are shown to be typed elsewhere, or that would run these very tests.
NOT_RUN = (".ci/", ".venv/", "git ", "pip ", "pytest", "python3 -m venv ", "ruff ", "mypy", "source ")
TOOLS = ("curl", "psql", "sqlite3")  # commands that need one of these are passed over where it is missing
CELL = 'title="In a notebook"'  # marks a block as the cell of a notebook
TERMINAL = 'title="In a terminal"'  # marks a transcript of a terminal, where a progress bar is shown
FILE = re.compile(r'--8<-- "(examples/\w+\.py)"')  # a block that shows this file; tests/test_examples.py runs it

pytestmark = pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="the pages and .ci/run are read from a checkout")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    options: str
    lines: list[str]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def title(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    opened: Block | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            assert line.startswith("```"), f"{title(page)}:{number}: a block inside a list is not run; put it at the margin"
            if opened is None:
                language, _, options = line[3:].strip().partition(" ")
                opened = Block(title(page), number, language, options, [])
            else:
                found.append(opened)
                opened = None
        elif opened is not None:
            opened.lines.append(line)
    assert opened is None, f"{opened} is not closed"
    return found


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """Return (command, what it prints) for a shell transcript."""
    found: list[tuple[str, list[str]]] = []
    for line in block.lines:
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            assert found, f"{block}: a transcript begins with a command"
            found[-1][1].append(line)
    return found


def plain(line: str) -> str:
    """Return a line without what differs from run to run: seconds, rates, ports and the ids of workers."""
    if bar := re.match(r" *\d+%\|.*\| (\d+/\d+)", line):
        return f"bar {bar[1]}"
    line = re.sub(r"\b\d+(\.\d+)? s\b", "# s", line.rstrip())
    line = re.sub(r"\b127\.0\.0\.1:\d+", "127.0.0.1:port", line)
    return re.sub(r"\b[\w.-]+:\d+:[0-9a-f]{12}\b", "host:pid:id", line)


def shows(shown: list[str], printed: list[str], *, in_order: bool) -> bool:
    """Tell whether a page shows what was printed; a line of three dots stands for any lines."""
    left, right = [plain(line) for line in shown], [plain(line) for line in printed]
    if in_order:
        pattern = "".join("(?:.*\n)*" if line == "..." else re.escape(line) + "\n" for line in left)
        return re.fullmatch(pattern, "".join(line + "\n" for line in right)) is not None
    if "..." not in left:
        return sorted(left) == sorted(right)
    for line in left:
        if line != "...":
            if line not in right:
                return False
            right.remove(line)
    return True


class Reader:
    """A person who types what a page shows, in an empty folder."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        self.saved: set[str] = set()  # files that nothing has used yet
        self._background: list[subprocess.Popen[str]] = []
        self._notebook: NotebookClient | None = None
        self._late = 0  # evaluations that a killed script recorded after the bar that the page shows
        path = os.pathsep.join([str(Path(sys.executable).parent), str(ROOT / "tests" / "slurm"), os.environ.get("PATH", "")])
        path += f"{os.pathsep}{env.pop('TOOLS', '')}"
        # The page shows a terminal, where every line is printed as soon as it is complete. Its servers listen where PORT says.
        self.env = os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1", "PORT": str(free_port())} | env

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._background:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if self._notebook is not None:
            self._leave.close()

    def save(self, block: Block) -> bool:
        """Save a block whose first line names a file, for the blocks below it."""
        first = block.lines[1 if block.lines[0].startswith("#!") else 0]
        if not (name := re.fullmatch(r"# ([\w-]+\.\w+)", first)):
            return False
        (self.folder / name[1]).write_text("\n".join(block.lines) + "\n", encoding="utf-8")
        self.saved.add(name[1])
        return True

    def _use(self, text: str) -> None:
        self.saved -= {name for name in self.saved if re.search(rf"\b{name}\b", text)}

    def python(self, block: Block) -> list[str]:
        """Run a block as a script of its own."""
        script = self.folder / f"line_{block.line}.py"
        script.write_text("\n".join(block.lines) + "\n", encoding="utf-8")
        self._use(
            "".join(f"{module}.py " for module in re.findall(r"^(?:from|import) (\w+)", script.read_text(), re.MULTILINE))
        )
        process = subprocess.run(
            [sys.executable, "-W", "error", script.name],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=WAIT,
        )
        assert process.returncode == 0, f"{block}\n{process.stderr}"
        return process.stdout.splitlines()

    def cell(self, block: Block) -> list[str]:
        """Run a block as the next cell of the page's notebook, in a real kernel, and return what appears below it."""
        if self._notebook is None:
            self._notebook = NotebookClient(new_notebook(), timeout=WAIT, resources={"metadata": {"path": str(self.folder)}})
            self._leave = ExitStack()
            self._leave.enter_context(self._notebook.setup_kernel())
        cells = self._notebook.nb.cells
        cells.append(new_code_cell("\n".join(block.lines)))
        self._notebook.execute_cell(cells[-1], len(cells) - 1)
        # Standard error is left out: a progress bar writes there.
        texts = [
            output.get("text") or output.data["text/plain"] for output in cells[-1].outputs if output.get("name") != "stderr"
        ]
        return [line for text in texts for line in text.splitlines()]

    def shell(self, command: str, expected: list[str]) -> list[str]:
        """Run a command and return what it prints, errors included."""
        self._use(command)
        if killed := re.fullmatch(r"\(python (\w+\.py) & sleep [\d.]+; kill -9 \$!\)", command):
            return self._killed(killed[1], len(expected))
        if command.endswith(" &"):
            return self._start(command.removesuffix(" &"), expected[-1] if expected else None)
        if number := re.fullmatch(r"kill -9 %(\d)", command):
            self._background[int(number[1]) - 1].kill()
            return []
        process = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.env, timeout=WAIT, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.returncode == 0, f"{command}\n{process.stdout}"
        return process.stdout.splitlines()

    def terminal(self, command: str, expected: list[str]) -> list[str]:
        """Run a command in a real terminal, and kill it at the last bar shown if "Killed" is shown below that."""
        self._use(command)
        settings = [f"{name}={self.env[name]}" for name in ("PATH", "PORT")]
        terminal = Terminal(["env", *settings, "bash", "-c", f"exec {command}"], self.folder, columns=84)
        try:
            if expected[-1:] == ["Killed"]:
                ended, total = plain(expected[-2]).removeprefix("bar ").split("/")
                terminal.wait_for(rf"\| {ended}/{total}\b")
                terminal.process.kill()
                [db] = self.folder.glob("*.db")
                self._late = len(load_evals(db, status="completed")) - int(ended)
            assert terminal.end() == (-signal.SIGKILL if "Killed" in expected else 0), f"{command}\n{terminal.text()}"
            shown = [line for line in terminal.text().split("\n") if line]
        finally:
            terminal.close()
        if "Killed" in expected:
            return [*shown, "Killed"]  # a shell would say so
        # What was recorded between the bar and the kill is not left for this call.
        return [re.sub(r"(?<=\()\d+(?= by this call)", lambda n: str(int(n[0]) + self._late), line) for line in shown]

    def _killed(self, script: str, lines: int) -> list[str]:
        """Run a script and kill it after so many lines: how far it gets in a given time depends on the machine."""
        command = [sys.executable, script]
        with subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                return [process.stdout.readline().rstrip("\n") for _ in range(lines)]
            finally:
                process.send_signal(signal.SIGKILL)

    def _start(self, command: str, last: str | None) -> list[str]:
        """Start a command that goes on until the page ends, and return what it prints up to a given line."""
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=self.folder, env=self.env, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._background.append(process)
        assert process.stdout is not None
        printed: list[str] = []
        while last is not None and plain(last) not in map(plain, printed):
            line = process.stdout.readline()
            assert line, f"{command} has ended after:\n" + "\n".join(printed)
            printed.append(line.rstrip("\n"))
        return printed


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def database_of_the_page(server: Server) -> Iterator[dict[str, str]]:
    """Make the database that the pages speak of; whatever host they name, it is the server of the tests."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE research")
        try:
            yield {"PGHOSTADDR": "127.0.0.1", "PGPORT": str(server.port), "PGUSER": "postgres", "TOOLS": str(server.bin)}
        finally:
            connection.execute("DROP DATABASE research WITH (FORCE)")


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_block_runs_and_prints_what_the_page_shows(page, tmp_path, request):
    # One test for a page, because its blocks go on where the ones before left the folder.
    with ExitStack() as stack:
        env = {}
        if "postgresql://db.example.org/" in page.read_text(encoding="utf-8"):
            env = stack.enter_context(database_of_the_page(request.getfixturevalue("postgres")))
        reader = stack.enter_context(Reader(tmp_path, **env))
        printed: list[str] | None = None
        for block in blocks(page):
            if len(block.lines) == 1 and (file := FILE.fullmatch(block.lines[0])):
                assert (ROOT / file[1]).is_file(), f"{block}: {file[1]}"
                continue
            if block.language in ("python", "bash") and reader.save(block):
                continue
            if block.language == "python":
                printed = reader.cell(block) if block.options == CELL else reader.python(block)
            elif block.language == "text":
                assert printed is not None, f"{block}: nothing has been printed that it could show"
                assert shows(block.lines, printed, in_order=True), f"{block} shows other lines than these:\n" + "\n".join(
                    printed
                )
                printed = None
            elif block.language == "console":
                for command, expected in commands(block):
                    if command.startswith(NOT_RUN) or any(tool in command.split() and not shutil.which(tool) for tool in TOOLS):
                        continue
                    run = reader.terminal if block.options == TERMINAL else reader.shell
                    printed = run(command, expected)
                    # What several processes, or a thread that logs, print at once has no order of its own.
                    assert shows(expected, printed, in_order=False), f"{block}: {command}\n" + "\n".join(printed)
                    printed = None
            else:
                assert block.language in ("", "sql"), f"{block}: no rule for a block of {block.language!r}"
        assert not reader.saved, f"saved, but never used: {reader.saved}"


def test_a_page_that_shows_something_else_is_noticed():
    printed = ["one", "worker box:17:0123456789ab is dead", "3 evaluations: 3 completed in 0.1 s (3 by this call)"]
    shown = ["one", "worker laptop:4711:ba9876543210 is dead", "3 evaluations: 3 completed in 12.0 s (3 by this call)"]
    for in_order in (True, False):
        assert shows(shown, printed, in_order=in_order)
        assert shows(["...", shown[2]], printed, in_order=in_order)
        assert shows([shown[0], "..."], printed, in_order=in_order)
        assert not shows(shown[:2], printed, in_order=in_order)
        assert not shows(["one", "one", "..."], printed, in_order=in_order)
        assert not shows([*shown[:2], shown[2].replace("(3", "(2")], printed, in_order=in_order)
    bars = [f" {percent}%|██▏   | {done}/12, 1 running, 1.66/s, 4.2 s left" for percent, done in ((41, 5), (42, 5), (50, 6))]
    assert shows(bars[:1], bars[1:2], in_order=True)
    assert not shows(bars[:1], bars[2:], in_order=True)
    assert shows([shown[1], shown[0], shown[2]], printed, in_order=False)
    assert not shows([shown[1], shown[0], shown[2]], printed, in_order=True)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_first_screen_has_its_code_by_line_25():
    first = next(block for block in blocks(ROOT / "README.md") if block.language == "python")
    assert first.line + len(first.lines) <= 25


def test_the_two_commands_of_the_readme_are_what_ci_runs_and_what_is_there():
    found = [c for b in blocks(ROOT / "README.md") if b.language == "console" for c, _ in commands(b)]
    main, tests = [c for c in found if c.startswith("python3 -m venv ")]
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()
    assert " install -q . && " in main, "it installs no extra"
    assert (ROOT / main.rpartition(" ")[2]).is_file()


def table(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its two head rows."""
    lines = page.read_text(encoding="utf-8").splitlines()
    below = lines[lines.index(heading) + 1 :]
    start = next(i for i, line in enumerate(below) if line.startswith("|"))
    rows = []
    for line in below[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[2:]


@pytest.mark.parametrize("function", [speval, aio.speval], ids=["speval", "aio.speval"])
def test_the_table_of_options_is_complete(function):
    parameters = inspect.signature(function).parameters.values()
    options = {p.name: p.default for p in parameters if p.default is not p.empty}

    def shown(page: str, heading: str) -> dict[str, Any]:
        rows = table(ROOT / page, heading)
        return {name.strip("`"): ast.literal_eval(default.strip("`")) for name, default, _ in rows}

    assert shown("docs/guide/options.md", "# Options") == {k: v for k, v in options.items() if k != "timeout"}
    assert shown("README.md", "## Options").items() <= options.items()


def slugs(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them, with those of a page that it includes."""
    inside = {line for block in blocks(page) for line in block.lines}
    headings = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("#") and line not in inside]
    found = {re.sub(r"[^\w -]", "", h.lstrip("#").strip().lower()).replace(" ", "-") for h in headings}
    for name in re.findall(r'^--8<-- "([^":]+\.md)', page.read_text(encoding="utf-8"), re.MULTILINE):
        found |= slugs(ROOT / name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\](?:\(|: )([^)\s]+)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        if "://" in target:
            assert "github.com/speval" not in target, f"{title(page)}: {target} is no public address"
            continue
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{title(page)}: {target}"
        if anchor:
            assert anchor in slugs(linked), f"{title(page)}: {target}"


def names_of_tests(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_test_a_page_names_exists(page):
    for file, name in re.findall(r"(tests/\w+\.py)::(\w+)", page.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file(), f"{title(page)}: {file}"
        assert name in names_of_tests(ROOT / file), f"{title(page)}: {file}::{name}"


def test_every_promise_names_its_tests_or_says_that_it_has_none():
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    promises = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    numbers = [int(promise.partition(".")[0]) for promise in promises if promise[0].isdigit()]
    assert numbers == list(range(1, 13))
    for promise in promises:
        if promise[0].isdigit():
            assert "::test_" in promise or "no test yet" in promise, promise.partition("\n")[0]


def test_the_glossary_defines_every_status_and_cause():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    for word in (*get_args(Status), *get_args(Cause)):
        assert f"`{word}`" in text


def test_the_architecture_page_knows_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for module in (ROOT / "speval").rglob("*.py"):
        name = module.relative_to(ROOT / "speval").as_posix()
        assert f"`{name}`" in text, name


def test_the_architecture_page_knows_every_table_and_column(tmp_path):
    speval(lambda args: args, [1], tmp_path / "runs.db", progress=False)
    connection = sqlite3.connect(tmp_path / "runs.db")
    try:
        select = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%'"
        columns: dict[str, list[Any]] = {
            name: [row[1] for row in connection.execute(f"PRAGMA table_info({name})")] for (name,) in connection.execute(select)
        }
    finally:
        connection.close()
    for name, expected in columns.items():
        rows = table(ROOT / "docs" / "architecture.md", f"### `{name}`")
        assert [cells[0].strip("`") for cells in rows] == expected, name


def test_the_architecture_page_knows_every_table_and_column_of_postgresql(postgres, namespace):
    speval(abs, [1], postgres.url(namespace=namespace), executor="thread")
    with psycopg.connect(postgres.url()) as connection:
        found = connection.execute(
            "SELECT table_name, array_agg(column_name::text ORDER BY ordinal_position) FROM information_schema.columns"
            " WHERE table_schema = %s AND table_name <> 'evals' GROUP BY 1",
            (f"speval_{namespace}",),
        ).fetchall()
    rows = table(ROOT / "docs" / "architecture.md", "## The PostgreSQL database")
    assert {name.strip("`"): re.findall(r"`(\w+)`", columns) for name, columns, _ in rows} == dict(found)


def test_imports_point_downwards():
    rooms = [  # as docs/architecture.md draws them; within a tuple each may import the others
        ("cli", "__main__"),
        ("", "flat", "database"),
        ("sync",),
        ("portal",),
        ("open_calls",),
        ("aio",),
        ("terminal",),
        ("engine",),
        ("executors",),
        ("stores",),
        ("spaces",),
        ("options", "model", "codec", "bitmap", "url", "errors", "escape", "pauses", "clock", "host", "threads"),
    ]
    level = {room: number for number, names in enumerate(rooms) for room in names}
    for path in (ROOT / "speval").rglob("*.py"):
        parts = path.relative_to(ROOT / "speval").with_suffix("").parts
        package = parts[:-1]
        own = "" if parts == ("__init__",) else parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                module = (*base, *(node.module.split(".") if node.module else ()))
                targets = {module[0]} if module else {alias.name for alias in node.names}
                for target in targets:
                    assert level[own] <= level.get(target, 0), f"{'/'.join(parts)} imports {target}"
