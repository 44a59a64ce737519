"""The progress bar as a person sees it: in a real terminal and a real kernel, beside whatever is printed, and not elsewhere."""

import os
import re
import subprocess
import sys
import textwrap

import nbformat
import pytest
from nbclient import NotebookClient

from .conftest import WAIT, wait_for

BAR = r"^ *\d+%\|.*\| \d+/\d+"


@pytest.fixture
def script(scripts, terminal):
    """Start a script in a terminal."""

    def start(code: str, name: str = "script.py", **options):
        return terminal(sys.executable, str(scripts.write(code, name)), **options)

    return start


def lines(seen, *, bar: bool = False) -> list[str]:
    """Return the lines on the screen that are the bar's, or all others."""
    shown = [line for line in seen.text().split("\n") if line]
    return [line for line in shown if bool(re.search(BAR, line)) is bar]


GATED = """
import os, sys, time
from speval import speval

def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.01)
"""


def test_the_bar_shows_counts_rate_and_time_left(script, tmp_path):
    seen = script(
        GATED
        + """
def f(args):
    if args >= 4:
        wait_for("go")
    time.sleep(0.05)
    if args == 1:
        raise ValueError
    return args
speval(f, range(8), "runs.db", concurrency=2, executor="thread")
"""
    )
    seen.wait_for(r" 50%\|█+ +\| 4/8, 1 failed, 2 running, [\d.]+/s, [\d.]+ s left\n")
    (tmp_path / "go").touch()
    assert seen.end() == 0
    (bar,) = lines(seen, bar=True)
    assert re.fullmatch(r"100%\|█+\| 8/8, 1 failed, [\d.]+/s, in [\d.]+ s", bar)
    assert len(bar) < seen.screen.columns


def test_the_bar_counts_what_other_workers_run(script, scripts, tmp_path):
    code = (
        GATED
        + """
def f(args):
    wait_for("go")
print(speval(f, range(10), "runs.db", concurrency=int(sys.argv[1]), executor="thread"))
"""
    )
    path = scripts.write(code, "other.py")
    scripts.start(path, "3")
    wait_for(lambda: (tmp_path / "runs.db").exists())
    seen = script(code.replace("int(sys.argv[1])", "2"))
    seen.wait_for(r"0/10, 2 running here, 3 elsewhere\n")
    (tmp_path / "go").touch()
    assert seen.end() == 0


@pytest.mark.parametrize("executor", ["thread", "process", "coroutine"])
def test_output_of_the_function_appears_above_the_bar_unchanged(script, executor):
    say = "in_one_piece" if executor == "thread" else "print"  # threads mix the pieces of their prints, bar or no bar
    seen = script(
        f"""
        import asyncio, sys, time
        from speval import speval
        def in_one_piece(*words, file):
            file.write(" ".join(map(str, words)) + "\\n")
        say = {say}
        def f(args):
            say("out", args, sys.stdout.isatty(), file=sys.stdout)
            say("err", args, sys.stderr.isatty(), file=sys.stderr)
            time.sleep(0.06)
        async def g(args):
            f(args)
            await asyncio.sleep(0)
        speval({"g" if executor == "coroutine" else "f"}, range(40), "runs.db", concurrency=2, executor={executor!r})
        """,
        lines=12,
    )
    assert seen.end() == 0
    expected = [f"{stream} {n} True" for n in range(40) for stream in ("out", "err")]
    assert sorted(lines(seen)) == sorted(expected)
    assert seen.text().rstrip().split("\n")[-1].startswith("100%|")
    assert len(lines(seen, bar=True)) == 1


def test_output_of_an_older_logging_handler_appears_above_the_bar(script):
    seen = script(
        """
        import logging, time
        logging.basicConfig(level="INFO", format="log: %(message)s")
        from speval import speval
        def f(args):
            time.sleep(0.15)
            logging.info("%s", args)
        speval(f, range(8), "runs.db")
        """
    )
    assert seen.end() == 0
    assert [line for line in lines(seen) if re.fullmatch(r"log: \d", line)] == [f"log: {n}" for n in range(8)]
    assert all(line.startswith("log: ") for line in lines(seen))


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_a_line_printed_in_pieces_stays_one_line(script, tmp_path, executor):
    seen = script(
        GATED
        + f"""
def f(args):
    print("begun ...", end="", flush=True)
    wait_for("go")
    print(" done")
speval(f, [1], "runs.db", concurrency=1, executor={executor!r})
"""
    )
    seen.wait_for(rf"(?m)^begun \.\.\.\n{BAR[1:]}")  # the bar stands below it while nothing comes
    (tmp_path / "go").touch()
    assert seen.end() == 0
    assert lines(seen) == ["begun ... done"]


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_prints_without_a_buffer_are_not_lost(scripts, terminal, executor):
    path = scripts.write(
        f"""
        import time
        from speval import speval
        def f(args):
            print("line", args)
            time.sleep(0.06)
        speval(f, range(20), "runs.db", executor={executor!r})
        """
    )
    seen = terminal(sys.executable, "-u", str(path))
    assert seen.end() == 0
    assert lines(seen) == [f"line {n}" for n in range(20)]


def test_a_bar_of_the_function_is_not_damaged(script, tmp_path):
    seen = script(
        """
        import sys, time
        from speval import speval
        def f(args):
            for n in range(5):
                print(f"\\repoch {n}", end="", file=sys.stderr, flush=True)
                time.sleep(0.1)
            print(file=sys.stderr)
        speval(f, [1, 2], "runs.db", concurrency=1, executor="process")
        """
    )
    assert seen.end() == 0
    assert lines(seen) == ["epoch 4", "epoch 4"]


def test_the_bar_fits_the_width_of_the_window(script, tmp_path):
    seen = script(
        GATED
        + """
def f(args):
    print(os.get_terminal_size().columns)
    wait_for(f"go {args}")
speval(f, range(2), "runs.db", executor="process")
"""
    )
    seen.wait_for(r"(?m)^100\n")
    seen.resize(50, 20)
    seen.wait_for(r"\n {0,3}0%\|[^\n]{20,44}\| 0/2, 1 running\n")
    (tmp_path / "go 0").touch()
    seen.wait_for(r"(?m)^50$")
    (tmp_path / "go 1").touch()
    assert seen.end() == 0


def test_ctrl_c_leaves_a_final_bar_and_an_unchanged_terminal(script):
    seen = script(
        """
        import time
        from speval import speval
        try:
            speval(lambda args: time.sleep(600), range(2), "runs.db", concurrency=2)
        except KeyboardInterrupt:
            print("interrupted")
        print("after")
        """
    )
    seen.wait_for("0/2, 2 running")
    seen.type("\x03")
    assert seen.end() == 0
    assert lines(seen)[-2:] == ["interrupted", "after"]
    assert len(lines(seen, bar=True)) == 1
    for mode in (b"\x1b[?", b"\x1b[r", b"\x1b[1;", b"\x1b7"):  # of the screen, the cursor, the part that scrolls
        assert mode not in seen.raw


def test_output_before_an_abort_is_kept_with_pythons_crash_report(script):
    seen = script(
        """
        import faulthandler, os, time
        faulthandler.enable()
        from speval import speval
        def f(args):
            print("about to die")
            os.abort()
        speval(f, [1], "runs.db", executor="thread")
        """
    )
    assert seen.end() == -6
    assert "about to die\n" in seen.text()
    assert "Fatal Python error: Aborted" in seen.text()


def test_output_of_a_forked_child_appears(script):
    seen = script(
        """
        import os, time
        from speval import speval
        def f(args):
            if os.fork() == 0:
                print("child", args, flush=True)
                os._exit(0)
            os.wait()
            print("parent", args)
        speval(f, range(30), "runs.db", executor="thread")
        """
    )
    assert seen.end() == 0
    assert sum(line.endswith(("child 7", "parent 7")) for line in lines(seen)) == 2


def test_an_abandoned_process_keeps_printing_and_blocks_nothing(script, tmp_path):
    seen = script(
        """
        import os, subprocess, sys, time
        from speval import speval
        CODE = '''
        import os, time
        print("left", flush=True)
        while not os.path.exists("go"):
            time.sleep(0.01)
        print("still here", flush=True)
        '''.replace("\\n        ", "\\n")
        def f(args):
            subprocess.Popen([sys.executable, "-c", CODE], start_new_session=True)
            time.sleep(0.5)
        speval(f, [1], "runs.db", executor="process")
        print("over")
        time.sleep(600)
        """
    )
    seen.wait_for("over")
    assert "left" in seen.text()
    (tmp_path / "go").touch()
    seen.wait_for("still here")


def test_streams_are_restored_after_the_call(script):
    seen = script(
        """
        import sys
        from speval import as_completed, speval
        before = [dict(vars(s)) for s in (sys.stdout, sys.stderr)]
        speval(lambda args: args, range(3), "runs.db")
        for e in as_completed(lambda args: args, range(9), "runs.db"):
            print("got", e["name"])
            if e["name"] == "5":
                break
        print("same:", before == [dict(vars(s)) for s in (sys.stdout, sys.stderr)])
        """
    )
    assert seen.end() == 0
    assert "same: True" in lines(seen)
    assert "got 4" in lines(seen)


def test_redirected_output_goes_to_its_file_and_the_bar_to_the_terminal(scripts, terminal, tmp_path):
    path = scripts.write(
        """
        from speval import speval
        print(speval(lambda args: print("line", args), range(20), "runs.db", concurrency=2, executor="process"))
        """
    )
    seen = terminal("sh", "-c", f"{sys.executable} {path} > out.txt")
    assert seen.end() == 0
    assert len(lines(seen, bar=True)) == 1
    assert lines(seen) == []
    printed = (tmp_path / "out.txt").read_text().splitlines()
    assert sorted(printed[:-1]) == sorted(f"line {n}" for n in range(20))
    assert printed[-1].startswith("20 evaluations: ")


QUIET = """
from speval import speval
import sys
speval(lambda args: print("line", args), range(3), "runs.db", {options})
"""


def test_there_is_no_bar_without_a_terminal(scripts, terminal):
    path = scripts.write(QUIET.format(options=""))
    piped = subprocess.run([sys.executable, path], cwd=path.parent, capture_output=True, text=True, timeout=WAIT)
    assert piped.stderr == ""
    assert "\x1b" not in piped.stdout
    # In the background of a terminal, where twenty copies would draw over each other; sh -m gives each a process group.
    seen = terminal("bash", "-mc", f"{sys.executable} {path} & wait")
    assert seen.end() == 0
    assert lines(seen, bar=True) == []


def test_the_bar_can_be_forced_on_and_off(script, scripts, tmp_path):
    seen = script(QUIET.format(options="progress=False"))
    assert seen.end() == 0
    assert lines(seen) == ["line 0", "line 1", "line 2"]
    assert lines(seen, bar=True) == []
    path = scripts.write(QUIET.format(options="progress=True").replace("runs.db", "other.db"))
    piped = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT)
    assert re.search(r"100%\|.*\| 3/3", piped.stderr)


def test_the_total_of_the_bar_grows_with_a_lazy_space(script):
    seen = script(
        """
        import asyncio
        from speval import speval
        async def space():
            for n in range(6):
                await asyncio.sleep(0.2)
                yield n
        print(speval(lambda args: args, space(), "runs.db"))
        """
    )
    assert seen.end() == 0
    assert re.fullmatch(r"100%\|█+\| 6/6, .*", lines(seen, bar=True)[-1])


def run_notebook(folder, *cells: str) -> list:
    """Run cells in a real kernel and return what each of them shows."""
    # With this set, a kernel does not show what its processes print.
    env = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(textwrap.dedent(cell)) for cell in cells]
    NotebookClient(notebook, timeout=WAIT, resources={"metadata": {"path": str(folder)}}).execute(env=env)
    return [cell.outputs for cell in notebook.cells]


def test_a_notebook_shows_the_bar_next_to_the_output(tmp_path):
    define, here, there = run_notebook(
        tmp_path,
        """
        import time
        from speval import speval
        def f(args):
            print("line", args)
            time.sleep(0.05)
            if args == 2:
                raise ValueError
            return args
        """,
        "print(speval(f, range(6), 'a.db'))",
        "print(speval(f, range(6), 'b.db', concurrency=2))",
    )
    assert define == []
    for outputs in (here, there):
        out = "".join(o.text for o in outputs if o.get("name") == "stdout")
        err = "".join(o.text for o in outputs if o.get("name") == "stderr")
        assert sorted(re.findall(r"(?m)^line \d$", out)) == [f"line {n}" for n in range(6)]
        assert "6 evaluations: 5 completed, 1 failed" in out
        assert re.search(r"100%\|█+\| 6/6, 1 failed, [\d.,]+/s, in ", err)
