"""What is imported when: the modules are counted, since no clock is right on a busy machine."""

import asyncio
import subprocess
import sys
import time

import pytest

from speval import aio
from speval.stores.sqlite.file import SqliteFile

from .conftest import WAIT

# Each takes milliseconds, and a program that makes no call, or a subcommand that only reads, uses none of them.
HEAVY = {
    "aiosqlite",
    "anyio",
    "asyncio",
    "cloudpickle",
    "concurrent.futures.process",
    "distributed",
    "importlib.metadata",
    "IPython",
    "multiprocessing",
    "numpy",
    "pandas",
    "psycopg",
    "rich",
    "speval.engine.worker",
    "speval.executors",
    "speval.portal",
    "ssl",
    "tqdm",
}
REPORT = "import atexit, sys; atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr)); "
COMMAND = "sys.argv[:] = {arguments!r}; from speval.cli import main; main()"


def nap(args):
    time.sleep(0.05)
    return args


async def nap_async(args):
    await asyncio.sleep(0.05)
    return args


def modules(code: str, **environment: str) -> set[str]:
    """Return the modules that a fresh interpreter has imported after some code."""
    done = subprocess.run([sys.executable, "-c", REPORT + code], capture_output=True, text=True, timeout=WAIT, env=environment)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize(
    ("code", "light"),
    [
        ("import speval", {"dataclasses", "json", "logging", "speval.model", "speval.sync", "typing"}),
        ("from speval import Evaluation, Summary, SpevalError", {"speval.sync"}),
        ("from speval import as_completed, load_evals, retry, speval", {"click", "json", "sqlite3", "tempfile"}),
        ("import speval; speval.to_frame", {"click", "speval.sync"}),
    ],
)
def test_importing_speval_imports_no_more_than_the_names_used(code, light):
    assert modules(code) & (HEAVY | light) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_the_help_of_the_command_imports_no_subcommand(arguments):
    code = COMMAND.format(arguments=["speval", *arguments])
    if not arguments:
        code = f"sys.exit = lambda code: None; {code}"  # it is 2
    others = {"json", "logging", "shutil", "speval.model", "speval.cli.format", "speval.cli.look", "speval.cli.params"}
    found = modules(code)
    assert "speval.cli.commands" in found
    assert found & (HEAVY | others) == set()


@pytest.mark.parametrize("arguments", [["status"], ["ls"], ["export"], ["pause"], ["doctor", "--quick"]])
async def test_subcommands_that_evaluate_nothing_import_no_event_loop(db, arguments):
    await aio.speval(abs, [1], db, progress=False)
    name, *rest = arguments
    found = modules(COMMAND.format(arguments=["speval", name, str(db), *rest]))
    assert "speval.stores.sqlite.control" in found
    assert found & HEAVY == set()


def test_completing_a_subcommand_imports_none():
    words = {"_SPEVAL_COMPLETE": "bash_complete", "COMP_WORDS": "speval re", "COMP_CWORD": "re"}
    found = modules(COMMAND.format(arguments=["speval"]), **words)
    assert "speval.cli.completion" in found
    assert found & (HEAVY | {"speval.cli.params", "speval.cli.steer"}) == set()


def test_all_a_call_needs_after_an_interrupt_is_imported_before_it_begins():
    code = """
from speval import portal, speval
def started(call):
    print(sorted(sys.modules))
    raise SystemExit(0)
portal.Call.start = started
speval(abs, [1], "never-made.db")
"""
    done = subprocess.run([sys.executable, "-c", "import sys" + code], capture_output=True, text=True, timeout=WAIT)
    assert {"anyio._backends._asyncio", "asyncio", "speval.aio"} <= set(eval(done.stdout)), done.stderr


@pytest.mark.parametrize("executor", ["thread", "process", "coroutine"])
async def test_evaluations_that_take_longer_than_a_commit_cost_one_each(db, monkeypatch, executor):
    transactions = []
    transaction = SqliteFile._transaction

    def counted(self, begin, *args, **kwargs):
        transactions.append(begin)
        return transaction(self, begin, *args, **kwargs)

    monkeypatch.setattr(SqliteFile, "_transaction", counted)
    monkeypatch.setattr("speval.engine.lease._LONGEST_TICK", 60.0)
    function = nap_async if executor == "coroutine" else nap
    found = []
    for count in (10, 30):
        transactions.clear()
        await aio.speval(function, range(count), db.with_name(f"{count}.db"), executor=executor)
        found.append(len(transactions))
    assert found[1] - found[0] < 1.5 * (30 - 10)
