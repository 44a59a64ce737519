"""More copies of one script: how much faster they are, and whether a late one gets its share.

Owns the tables ``copies`` and ``fairness``. Invariant: copies are processes that share nothing but the folder, started together
where speed is measured and one after the other where fairness is.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from speval import load_evals, speval

from .candidates import CANDIDATES, LIMIT, THREADS
from .harness import Child, Figures, by_turns, measured, per_second, shown, table
from .work import SHOWN

COPIES = (1, 2, 4)
_SHORT = {"compute_1ms": 2_000, "compute": 300}  # evaluations
_LONG = 16  # evaluations of a second


def measure(rounds: int, share: float, pythons: dict[str, str]) -> Figures:
    entries: dict[str, Callable[[], Figures]] = {}
    counts: dict[str, int] = {}
    works = [(name, "nothing", candidate.count) for name, candidate in CANDIDATES.items() if candidate.is_script]
    works += [(name, work, count) for work, count in _SHORT.items() for name in (LIMIT, THREADS)]
    for name, work, count in works:
        for copies in COPIES:
            key = f"{name}|{work}|{copies}"
            counts[key] = max(20, int(count * share))
            given: dict[str, Any] = {
                "candidate": name,
                "work": work,
                "count": counts[key],
                "python": pythons.get(name, pythons[""]),
            }
            entries[key] = partial(measured, "benchmarks.candidates:ready", copies=copies, **given)
    figures = by_turns(min(rounds, 3), entries)
    rates = {key: {"per_second": per_second(counts[key], one), **one} for key, one in figures.items()}
    return {"speed": rates, "fairness": fairness()}


# Fairness


def late(executor: str, short: int, copies: int, copy: int) -> Callable[[], None]:
    """Prepare a copy that evaluates short evaluations and then some of a second."""

    def run() -> None:
        options: Any = {"executor": executor, "concurrency": 2, "progress": False}
        speval(time.sleep, [0] * short + [1] * _LONG, "runs.db", **options)

    return run


def fairness() -> Figures:
    """Start a second copy while the first one evaluates what takes a second each."""
    return {f"{executor}|{short}": _apart(executor, short) for executor in ("thread", "process") for short in (0, 3000)}


def _apart(executor: str, short: int) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        given: Any = {"executor": executor, "short": short, "copies": 2}
        one, other = (Child("benchmarks.copies:late", Path(folder), copy=copy, **given) for copy in range(2))
        with one, other:
            for copy in (one, other):
                copy.told()
            one.go()
            db = Path(folder, "runs.db")
            while not db.exists() or len(load_evals(db, status="completed")) < short + 3:
                time.sleep(0.05)
            other.go()
            for copy in (one, other):
                copy.told()
        ends: dict[str, float] = {}
        done: dict[str, int] = {}
        for e in load_evals(db)[short:]:
            who = str(e["worker"])
            ends[who] = max(ends.get(who, 0), (e["started"] or 0) + (e["duration"] or 0))
            done[who] = done.get(who, 0) + 1
        apart = abs(max(ends.values()) - min(ends.values())) if len(ends) == 2 else None
        return {"apart": apart, "evaluations": sorted(done.values())}


def tables(found: Figures) -> dict[str, str]:
    speed = found["speed"]
    rows = []
    for name, work in dict.fromkeys(tuple(key.split("|")[:2]) for key in speed):
        figures = [speed[f"{name}|{work}|{copies}"] for copies in COPIES]
        rates = [one["per_second"] for one in figures]
        ratio = rates[1] / rates[0] if rates[0] and rates[1] else None
        rows.append([name, SHOWN[work], *(shown(one["per_second"]) or one["why_not"] for one in figures), shown(ratio)])
    head = ["candidate", "evaluations of", *(f" {copies} copies, evaluations/s" for copies in COPIES), " two beside one"]
    head[2] = " 1 copy, evaluations/s"
    fair = []
    for key, figures in found["fairness"].items():
        executor, short = key.split("|")
        few, *many = figures["evaluations"]
        apart = "never" if figures["apart"] is None else f"{figures['apart']:.2f} s"
        fair.append([executor, short, str(few), str(*many), apart])
    fair_head = ["executor", " short ones before", " of 16, the late copy did", " the first one", " ends apart"]
    return {"copies": table(head, rows), "fairness": table(fair_head, fair)}
