"""The command, run as people run it: what it prints, where it complains, how it exits, what it does in a real terminal."""

import csv
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import click
import pytest

from speval import SpevalError, load_evals, speval
from speval.cli import main
from speval.cli.commands import speval as command

from .conftest import WAIT, wait_for

COMMAND = str(Path(sys.executable).with_name("speval"))

TUNE = """
import time

def train(args):
    if args["depth"] == 8:
        raise ValueError("too deep\\nfor this")
    return {"loss": args["lr"] * 10 / args["depth"], "scores": {"f1": 0.5}, "curve": [1, 2]}

async def wait(args):
    return args

class Odd(Exception):
    pass

def odd(args):
    raise Odd(args)

def space():
    return {f"run {n}": {"lr": n, "depth": 2} for n in range(3)}

numbers = range(4)
"""


@pytest.fixture
def here(tmp_path) -> Path:
    (tmp_path / "tune.py").write_text(TUNE)
    return tmp_path


@pytest.fixture
def call(tmp_path):
    def call(*arguments: str, code: int = 0, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT, input=stdin or "",
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return call


@pytest.fixture
def inside(tmp_path, monkeypatch, capfd):
    """Run the command in this process, where a test is not about its start."""
    most_digits = sys.get_int_max_str_digits()

    def call(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["speval", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert (ended.value.code or 0) == code, out + err
        return subprocess.CompletedProcess(arguments, code, out, err)

    yield call
    sys.set_int_max_str_digits(most_digits)


def boom(args):
    if args == "bad":
        raise ValueError("boom \x1b[31m[bold]red[/bold]\x07")
    return {"loss": args, "text": "[red]x[/red] :smile: \x1b]0;owned\x07"}


@pytest.fixture
def filled(tmp_path) -> Path:
    """A database with two completed evaluations and a failed one; one of the names is hostile."""
    db = tmp_path / "runs.db"
    speval(boom, {"a": 2.5, "[b]old\x1b[2J": 1.5, "c": "bad"}, db, progress=False)
    return db


def lines(done) -> list[str]:
    return done.stdout.splitlines()


def complaint(done) -> str:
    """Return what stderr says, which is one line."""
    said = done.stderr.splitlines()
    assert len(said) == 1, done.stderr
    assert said[0].startswith("speval: ")
    assert done.stdout == ""
    return said[0]


# run


def test_run_evaluates_a_function_of_a_file_over_a_grid(here, call):
    done = call("run", "tune.py:train", "runs.db", "--space", "grid:lr=0.1,0.2;depth=2,4")
    assert lines(done)[0].startswith("4 evaluations: 4 completed in ")
    assert done.stderr == ""
    evaluations = {e["name"]: e for e in load_evals(here / "runs.db")}
    assert list(evaluations) == ["lr=0.1;depth=2", "lr=0.1;depth=4", "lr=0.2;depth=2", "lr=0.2;depth=4"]
    assert evaluations["lr=0.2;depth=4"]["result"]["loss"] == 0.5
    again = call("run", "tune:train", "runs.db", "--space", "grid:lr=0.1,0.2,0.3;depth=2,4")
    assert "(2 by this call)" in again.stdout


def test_run_exits_with_1_and_names_each_failure_once(here, call):
    done = call("run", "tune:train", "runs.db", "--space", "grid:lr=0.1;depth=2,8", code=1)
    assert lines(done)[0].startswith("2 evaluations: 1 completed, 1 failed (1 exception)")
    assert "too deep" in done.stderr
    assert "2 evaluations" not in done.stderr


def test_run_prints_json_on_demand(here, call):
    done = call("run", "tune:train", "runs.db", "--space", "grid:lr=0.1;depth=2,8", "--json", code=1)
    summary = json.loads(done.stdout)
    assert (summary["completed"], summary["failed"], summary["causes"], summary["stopped"]) == (1, 1, {"exception": 1}, None)


def test_run_reads_json_lines_and_tables(here, call):
    (here / "space.jsonl").write_text('{"lr": 0.5, "depth": 2}\n\n{"lr": 1, "depth": 4, "tag": null}\n')
    call("run", "tune:train", "a.db", "--space", "space.jsonl")
    assert [e["args"] for e in load_evals(here / "a.db")] == [{"lr": 0.5, "depth": 2}, {"lr": 1, "depth": 4, "tag": None}]
    (here / "space.csv").write_text("id,lr,depth,on,note,zip\nx,1e-3,2,true,,00501\ny,2,4,false,a b,nan\n")
    call("run", "tune:train", "b.db", "--space", "space.csv", "--name", "id")
    one, other = load_evals(here / "b.db")
    assert (one["name"], other["name"]) == ("x", "y")
    assert one["args"] == {"id": "x", "lr": 0.001, "depth": 2, "on": True, "note": None, "zip": "00501"}
    assert (other["args"]["on"], other["args"]["note"]) == (False, "a b")
    assert other["args"]["zip"] != other["args"]["zip"]


def test_run_takes_spaces_out_of_modules(here, call):
    call("run", "tune:train", "a.db", "--space", "tune:space")
    assert [e["name"] for e in load_evals(here / "a.db")] == ["run 0", "run 1", "run 2"]
    call("run", "tune.py:wait", "b.db", "--space", "tune.py:numbers")
    assert [e["result"] for e in load_evals(here / "b.db")] == [0, 1, 2, 3]


def test_run_passes_its_options_on(here, call):
    options = ["--timeout", "30", "-j", "2", "--executor", "process", "--max-attempts", "2", "--backoff", "0.01"]
    options += [
        "--retry-on",
        "tune:Odd",
        "--retry-on",
        "OSError",
        "--no-wait",
        "--max-failures",
        "50%",
        "--durability",
        "power",
    ]
    done = call("run", "tune:odd", "runs.db", "--space", "grid:n=1,2,3,4", *options, "--json", code=1)
    assert "failed, max_failures=0.5" in json.loads(done.stdout)["stopped"]
    assert {e["attempts"] for e in load_evals(here / "runs.db", status="failed")} == {2}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "tune:train", "runs.db"], "Missing option '--space'"),
        (["run", "nowhere:train", "runs.db", "--space", "grid:a=1"], "can't import nowhere: No module named 'nowhere'"),
        (["run", "nowhere.py:train", "runs.db", "--space", "grid:a=1"], "nowhere.py does not exist"),
        (["run", "tune:trian", "runs.db", "--space", "grid:a=1"], "tune has no 'trian'"),
        (["run", "tune:numbers", "runs.db", "--space", "grid:a=1"], "tune:numbers is not a function"),
        (["run", "tune", "runs.db", "--space", "grid:a=1"], "'tune' does not name a function; write module:name"),
        (["run", "broken.py:f", "runs.db", "--space", "grid:a=1"], "NameError: name 'nope' is not defined"),
        (["run", "odd.py:f", "runs.db", "--space", "grid:a=1"], "SyntaxError"),
        (["run", "eager.py:f", "runs.db", "--space", "grid:a=1"], 'move the call under if __name__ == "__main__"'),
        (["run", "json.py:f", "runs.db", "--space", "grid:a=1"], "another module is named 'json'"),
        (["run", "tune:train", "runs.db", "--space", "no.csv"], "no.csv does not exist"),
        (["run", "tune:train", "runs.db", "--space", "bad.jsonl"], "bad.jsonl:2: invalid JSON"),
        (["run", "tune:train", "runs.db", "--space", "bad.csv"], "bad.csv:3: the number of values differs"),
        (
            ["run", "tune:train", "runs.db", "--space", "same.csv", "--name", "id"],
            "same.csv:3: another evaluation already has the name 'x'",
        ),
        (["run", "tune:train", "runs.db", "--space", "same.csv", "--name", "no"], "--name no: the args have no key 'no'"),
        (["run", "tune:train", "runs.db", "--space", "grid:lr"], "expected KEY=VALUE,VALUE instead of 'lr'"),
        (["run", "tune:train", "runs.db", "--space", "grid:a=1;a=2"], "'a' appears twice"),
        (["run", "tune:train", "runs.db", "--space", "what"], "expected a .jsonl or .csv file, grid:"),
        (["run", "tune:train", "runs.db", "--space", "grid:a=1", "-j", "0"], "invalid concurrency=0"),
        (["run", "tune:train", "runs.db", "--space", "grid:a=1", "--max-failures", "x"], "'x' is neither a count"),
        (["run", "tune:train", "runs.db", "--space", "grid:a=1", "--retry-on", "Nope"], "'Nope' does not name an exception"),
        (["run", "tune:train", ".", "--space", "grid:a=1"], "is a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_user_error_of_run_is_one_line(here, call, arguments, told):
    (here / "broken.py").write_text("import os\nnope\n")
    (here / "odd.py").write_text("def f(:\n")
    (here / "json.py").write_text("def f(args): pass\n")
    (here / "eager.py").write_text("from speval import speval\nf = abs\nspeval(f, [1], 'eager.db')\n")
    (here / "bad.jsonl").write_text("{}\n{\n")
    (here / "bad.csv").write_text("a,b\n1,2\n1\n")
    (here / "same.csv").write_text("id\nx\nx\n")
    assert told in complaint(call(*arguments, code=2))
    assert not list(here.glob("*.db"))


def test_ctrl_c_in_run_releases_all_claims_and_exits_with_130(here, terminal):
    (here / "slow.py").write_text("import time\ndef f(args):\n    print('began', flush=True)\n    time.sleep(600)\n")
    seen = terminal(COMMAND, "run", "slow.py:f", "runs.db", "--space", "grid:a=1,2", "-j", "2")
    seen.wait_for("began")
    seen.type("\x03")
    assert seen.end() == 130
    assert "Traceback" not in seen.text()
    assert "speval: interrupted" in seen.text()
    assert {e["status"] for e in load_evals(here / "runs.db")} == {"pending"}


# status


def test_status_counts_and_names_workers_and_failures(filled, call):
    done = call("status", "runs.db")
    assert lines(done)[0] == "3 evaluations: 2 completed, 1 failed (1 exception)"
    assert lines(done)[1] == "no worker"
    assert lines(done)[2] == r"failed c ValueError: boom \x1b[31m[bold]red[/bold]\x07"
    call("status", "runs.db", "--exit-code", code=1)
    speval(boom, {"d": 1}, filled.with_name("good.db"), progress=False)
    call("status", "good.db", "--exit-code")


def test_status_as_json_is_complete(filled, call):
    seen = json.loads(call("status", "runs.db", "--json").stdout)
    assert (seen["pending"], seen["in_progress"], seen["completed"], seen["failed"]) == (0, 0, 2, 1)
    assert (seen["causes"], seen["workers"], seen["rate"], seen["eta"]) == ({"exception": 1}, [], None, None)
    assert seen["settings"] == {"paused": False, "concurrency": None}
    assert seen["failures"][0]["name"] == "c"


def test_status_shows_what_runs(here, call, scripts):
    running = scripts.start(scripts.write(
        """
        import time
        from speval import speval
        speval(lambda args: time.sleep(600), {"long one": 1, "other": 2}, "runs.db", concurrency=2)
        """, "go.py"
    ))  # fmt: skip
    wait_for(lambda: (here / "runs.db").exists())
    told = wait_for(lambda: "long one" in (out := call("status", "runs.db").stdout) and out)
    assert "2 evaluations: 0 completed, 2 in progress" in told
    assert f":{running.pid}:" in told
    assert "alive" in told
    running.kill()
    running.wait()
    told = call("status", "runs.db").stdout
    assert "dead" in told
    assert "no worker" in told


# ls and show


def test_ls_prints_tab_separated_lines_into_a_pipe(filled, call):
    head, *found = (line.split("\t") for line in lines(call("ls", "runs.db")))
    assert head == ["name", "status", "attempts", "took", "args", "result"]
    assert [f[:3] for f in found] == [["a", "completed", "1"], [r"[b]old\x1b[2J", "completed", "1"], ["c", "failed", "1"]]
    assert json.loads(found[0][4]) == 2.5
    assert found[2][5].startswith("ValueError: boom ")


def test_ls_filters(filled, call):
    assert lines(call("ls", "runs.db", "--names", "--status", "completed")) == ["a", r"[b]old\x1b[2J"]
    assert lines(call("ls", "runs.db", "--names", "--match", "*o?d*")) == [r"[b]old\x1b[2J"]
    assert lines(call("ls", "runs.db", "--names", "--cause", "exception")) == ["c"]
    assert lines(call("ls", "runs.db", "--names", "-n", "1")) == ["a"]
    found = [json.loads(line) for line in lines(call("ls", "runs.db", "--json"))]
    assert found == load_evals(filled)


def test_show_prints_args_result_and_every_attempt(filled, call):
    call("retry", "runs.db")
    speval(boom, {"c": "bad"}, filled, progress=False)
    told = call("show", "runs.db", "c").stdout
    assert "status    failed" in told
    assert 'args      "bad"' in told
    assert told.count("attempt ") == 2
    assert told.count("Traceback") == 2
    assert r"boom \x1b[31m[bold]red[/bold]\x07" in told
    assert "result" not in told
    seen = json.loads(call("show", "runs.db", "c", "--json").stdout)
    assert [a["outcome"] for a in seen["attempts"]] == ["exception", "exception"]
    assert seen["error"]["message"] == "boom \x1b[31m[bold]red[/bold]\x07"
    assert "result    {" in call("show", "runs.db", "a").stdout


# best


def test_best_finds_the_smallest_and_the_largest(filled, call):
    (found,) = (json.loads(line) for line in lines(call("best", "runs.db", "loss", "--min", "--json")))
    assert (found["value"], found["name"]) == (1.5, "[b]old\x1b[2J")
    told = lines(call("best", "runs.db", "result.loss", "--max", "-n", "5"))
    assert [line.split("\t")[0] for line in told] == ["result.loss", "2.5", "1.5"]
    assert len(lines(call("best", "runs.db", "duration", "--max"))) == 2


def test_best_without_a_key_compares_results_that_are_numbers(here, call):
    speval(abs, [3, -1, 2], here / "numbers.db", progress=False)
    assert [line.split("\t")[0] for line in lines(call("best", "numbers.db", "--min", "-n", "2"))] == ["result", "1", "2"]


def test_best_names_the_existing_columns(filled, call):
    assert "the columns are result.loss, result.text" in complaint(call("best", "runs.db", "--min", code=2))
    assert "the columns are result.loss, result.text" in complaint(call("best", "runs.db", "lss", "--min", code=2))
    assert "--min or --max" in complaint(call("best", "runs.db", "loss", code=2))
    speval(boom, {"c": "bad"}, filled.with_name("none.db"), progress=False)
    assert "no evaluation is completed yet" in complaint(call("best", "none.db", "loss", "--min", code=2))


# export


def test_export_flattens_args_and_results(here, call):
    call("run", "tune:train", "runs.db", "--space", "grid:lr=0.1;depth=2,8", code=1)
    one, other = csv.DictReader(io.StringIO(call("export", "runs.db").stdout))
    assert list(one)[:7] == [
        "name", "status", "args.lr", "args.depth", "result.loss", "result.scores.f1", "result.curve",
    ]  # fmt: skip
    assert (one["args.depth"], one["result.loss"], one["result.scores.f1"], one["result.curve"]) == (
        "2",
        "0.5",
        "0.5",
        "[1, 2]",
    )
    assert (other["result.loss"], other["error.cause"], other["error.message"]) == ("", "exception", "too deep\nfor this")
    assert one["error.cause"] == ""


def test_export_writes_files_by_their_suffix_completely_or_not_at_all(here, call):
    call("run", "tune:train", "runs.db", "--space", "grid:lr=0.1;depth=2,4")
    call("export", "runs.db", "-o", "out.jsonl")
    assert [json.loads(line) for line in (here / "out.jsonl").read_text().splitlines()] == load_evals(here / "runs.db")
    call("export", "runs.db", "-o", "flat.jsonl", "--flat", "--match", "*depth=4")
    (flat,) = (json.loads(line) for line in (here / "flat.jsonl").read_text().splitlines())
    assert flat["args.depth"] == 4
    call("export", "runs.db", "-o", "out.csv", "--status", "completed")
    assert len((here / "out.csv").read_text().splitlines()) == 3
    assert "nowhere/out.csv" in complaint(call("export", "runs.db", "-o", "nowhere/out.csv", code=2))
    assert "this database does not exist" in complaint(call("export", "no.db", "-o", "none.csv", code=2))
    assert not list(here.glob("*none*")) + list(here.glob(".*"))


def test_text_in_a_csv_is_not_a_formula_and_numbers_stay_numbers(here, call):
    texts = ["=1+1", "+A1", "-A1", "@SUM(A1)", "\t=1", "\r=1", "x\r=1", "-5", "+1.5e3", "a=b", "-"]
    space = {name: {"n": -0.5, "text": name, "none": -math.inf} for name in texts}
    speval(lambda a: [a["n"]], space, here / "x.db", executor="thread", progress=False)
    call("export", "x.db", "-o", "x.csv")
    with (here / "x.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    shown = ["'=1+1", "'+A1", "'-A1", "'@SUM(A1)", "'\t=1", "'\r=1", "x\r=1", "-5", "+1.5e3", "a=b", "'-"]
    assert [row["name"] for row in found] == [row["args.text"] for row in found] == shown
    assert {(row["args.n"], row["args.none"], row["result"]) for row in found} == {("-0.5", "-inf", "[-0.5]")}
    assert [json.loads(line)["name"] for line in lines(call("export", "x.db", "-f", "jsonl"))] == texts


@pytest.mark.parametrize(("mode", "wanted"), [(0o600, 0o600), (0o640, 0o640), (0o664, 0o644), (0o444, 0o644)])
def test_an_export_is_as_private_as_the_database(mode, wanted, here, call):
    speval(lambda x: x, range(2), here / "x.db", executor="thread", progress=False)
    (here / "x.db").chmod(mode)
    call("export", "x.db", "-o", "out.csv")
    assert (here / "out.csv").stat().st_mode & 0o777 == wanted
    (here / "out.csv").chmod(0o600)
    call("export", "x.db", "-o", "out.csv")
    assert (here / "out.csv").stat().st_mode & 0o777 == 0o600, "what was made private stays so"


def test_the_command_works_with_closed_standard_streams(filled):
    for arguments in ("ls runs.db", "export runs.db", "status runs.db"):
        command = f"{COMMAND} {arguments} >&-"
        done = subprocess.run(command, shell=True, cwd=filled.parent, capture_output=True, text=True, timeout=WAIT)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_result_of_ten_thousand_digits_is_listed_shown_and_exported(tmp_path, call):
    code = "import sys; sys.set_int_max_str_digits(0); from speval import speval\n"
    code += "speval(lambda n: 10**n + 7, [10_000, 3], 'runs.db', executor='thread', progress=False)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=WAIT)
    number = f"1{'0' * 9_999}7"
    assert [line.split("\t")[-1] for line in lines(call("ls", "runs.db"))[1:]] == [number, "1007"]
    assert number in call("show", "runs.db", "0").stdout
    assert number in call("export", "runs.db").stdout
    assert number in call("export", "runs.db", "-f", "jsonl").stdout


def test_export_writes_parquet_with_types(here, call):
    import pandas

    call("run", "tune:train", "runs.db", "--space", "grid:lr=0.1,1;depth=2,8", code=1)
    call("export", "runs.db", "-o", "out.parquet")
    frame = pandas.read_parquet(here / "out.parquet")
    assert list(frame["args.lr"]) == [0.1, 0.1, 1.0, 1.0]
    assert frame["args.depth"].dtype == "int64"
    assert frame["result.loss"].isna().tolist() == [False, True, False, True]
    assert list(frame["result.curve"][0]) == [1, 2]


# Steering


def test_retry_makes_the_selected_evaluations_pending(filled, call):
    assert lines(call("retry", "runs.db")) == ["1 evaluation pending again"]
    assert lines(call("retry", "runs.db")) == ["0 evaluations pending again"]
    assert json.loads(call("retry", "runs.db", "--status", "completed", "a", "--json").stdout) == {"retried": 1}
    assert lines(call("retry", "runs.db", "-s", "completed", "--match", "*old*")) == ["1 evaluation pending again"]
    assert "no evaluation is named 'nobody'" in complaint(call("retry", "runs.db", "nobody", code=2))
    assert {e["status"] for e in load_evals(filled)} == {"pending"}


def test_pause_resume_set_and_unset_reach_the_workers(here, call, inside, scripts):
    script = scripts.write(
        """
        import time
        from speval import speval
        def f(args):
            time.sleep(0.3)
            return args
        speval(f, range(10_000), "runs.db", concurrency=2, executor="thread")
        """, "go.py"
    )  # fmt: skip
    running = scripts.start(script)
    db = here / "runs.db"
    wait_for(lambda: db.exists() and "alive" in inside("status", "runs.db").stdout)
    assert lines(call("pause", "runs.db"))[0].startswith("paused; ")

    def seen():
        return json.loads(inside("status", "runs.db", "--json").stdout)

    wait_for(lambda: seen()["in_progress"] == 0)
    completed = seen()["completed"]
    assert "paused" in call("status", "runs.db").stdout
    assert lines(call("set", "runs.db", "concurrency", "7")) == ["concurrency set to 7 for every worker"]
    assert seen()["completed"] == completed
    assert lines(call("resume", "runs.db"))[0].startswith("resumed; ")
    wait_for(lambda: seen()["workers"][0]["running"] == 7)
    call("unset", "runs.db", "concurrency")
    wait_for(lambda: seen()["workers"][0]["running"] <= 2)
    assert seen()["settings"] == {"paused": False, "concurrency": None}
    assert "0 is not in the range" in complaint(call("set", "runs.db", "concurrency", "0", code=2))
    running.kill()


def test_drop_asks_before_it_deletes(filled, call, terminal):
    assert "pass --yes" in complaint(call("drop", "runs.db", "a", code=2))
    assert "name the evaluations to drop" in complaint(call("drop", "runs.db", code=2))
    seen = terminal(COMMAND, "drop", "runs.db", "a", "c")
    seen.wait_for(r"Delete 2 evaluations with all attempts and results\? \[y/N\]")
    seen.type("n\r")
    assert seen.end() == 130
    assert len(load_evals(filled)) == 3
    seen = terminal(COMMAND, "drop", "runs.db", "a")
    seen.wait_for("Delete 1 evaluation")
    seen.type("y\r")
    assert seen.end() == 0
    assert "1 evaluation dropped" in seen.text()
    assert json.loads(call("drop", "runs.db", "--status", "failed", "--yes", "--json").stdout) == {"dropped": 1}
    assert lines(call("drop", "runs.db", "--match", "*old*", "-y")) == ["1 evaluation dropped"]
    assert load_evals(filled) == []


# doctor


def test_doctor_has_facts_and_exits_with_1_when_something_is_broken(filled, call):
    told = call("doctor", "runs.db").stdout
    assert "integrity     ok" in told
    assert "no problems found" in told
    seen = json.loads(call("doctor", "runs.db", "--json", "--quick").stdout)
    assert (seen["facts"]["evaluations"], seen["findings"]) == (3, [])
    call("pause", "runs.db")
    assert "hint: it is paused" in call("doctor", "runs.db").stdout
    connection = sqlite3.connect(filled)
    with connection:
        connection.execute("DELETE FROM attempts WHERE seq = 1")
    connection.close()
    assert "error: 1 evaluation without a status; use a backup of the file" in call("doctor", "runs.db", code=1).stdout


# watch


def test_watch_draws_in_a_terminal_and_ends_when_all_has_ended(here, terminal, scripts):
    script = scripts.write(
        """
        import time
        from speval import speval
        def f(args):
            while not open("go").read():
                time.sleep(0.01)
            if args == 2:
                raise ValueError("boom \\x1b[31m")
        open("go", "w").close()
        speval(f, range(4), "runs.db", concurrency=2, executor="process")
        """, "go.py"
    )  # fmt: skip
    running = scripts.start(script)
    wait_for(lambda: (here / "runs.db").exists() and load_evals(here / "runs.db", status="in_progress"))
    seen = terminal(COMMAND, "watch", "runs.db", "-i", "0.05")
    seen.wait_for("4 evaluations: 0 completed, 2 in progress, 2 pending")
    seen.wait_for(rf"\S+:{running.pid} +alive +\S+ s  0 \d")
    seen.resize(60, 14)
    seen.wait_for(r"━+ +0 %")
    (here / "go").write_text("x")
    assert seen.end() == 1
    assert "4 evaluations: 3 completed, 1 failed (1 exception)" in seen.text()
    assert r"ValueError: boom \x1b[31m" in seen.text()
    assert "Traceback" not in seen.text()
    assert b"\x1b[31mboom" not in seen.raw


def test_watch_ends_at_once_when_all_has_ended_and_keeps_on_demand(filled, call, terminal):
    call("drop", "runs.db", "c", "--yes")
    assert "2 evaluations: 2 completed; no worker" in call("watch", "runs.db").stdout
    seen = terminal(COMMAND, "watch", "runs.db", "--keep", "-i", "0.05")
    seen.wait_for("2 evaluations: 2 completed")
    seen.type("\x03")
    assert seen.end() == 130
    assert "Traceback" not in seen.text()
    assert "speval: interrupted" in seen.text()
    assert b"\x1b[?1049l" in seen.raw  # the terminal has its own screen back
    assert b"\x1b[?25h" in seen.raw  # and its cursor


def test_watch_prints_lines_into_a_pipe_whenever_something_has_changed(filled, call, tmp_path):
    assert call("watch", "runs.db", code=1).stdout.count("\n") == 1
    seen = [json.loads(line) for line in lines(call("watch", "runs.db", "--json", code=1))]
    assert [s["completed"] for s in seen] == [2]
    call("retry", "runs.db")
    process = subprocess.Popen([COMMAND, "watch", "runs.db", "-i", "0.05"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert "2 completed, 1 pending; no worker" in process.stdout.readline()
        speval(lambda args: args, {"c": "bad"}, filled, progress=False)
        assert "3 completed" in process.stdout.read().splitlines()[-1]
        assert process.wait(WAIT) == 0
    finally:
        process.kill()
        process.communicate()


def test_watch_notices_when_its_database_is_taken_away(filled, call, tmp_path):
    call("retry", "runs.db")
    process = subprocess.Popen(
        [COMMAND, "watch", "runs.db", "-i", "0.05"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        process.stdout.readline()
        filled.unlink()
        assert process.wait(WAIT) == 2
        assert "runs.db: was deleted while in use" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


# All of them


LOOKING = [
    ["status"], ["status", "--json"], ["watch"], ["watch", "--json"], ["ls"], ["ls", "--json"], ["ls", "--names"],
    ["show", "a"], ["show", "[b]old\x1b[2J"], ["show", "c"], ["show", "c", "--json"], ["best", "loss", "--min", "-n", "9"],
    ["best", "loss", "--min", "-n", "9", "--json"], ["doctor"], ["doctor", "--json"], ["export", "-f", "jsonl"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", LOOKING, ids=lambda arguments: ascii(" ".join(arguments)))
def test_stored_text_is_neither_a_control_sequence_nor_markup(filled, call, terminal, arguments):
    name, *rest = arguments
    piped = subprocess.run([COMMAND, name, "runs.db", *rest], cwd=filled.parent, capture_output=True, timeout=WAIT).stdout
    assert b"\x1b" not in piped
    assert b"\x07" not in piped
    seen = terminal(COMMAND, name, "runs.db", *rest, columns=300, lines=50)
    assert seen.end() in (0, 1)
    assert b"\x07" not in seen.raw
    assert b"\x1b[2J[" not in seen.raw
    assert b"\x1b]0" not in seen.raw
    for kept in (b"[b]old", b"[bold]red[/bold]", b"[red]x[/red] :smile:"):
        assert seen.raw.count(kept) >= piped.count(kept) // 2


def test_a_table_is_escaped_on_a_terminal_and_exact_in_a_file(filled, call, terminal):
    seen = terminal(COMMAND, "export", "runs.db", columns=300, lines=50)
    assert seen.end() == 0
    assert b"\x1b" not in seen.raw
    assert b"\x07" not in seen.raw
    assert [row["name"] for row in csv.DictReader(io.StringIO(call("export", "runs.db").stdout))][1] == "[b]old\x1b[2J"


@pytest.mark.parametrize("arguments", [a for a in LOOKING if "watch" not in a], ids=lambda a: ascii(" ".join(a)))
def test_subcommands_that_read_do_not_change_the_database(filled, inside, arguments):
    before = filled.read_bytes()
    name, *rest = arguments
    inside(name, "runs.db", *rest)
    assert filled.read_bytes() == before


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "--json"], ["export"], ["export", "-f", "jsonl"]], ids=" ".join)
def test_a_pipe_that_is_closed_early_causes_no_traceback(tmp_path, arguments):
    speval(lambda args: "x" * 1000, range(2000), tmp_path / "runs.db", progress=False)
    name, *rest = arguments
    line = f"{COMMAND} {name} runs.db {' '.join(rest)} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT)
    assert done.stdout.splitlines()[-1] == "141"
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["watch"], ["ls"], ["show", "x"], ["best", "x", "--min"], ["export"], ["retry"], ["pause"], ["resume"],
     ["set", "concurrency", "2"], ["unset", "concurrency"], ["drop", "x", "--yes"], ["doctor"]],
    ids=" ".join,
)  # fmt: skip
def test_a_missing_or_foreign_database_is_named_and_not_changed(tmp_path, inside, arguments):
    name, *rest = arguments
    assert "no.db: this database does not exist" in complaint(inside(name, "no.db", *rest, code=2))
    assert not (tmp_path / "no.db").exists()
    (tmp_path / "notes.txt").write_text("some notes of mine " * 100)
    assert "notes.txt: this is not a speval database" in complaint(inside(name, "notes.txt", *rest, code=2))
    assert (tmp_path / "notes.txt").read_text().startswith("some notes of mine")
    assert "Missing argument 'DB'" in complaint(inside(name, code=2))


def test_a_database_of_0_1_1_is_read_without_changing_it(tmp_path, call):
    db = tmp_path / "old.db"
    connection = sqlite3.connect(db)
    connection.execute("CREATE TABLE evals (name, status, updated, result, args)")
    connection.execute("INSERT INTO evals VALUES ('0', 'completed', 5.0, '2', '1'), ('1', 'pending', NULL, NULL, '3')")
    connection.commit()
    connection.close()
    before = db.read_bytes()
    assert "2 evaluations: 1 completed, 1 pending" in call("status", "old.db").stdout
    assert lines(call("ls", "old.db", "--names", "-s", "completed")) == ["0"]
    assert "attempt 1 completed" in call("show", "old.db", "0").stdout
    assert "speval 0.1.1" in call("doctor", "old.db").stdout
    assert db.read_bytes() == before


@pytest.mark.parametrize("share", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_untrusted_content_is_shown_or_refused_by_name(filled, capsys, monkeypatch, share):
    # In this process, because there are many of them.
    monkeypatch.setattr("speval.cli.watch._Looks.pause", lambda self: signal.raise_signal(signal.SIGINT))
    commands = [["status"], ["status", "--json"], ["ls"], ["ls", "--json"], ["show", "a"], ["show", "c"], ["doctor"]]
    commands += [["doctor", "--json"], ["best", "loss", "--min"], ["export", "-f", "jsonl"], ["watch"], ["watch", "--json"]]
    hostile = ["x\x1b[31m", b"\xff\xfe", None, 2**62, math.inf]
    connection = sqlite3.connect(filled)
    tables = ("evaluations", "fresh", "claimed", "queue", "running", "attempts", "workers", "meta")
    columns = [(table, row[1]) for table in tables for row in connection.execute(f"PRAGMA table_info({table})")]
    connection.close()
    whole = filled.read_bytes()
    for number, ((table, column), value) in enumerate(itertools.product(columns, hostile)):
        filled.write_bytes(whole)
        connection = sqlite3.connect(filled)
        with suppress(sqlite3.IntegrityError, OverflowError), connection:
            connection.execute(
                f"UPDATE {table} SET {column} = ? WHERE {column} = (SELECT max({column}) FROM {table})", (value,)
            )
        connection.close()
        # With five values and four shares, every command meets every column.
        for name, *rest in commands[number % share :: share]:
            with suppress(SpevalError, click.ClickException, click.Abort, KeyboardInterrupt):
                command.main([name, str(filled), *rest], prog_name="speval", standalone_mode=False)
            assert "\x1b" not in capsys.readouterr().out, (table, column, value, name)


def test_the_same_commands_work_on_a_postgresql_url_and_show_no_password(here, call, postgres, terminal):
    url = postgres.url(namespace="command", password="sesame")
    call("run", "tune:train", url, "--space", "grid:lr=0.1,0.2;depth=2,8", code=1)
    assert lines(call("status", url))[0] == "4 evaluations: 2 completed, 2 failed (2 exception)"
    assert lines(call("ls", url, "--names", "--match", "*depth=2")) == ["lr=0.1;depth=2", "lr=0.2;depth=2"]
    assert "ValueError: too deep" in call("show", url, "lr=0.1;depth=8").stdout
    assert json.loads(call("best", url, "loss", "--min", "--json").stdout)["value"] == 0.5
    assert len(lines(call("export", url, "-f", "jsonl"))) == 4
    assert "integrity" in call("doctor", url).stdout or "speval" in call("doctor", url).stdout
    call("pause", url)
    call("set", url, "concurrency", "3")
    assert "paused, concurrency set to 3" in call("status", url).stdout
    call("resume", url)
    assert lines(call("drop", url, "--cause", "exception", "-y")) == ["2 evaluations dropped"]
    assert lines(call("retry", url, "-s", "completed", "lr=0.1;depth=2")) == ["1 evaluation pending again"]
    call("run", "tune:train", url, "--space", "grid:lr=0.1,0.2;depth=2")
    seen = terminal(COMMAND, "watch", url, columns=140)
    assert seen.end() == 0
    assert "2 evaluations: 2 completed" in seen.text()
    assert b"sesame" not in seen.raw
    assert "no evaluation is named 'x'" in (told := complaint(call("show", url, "x", code=2)))
    assert "sesame" not in told


def test_every_subcommand_has_help_and_three_shells_have_completion(call, inside):
    told = call("--help").stdout
    for name in ("run", "status", "watch", "ls", "show", "best", "export", "retry", "pause", "resume", "set", "unset", "drop"):
        assert f"\n  {name} " in told
        assert "--help" in inside(name, "--help").stdout
    assert call("--version").stdout.startswith("speval ")
    assert "Commands:" in inside(code=2).stdout
    for shell in ("bash", "zsh", "fish"):
        assert "_SPEVAL_COMPLETE" in inside("completion", shell).stdout
    assert "No such command 'sttus'" in complaint(inside("sttus", code=2))


def test_a_shell_completes_subcommands_options_and_names(filled):
    def completed(line: str) -> list[str]:
        words = line.split(" ")
        env = os.environ | {"_SPEVAL_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": words[-1]}
        done = subprocess.run([COMMAND], cwd=filled.parent, env=env, capture_output=True, text=True, timeout=WAIT)
        assert done.stderr == ""
        return [entry.partition(",")[2] for entry in done.stdout.split()]

    assert completed("speval st") == ["status"]
    assert "--exit-code" in completed("speval status --e")
    assert completed("speval show runs.db a") == ["a"]
    assert completed("speval show no.db a") == []
    assert completed("speval ls runs.db --status c") == ["completed"]


ODD = ("zz;touch PWNED;#", "yy`touch PWNED`$(touch PWNED)", "lr=0.1;depth=2", "~x, y!'\"\\*")
SHELLS = {
    "bash": (("--norc", "--noprofile", "-i"), 'eval "$(speval completion bash)"'),
    "zsh": (("-f", "-i"), 'autoload -U compinit; compinit -u -D; eval "$(speval completion zsh)"'),
    "fish": (("--no-config", "-i"), "speval completion fish | source"),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_completed_name_is_always_one_quoted_word(shell, terminal, tmp_path, monkeypatch):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    speval(lambda x: x, dict.fromkeys(ODD, 1), tmp_path / "x.db", executor="thread", progress=False)
    monkeypatch.setenv("PATH", f"{Path(COMMAND).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    options, setup = SHELLS[shell]
    typing = terminal(shell, *options, columns=150)
    typing.type(f"{setup}; echo re'a'dy\n")
    typing.wait_for("(?m)^ready")
    for typed, name in zip(("z", "y", "lr", "\\~"), ODD, strict=True):
        typing.type(f"speval show x.db {typed}\t\n")
        typing.wait_for(f"(?m)^name      {re.escape(name)}$")
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    ("line", "replaced", "offered"),
    [
        ("a", "a", [r"a\;"]),  # as far as both go
        (r"a\;", r"a\;", [r"a\;\`b", r"a\;\ c", " "]),
        ("'a;", "a;", ["'a;`b'", "'a; c'", " "]),
        ('"a; ', "a; ", ['"a; c"']),
        ("k=1:", "", ["v"]),  # bash replaces what follows the last "=" or ":"
        ("~", "~", [r"\~u"]),
        ("q", "q", ["q"]),  # another one has a character that a terminal would obey
    ],
)
def test_bash_completes_names_within_open_quotes(line, replaced, offered, tmp_path):
    names = ("a;`b", "a; c", "k=1:v", "~u", "q", "q\x1b[2J")
    speval(lambda x: x, dict.fromkeys(names, 1), tmp_path / "x.db", executor="thread", progress=False)
    env = os.environ | {"_SPEVAL_COMPLETE": "bash_complete", "COMP_WORDS": f"speval show x.db {line}", "COMP_CWORD": replaced}
    done = subprocess.run([COMMAND], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=WAIT)
    assert done.stderr == ""
    assert [entry.partition(",")[2] for entry in done.stdout.splitlines()] == offered


def test_python_m_speval_is_the_same_command(filled, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "speval", "status", "runs.db"], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("3 evaluations: ")


def test_output_is_readable_on_a_terminal_with_ascii_only(filled, tmp_path):
    speval(boom, {"ünï→": 1}, tmp_path / "odd.db", progress=False)
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([COMMAND, "ls", "odd.db"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 0
    assert r"\xfcn\xef\u2192" in done.stdout


def test_the_library_does_not_import_what_only_the_command_needs():
    code = "import sys, speval; print({'click', 'rich', 'speval.cli', 'pandas', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
