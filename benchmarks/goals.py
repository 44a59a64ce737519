"""What speval wants to be quick enough for, and whether it is.

Owns the goals. Invariant: each is a ratio of figures of one run, or a figure, beside its bound; nothing is measured here.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from .candidates import CANDIDATES, COROUTINES, GATHER, JOBLIB, LIMIT, POOL, PROCESSES, THREADS
from .harness import Figures, shown, table

_OURS = (COROUTINES, THREADS, PROCESSES)


class Goal(NamedTuple):
    """One goal.

    Attributes:
        what: What is compared with what.
        figure: What was measured, or None.
        bound: What it shall be.
        at_least: Whether it shall be more than the bound, not less.
        unit: Of figure and bound.
    """

    what: str
    figure: float | None
    bound: float
    at_least: bool = True
    unit: str = ""

    @property
    def holds(self) -> bool | None:
        if self.figure is None:
            return None
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound


def goals(found: Figures) -> Iterator[Goal]:
    """Yield the goals that can be told from what was measured."""
    if "peers" in found:
        yield from _beside_peers(found["peers"])
    if "copies" in found:
        speed, fair = found["copies"]["speed"], found["copies"]["fairness"]
        one, two = (speed[f"{THREADS}|compute_1ms|{copies}"].get("per_second") for copies in (1, 2))
        yield Goal("two copies beside one, 1 ms of CPU", _ratio(two, one), 1.0)
        apart = [figures["apart"] for figures in fair.values()]
        worst = None if None in apart else max(apart)
        yield Goal(
            "a late copy ends beside the first one, evaluations of 1 s: seconds apart, at worst", worst, 1.1, False, " s"
        )
    if "sizes" in found:
        yield from _of_size(found["sizes"])
    if "start" in found:
        yield from _of_start(found["start"])


def _beside_peers(found: Figures) -> Iterator[Goal]:
    nothing = {name: figures.get("per_second") for name, figures in found["nothing"].items()}
    sleep = {name: figures.get("per_second") for name, figures in found["sleep"].items()}
    for ours in (COROUTINES, THREADS):
        yield Goal(f"{ours} beside the sqlite3 loop, a no-op", _ratio(nothing[ours], nothing[LIMIT]), 0.6)
    yield Goal(f"{PROCESSES} beside ProcessPoolExecutor, a no-op", _ratio(nothing[PROCESSES], nothing[POOL]), 2.0)
    yield Goal(f"{PROCESSES} beside joblib, a no-op", _ratio(nothing[PROCESSES], nothing[JOBLIB]), 0.5)
    for name, candidate in CANDIDATES.items():
        if candidate.is_durable and name not in (LIMIT, *_OURS):
            slowest = min((nothing[ours] for ours in _OURS if nothing[ours]), default=None)
            yield Goal(f"speval's slowest beside {name}, a no-op", _ratio(slowest, nothing[name]), 3.0)
    yield Goal("1000 coroutines beside asyncio.gather, 10 ms of sleep", _ratio(sleep[COROUTINES], sleep[GATHER]), 0.8)


def _of_size(found: Figures) -> Iterator[Goal]:
    big = found["count"]
    for executor in ("coroutine", "thread"):
        few, many = (found["whole"][f"{executor}|{count}"] for count in (1000, big))
        each = _ratio(many.get("each"), few.get("each"))
        yield Goal(f"each of {big:,} beside each of 1,000, {executor}", each, 1.2, False)
        yield Goal(f"memory for {big:,} evaluations, {executor}", many.get("memory"), 150, False, " MB")
    last = found["last"]
    each = _ratio(last["last"].get("each"), last["alone"].get("each"))
    yield Goal(f"each of the last {big // 100:,} of {big:,} beside as many alone", each, 1.2, False)
    yield Goal(
        f"{big:,} evaluations, 99 % done: start to first call", found["moments"]["resume"].get("seconds"), 3, False, " s"
    )
    yield Goal(f"{big:,} evaluations, new: start to first call", found["moments"]["seed"].get("seconds"), 10, False, " s")


def _of_start(found: Figures) -> Iterator[Goal]:
    bare = found["bare"]["cpu"]
    yield Goal("`from speval import speval`: CPU", 1000 * (found["names"]["cpu"] - bare), 60, False, " ms")
    yield Goal("`speval --help` beside a bare interpreter: CPU", _ratio(found["help"]["cpu"], bare), 5, False)
    first = _ratio(found["first_result"]["seconds"], found["bare"]["seconds"])
    yield Goal("a process executor's first result beside a bare interpreter's start", first, 2.0, False)
    yield Goal("a call with a single evaluation", 1000 * found["one_call"]["each"], 17.5, False, " ms")


def _ratio(one: Any, other: Any) -> float | None:
    return one / other if one and other and one > 0 < other else None


def goal_table(found: Figures) -> str:
    rows = []
    for goal in goals(found):
        bound = f"{'at least' if goal.at_least else 'at most'} {goal.bound:g}{goal.unit}"
        figure = "not measured" if goal.figure is None else f"{shown(goal.figure)}{goal.unit}"
        holds = "" if goal.holds is None else "yes" if goal.holds else "**no**"
        rows.append([goal.what, bound, figure, holds])
    return table(["what", " goal", " measured", "holds"], rows)
