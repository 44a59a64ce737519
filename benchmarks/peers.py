"""speval beside its peers: evaluations of a function that does nothing, one that sleeps and one that computes.

Owns the tables ``peers`` and ``work``. Invariant: all take turns, and each is measured as one started process.
"""

from functools import partial

from .candidates import CANDIDATES, LIMIT
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
        at_once = candidate.slots if work == "sleep" else 2 if "2 processes" in name else 1
        count = min(candidate.count, int(_SECONDS / 0.01 * at_once))
    return max(20, int(count * share))


def measure(rounds: int, share: float, pythons: dict[str, str]) -> Figures:
    """Measure all candidates with all kinds of work; ``pythons`` has the interpreter of those with their own."""
    found: Figures = {}
    for work in ("nothing", "sleep", "compute"):
        entries = {}
        for name in CANDIDATES:
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
    for name in nothing:
        sleep, compute = (found[work][name]["per_second"] for work in ("sleep", "compute"))
        works.append([name, str(CANDIDATES[name].slots), shown(sleep), shown(compute)])
    work_head = [
        "candidate",
        " at once, of those that sleep",
        f" {SHOWN['sleep']}, evaluations/s",
        f" {SHOWN['compute']}, evaluations/s",
    ]
    return {"peers": table(head, rows), "work": table(work_head, works)}
