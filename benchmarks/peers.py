"""speval beside its peers: evaluations of a function that does nothing, one that sleeps and one that computes.

Owns the tables ``peers``, ``work`` and ``sleeps``. Invariant: all take turns, and each is measured as one started process.
"""

from collections.abc import Callable
from functools import partial

from .candidates import AT_ONCE, CANDIDATES, COROUTINES, GATHER, LIMIT
from .harness import Figures, by_turns, measured, per_second, shown, table
from .work import SHOWN

# Seconds that evaluations which take 10 ms are measured for, if they run as many at once as they can.
_SECONDS = 1.0


def count_of(name: str, work: str, share: float) -> int:
    """Return how many evaluations are measured."""
    candidate = CANDIDATES[name]
    if work == "nothing":
        count = candidate.count
    else:
        at_once = candidate.slots if work in AT_ONCE else 2 if "2 processes" in name else 1
        count = min(candidate.count, int(_SECONDS / 0.01 * at_once))
    return max(20, int(count * share))


def measure(rounds: int, share: float, pythons: dict[str, str]) -> Figures:
    """Measure all candidates with all kinds of work; ``pythons`` has the interpreter of those with their own."""
    found: Figures = {}
    for work in ("nothing", "sleep", "sleep_50ms", "compute"):
        entries: dict[str, Callable[[], Figures]] = {}
        for name in (COROUTINES, GATHER) if work == "sleep_50ms" else CANDIDATES:
            count = count_of(name, work, share)
            given = pythons.get(name, pythons[""])
            entries[name] = partial(
                measured, "benchmarks.candidates:ready", python=given, candidate=name, work=work, count=count
            )
        figures = by_turns(rounds if work == "nothing" else min(rounds, 3), entries)
        found[work] = {
            name: {"evaluations": (count := count_of(name, work, share)), "per_second": per_second(count, one), **one}
            for name, one in figures.items()
        }
    return found


def tables(found: Figures) -> dict[str, str]:
    nothing = found["nothing"]
    limit = nothing[LIMIT].get("per_second")
    rows = []
    for name, figures in nothing.items():
        rate = figures["per_second"]
        cost = 1e6 * figures["cpu"] / figures["evaluations"] if rate else None
        ratio = rate / limit if rate and limit else None
        durable = "yes" if CANDIDATES[name].is_durable else "no"
        rows.append([name, durable, shown(rate) if rate else figures["why_not"], shown(ratio, 2), shown(cost, 2)])
    head = ["candidate", "durable", " evaluations/s", " beside the sqlite3 loop", " µs of CPU each"]
    works = []
    for name, candidate in CANDIDATES.items():
        sleep, compute = found["sleep"][name], found["compute"][name]
        cost = shown(1e6 * sleep["cpu"] / sleep["evaluations"], 2) if sleep["per_second"] else ""
        works.append([name, str(candidate.slots), shown(sleep["per_second"]), cost, shown(compute["per_second"])])
    units = [f"{SHOWN[work]}, evaluations/s" for work in ("sleep", "compute")]
    work_head = ["candidate", " of those that sleep, at once", f" {units[0]}", " µs of CPU each", f" {units[1]}"]
    return {"peers": table(head, rows), "work": table(work_head, works), "sleeps": _sleeps(found)}


def _sleeps(found: Figures) -> str:
    """Return the table that tells what sleeping coroutines cost beside those that are not recorded."""
    rows = []
    for work in AT_ONCE:
        ours, theirs = found[work][COROUTINES], found[work][GATHER]
        rates = [one["per_second"] for one in (ours, theirs)]
        costs = [1e6 * one["cpu"] / one["evaluations"] for one in (ours, theirs)]
        rows.append([SHOWN[work], *map(shown, rates), shown(rates[0] / rates[1]), *(shown(cost, 2) for cost in costs)])
    head = ["1000 at once, of", f" {COROUTINES}, evaluations/s", f" {GATHER}", " the one beside the other"]
    return table([*head, " µs of CPU each, speval", " µs of CPU each, gather"], rows)
