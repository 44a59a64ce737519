"""The examples, run as a newcomer runs them: what they print, together with their copies, killed, and started again."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

import pytest

from speval import load_evals

from .conftest import Scripts, wait_for

EXAMPLES = Path(__file__).parent.parent / "examples"
DOCS = EXAMPLES.with_name("docs")
WITHIN = 240.0  # seconds an example may take on a busy machine

pytestmark = pytest.mark.timeout(300)
slow = pytest.mark.slow


class Examples:
    """Runs examples in a folder of their own."""

    def __init__(self, scripts: Scripts) -> None:
        self.scripts = scripts

    def start(self, name: str, *arguments: Any) -> subprocess.Popen[str]:
        env = os.environ | {"PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}
        # Of what a shell has put into the background, Ctrl-C is ignored, and that would be inherited.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return self.scripts.start(EXAMPLES / f"{name}.py", *map(str, arguments), env=env)
        finally:
            signal.signal(signal.SIGINT, handler)

    def run(self, name: str, *arguments: Any) -> list[str]:
        return lines_of(self.start(name, *arguments))


@pytest.fixture
def examples(scripts: Scripts) -> Examples:
    return Examples(scripts)


def lines_of(process: subprocess.Popen[str]) -> list[str]:
    """Wait for the end of an example and return what it has printed."""
    out, err = process.communicate(timeout=WITHIN)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return out.splitlines()


def parts(name: str) -> dict[str, list[str]]:
    """Return the parts of an example's docstring by their titles."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))) or ""
    found = re.split(r"^(\w+):\n", docstring, flags=re.MULTILINE)
    return {title: [line.strip() for line in text.strip().splitlines()] for title, text in zip(found[1::2], found[2::2])}


def shown(name: str) -> list[str]:
    """Return the lines that an example says it prints."""
    lines = parts(name)["Prints"]
    return [line for line in lines[: lines.index("") if "" in lines else None] if line != "..."]


def plain(lines: list[str], differing: str = r"\d+\.\d s\b") -> list[str]:
    """Return lines without what differs from run to run."""
    return [re.sub(differing, "#", line) for line in lines]


def completed(db: Path) -> list[dict[str, Any]]:
    """Return the completed evaluations of a database that may not be there yet."""
    return [dict(e) for e in load_evals(db, status="completed")] if db.exists() else []


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_every_example_says_what_it_shows_how_to_run_it_and_what_it_prints(name):
    assert list(parts(name)) == ["Shows", "Run", "Prints"]
    assert any(line.split()[:3] == ["$", "python", f"examples/{name}.py"] for line in parts(name)["Run"])
    assert shown(name)


def test_without_an_argument_an_example_keeps_its_database_in_the_current_folder(examples, tmp_path):
    examples.run("03_fit_line")
    assert shown("03_get_best_fit") == examples.run("03_get_best_fit")
    assert [path.name for path in tmp_path.glob("*.db")] == ["03_fit_line.db"]


@pytest.mark.parametrize("number", [6, pytest.param(20, marks=slow)])
def test_copies_of_hello_world_print_each_of_a_hundred_lines_once(examples, db, number):
    copies = [examples.start("01_hello_world", db) for _ in range(number)]
    printed = [line for copy in copies for line in lines_of(copy)]
    assert Counter(printed) == {f"Hello world: {number}": 1 for number in range(100)}
    assert set(shown("01_hello_world")) <= set(printed)
    assert {(e["status"], e["attempts"]) for e in load_evals(db)} == {("completed", 1)}
    assert examples.run("01_hello_world", db) == []


def test_results_can_be_retrieved_while_they_are_being_stored_and_afterwards(examples, db):
    storing = examples.start("02_store_results", db)
    wait_for(lambda: len(completed(db)) >= 3)
    head, *table = examples.run("02_retrieve_results", db)
    assert head == shown("02_retrieve_results")[0]
    assert [line.split()[1] for line in table] == [str(start) for start in range(10, 30)]
    for line in table:
        _, _, status, steps, peak = line.split()
        assert (status == "completed") == (steps != "-") == (peak != "-")
    assert "completed" in table[0]

    assert plain(lines_of(storing)) == plain(shown("02_store_results"))
    head, *table = examples.run("02_retrieve_results", db)
    assert len(table) == 20
    assert set(shown("02_retrieve_results")) <= {head, *table}
    assert examples.run("02_store_results", db)[0].endswith("(0 by this call)")


def test_retrieving_before_anything_was_stored_names_the_missing_database(examples, db):
    process = examples.start("02_retrieve_results", db)
    _, err = process.communicate(timeout=WITHIN)
    assert process.returncode == 1
    assert f"DatabaseMissingError: {db.name}: this database does not exist" in err
    assert not db.exists()


def test_grid_and_random_search_for_a_line_share_a_database_and_both_come_close(examples, db):
    assert plain(examples.run("03_fit_line", db)) == plain(shown("03_fit_line"))
    best = examples.run("03_get_best_fit", db)
    assert best == shown("03_get_best_fit")
    for line in best:
        slope, sign, intercept = re.search(r"y = ([\d.]+) x ([+-]) ([\d.]+)", line).groups()
        assert float(slope) == pytest.approx(1.7, abs=0.2)
        assert float(sign + intercept) == pytest.approx(-0.8, abs=0.2)


def test_fitting_a_line_again_evaluates_nothing_again(examples, db):
    examples.run("03_fit_line", db)
    before = load_evals(db)
    assert examples.run("03_fit_line", db)[0].endswith("(0 by this call)")
    assert load_evals(db) == before


def tried(lines: list[str]) -> list[dict[str, float]]:
    """Return the parameters in the lines that the tuning prints, one for each evaluation."""
    return [ast.literal_eval(line.partition(" ")[2]) for line in lines if re.match(r"\d\.\d{4} ", line)]


@slow
def test_tuning_digits_prints_the_best_and_a_second_run_prints_it_without_evaluating(examples, db):
    first = examples.run("04_tune_digits", db)
    assert len(tried(first)) == 36
    assert set(plain(shown("04_tune_digits"))) <= set(plain(first))
    second = examples.run("04_tune_digits", db)
    assert plain(second) == ["36 evaluations: 36 completed in # (0 by this call)", first[-1]]
    # The picture in docs/guide/results.md is what the example draws of this.
    drawn = examples.run("04_draw_digits", db, "04_digits.svg")
    assert drawn == shown("04_draw_digits")
    numbers = [re.findall(r">(0\.\d{3})<", svg.read_text()) for svg in (db.with_name("04_digits.svg"), DOCS / "digits.svg")]
    assert len(numbers[0]) > 36  # gammas too
    assert numbers[0] == numbers[1]


@slow
def test_tuning_digits_goes_on_after_ctrl_c_and_after_a_kill_where_it_was(examples, db):
    recorded: list[dict[str, Any]] = []
    for ending in (signal.SIGINT, signal.SIGKILL):
        enough = len(recorded) + 5
        process = examples.start("04_tune_digits", db)
        wait_for(lambda enough=enough: len(completed(db)) >= enough, within=WITHIN)
        process.send_signal(ending)
        out, err = process.communicate(timeout=WITHIN)
        assert process.returncode == -ending, err
        assert not [e for e in recorded if e["args"] in tried(out.splitlines())]
        recorded = completed(db)
    assert 10 <= len(recorded) < 36

    last = examples.run("04_tune_digits", db)
    assert {str(args) for args in tried(last)} == {str(e["args"]) for e in load_evals(db)} - {str(e["args"]) for e in recorded}
    assert last[-2].endswith(f"({36 - len(recorded)} by this call)")
    assert last[-1] == shown("04_tune_digits")[-1]
    by_name = {e["name"]: e for e in completed(db)}
    assert [by_name[e["name"]] for e in recorded] == recorded


@pytest.fixture
def server(examples: Examples) -> Iterator[str]:
    """The address of a running server of the HTTP example."""
    process = examples.start("05_http_server", 0)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert plain([line.strip()], r":\d+$") == plain(shown("05_http_server"), r":\d+$")
        yield line.split()[-1]
    finally:
        process.kill()
        _, err = process.communicate()
    assert err == ""


def requests(server: str) -> Counter[str]:
    """Return how many requests the server has counted, by evaluation."""
    with urlopen(f"{server}/counts", timeout=60) as response:
        return Counter(json.load(response))


def test_a_thousand_http_calls_are_sent_once_each_and_refused_ones_are_tried_again(examples, server, db):
    answered, summary, counts = examples.run("05_http_calls", db, server)
    assert answered == "0 answers are here already"
    assert summary.startswith("1000 evaluations: 1000 completed in ")
    assert counts == "requests for numbers that had an answer: 0; numbers sent twice, being under way at a kill: 0"
    assert requests(server) == {str(number): 1 for number in range(1000)}
    evaluations = load_evals(db)
    assert [e["result"] for e in evaluations] == [number**2 for number in range(1000)]
    assert [e["name"] for e in evaluations if e["attempts"] == 2] == ["0", "250", "500", "750"]


@slow
def test_http_calls_killed_midway_resume_and_send_nothing_again_that_was_answered(examples, server, db):
    caller = examples.start("05_http_calls", db, server)
    wait_for(lambda: len(completed(db)) >= 300)
    caller.kill()
    caller.wait(timeout=WITHIN)
    status = {e["name"]: e["status"] for e in load_evals(db)}
    answered = {name for name in status if status[name] == "completed"}
    under_way = {name for name in status if status[name] == "in_progress"}
    assert 300 <= len(answered) < 1000

    printed = examples.run("05_http_calls", db, server)
    counts = requests(server)
    assert set(counts) == {str(number) for number in range(1000)}
    assert {counts[name] for name in answered} == {1}
    twice = {name for name in counts if counts[name] > 1}
    assert twice
    assert twice <= under_way
    assert max(counts.values()) == 2
    assert {e["name"]: e["result"] for e in load_evals(db, status="completed")} == {str(n): n**2 for n in range(1000)}
    assert plain(printed, r"\d+(\.\d)?") == plain(shown("05_http_calls"), r"\d+(\.\d)?")
    assert [printed[0], printed[1].partition("(")[2], printed[2]] == [
        f"{len(answered)} answers are here already",
        f"{1000 - len(answered)} by this call)",
        f"requests for numbers that had an answer: 0; numbers sent twice, being under way at a kill: {len(twice)}",
    ]

    again = examples.run("05_http_calls", db, server)
    assert again[0] == "1000 answers are here already"
    assert again[1].endswith("(0 by this call)")
    assert requests(server) == counts


@pytest.mark.parametrize("name", ["06_process_pool", pytest.param("07_loky", marks=slow), pytest.param("08_dask", marks=slow)])
def test_executors_of_others_evaluate_all_and_a_second_run_evaluates_nothing(scripts: Scripts, name: str):
    # Without warnings as errors: those of the other libraries are not ours to mend.
    for recorded in (None, 0):
        out, err = scripts.start(EXAMPLES / f"{name}.py").communicate(timeout=WITHIN)
        lines = plain(out.splitlines())
        expected = plain(shown(name))
        if recorded == 0:
            expected[0] = re.sub(r"\(\d+ by", "(0 by", expected[0])
        assert lines == expected, err


@slow
def test_four_copies_share_an_optuna_study_that_chooses_by_what_all_have_recorded(examples: Examples, db: Path):
    copies = [examples.start("09_optuna", db) for _ in range(4)]
    best = [lines_of(copy)[-1] for copy in copies]
    evaluations = load_evals(db)
    assert sorted(int(e["name"]) for e in evaluations) == list(range(80))
    assert {(e["status"], e["attempts"]) for e in evaluations} == {("completed", 1)}
    assert len({e["worker"] for e in evaluations}) > 1
    results = [e["result"] for e in sorted(evaluations, key=lambda e: int(e["name"]))]
    assert median(results[40:]) < median(results[:10]) / 2  # the first ten are drawn at random
    assert {f"best of 80: {min(results):.4f}" in line for line in best} == {True}
    assert examples.run("09_optuna", db) == best[-1:]
