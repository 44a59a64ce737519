"""What a big eval space costs: each evaluation, seeding, starting again, reading everything, memory.

Owns the tables ``sizes`` and ``million``. Invariant: what is measured goes through the public functions, on a database that
they have made.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from speval import load_evals, retry, speval

from .child import finish
from .harness import Figures, by_turns, measured, medians, shown, table

BIG = 1_000_000
_SMALL = 10  # small calls for each big one
_LEFT = 100  # one of so many is left to do, of a database that is nearly done


def peak() -> float:
    """Return the most memory that this process has had, in MB."""
    # Not getrusage(), which counts what the process was forked from too.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


# In processes of their own


def whole(count: int, executor: str, copies: int, copy: int) -> Callable[[], Figures]:
    """Prepare a call over a whole space; it tells the time from its first evaluation to its last one and its memory."""
    ended: list[float] = [0.0, 0.0]

    def note(args: Any) -> Any:
        ended[1] = time.perf_counter()
        ended[0] = ended[0] or ended[1]
        return args

    async def note_async(args: Any) -> Any:
        return note(args)

    def run() -> Figures:
        before, started = peak(), time.perf_counter()
        given: Any = {"concurrency": 100} if executor == "coroutine" else {}
        given["executor"] = executor
        speval(note_async if executor == "coroutine" else note, range(count), "runs.db", progress=False, **given)
        return {"memory": peak() - before, "first": ended[0] - started, "span": ended[1] - ended[0]}

    return run


def first_call(count: int, copies: int, copy: int) -> Callable[[], None]:
    """Prepare a call that ends with its first evaluation, and tells how long that took to begin."""
    started = 0.0

    async def tell(args: Any) -> None:
        finish({"seconds": time.perf_counter() - started, "memory": peak() - before})

    before = peak()

    def run() -> None:
        nonlocal started
        started = time.perf_counter()
        speval(tell, range(count), "runs.db", progress=False)

    return run


def put_back(count: int, copies: int, copy: int) -> Callable[[], None]:
    """Prepare to put the last hundredth back, as if a run had ended just before."""

    def run() -> None:
        assert retry("runs.db", [str(i) for i in range(count - count // _LEFT, count)], status="completed") == count // _LEFT

    return run


def load(count: int, copies: int, copy: int) -> Callable[[], None]:
    """Prepare to read everything."""

    def run() -> None:
        assert len(load_evals("runs.db")) == count

    return run


# Here


def measure(rounds: int, share: float, pythons: dict[str, str]) -> Figures:
    big = max(10_000, int(BIG * share))
    here = "benchmarks.sizes"
    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder)

        def kept(executor: str) -> Figures:
            for file in done.glob("runs.db*"):
                file.unlink()
            return measured(f"{here}:whole", folder=done, count=big, executor=executor)

        small: dict[str, Callable[[], Figures]] = {}
        large: dict[str, Callable[[], Figures]] = {}
        for executor in ("coroutine", "thread"):
            for count in (1, 1_000, big // 10):
                one = partial(measured, f"{here}:whole", count=count, executor=executor)
                (large if count > 1_000 else small)[f"{executor}|{count}"] = one
            large[f"{executor}|{big}"] = partial(kept, executor)
        by_round = [by_turns(_SMALL, small) | by_turns(1, large) for _ in range(min(rounds, 3))]
        whole_spaces = {key: medians([one[key] for one in by_round]) for key in small | large}
        for key, figures in whole_spaces.items():
            executor, _, size = key.partition("|")
            # What a call with one evaluation takes is the price of a call.
            figures["each"] = 1e6 * (figures["seconds"] - whole_spaces[f"{executor}|1"]["seconds"]) / int(size)

        def put_back_and_do() -> Figures:
            measured(f"{here}:put_back", folder=done, count=big)
            return measured(f"{here}:whole", folder=done, count=big, executor="coroutine")

        few = partial(measured, f"{here}:whole", count=big // _LEFT, executor="coroutine")
        last = by_turns(min(rounds, 3), {"alone": few, "last": put_back_and_do})
        for figures in last.values():
            figures["each"] = 1e6 * figures["span"] / (big // _LEFT - 1)
        measured(f"{here}:put_back", folder=done, count=big)
        moments = by_turns(
            min(rounds, 3),
            {
                "seed": partial(measured, f"{here}:first_call", count=big),
                "resume": partial(measured, f"{here}:first_call", folder=done, count=big),
                "load": partial(measured, f"{here}:load", folder=done, count=big),
            },
        )
    return {"count": big, "whole": whole_spaces, "last": last, "moments": moments}


def tables(found: Figures) -> dict[str, str]:
    big = found["count"]
    rows = []
    for key, figures in found["whole"].items():
        executor, count = key.split("|")
        first, each, memory = (shown(figures[what]) for what in ("first", "each", "memory"))
        rows.append([f"{int(count):,}", executor, f"{shown(figures['seconds'])} s", f"{each} µs", f"{first} s", f"{memory} MB"])
    head = [" evaluations", "executor", " whole call", " each", " to the first call", " growth of memory"]
    moments = found["moments"]
    shown_as = {
        "seed": f"start to first call, new database, {big:,} evaluations",
        "resume": f"start to first call, {big:,} evaluations of which {big // _LEFT:,} are left",
        "load": f"load_evals of {big:,}",
    }
    others = [[text, f"{shown(moments[key]['seconds'])} s"] for key, text in shown_as.items()]
    others += [
        [f"{big // _LEFT:,} evaluations in a separate database, each", f"{shown(found['last']['alone']['each'])} µs"],
        [f"the last {big // _LEFT:,} evaluations of {big:,}, each", f"{shown(found['last']['last']['each'])} µs"],
    ]
    return {"sizes": table(head, rows), "million": table(["what", " median"], others)}
