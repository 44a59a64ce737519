"""What kill -9 costs: many copies of a script, killed and stopped again and again, and everything compared afterwards.

Run: ``python -m benchmarks.kills --kills 1000``, which takes about six minutes on two cores. The first part kills copies before
and after each commit, the second at random moments. It ends with 1 if anything was lost or recorded twice; the folders of the
rounds in which that happened are kept.
"""

import argparse
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from tests.crashes import Figures, Scenario, faults_after, held_by_a_dead_copy, kill_at_each_step, old_database, storm


def scenarios(folder: Path) -> dict[str, Scenario]:
    old = folder / "old.db"
    old_database(old, 300)
    (folder / "held").mkdir()
    held = held_by_a_dead_copy(folder / "held", 300)
    plain = {"lease": 1.0}
    return {
        "seeding": Scenario(30_000, {"executor": "coroutine", "concurrency": 4} | plain, points=list(range(1, 10))),
        "coroutines": Scenario(300, {"executor": "coroutine", "concurrency": 4} | plain),
        "threads": Scenario(300, {"executor": "thread", "concurrency": 2} | plain),
        "processes": Scenario(100, {"executor": "process", "concurrency": 2} | plain),
        "a pool": Scenario(100, {"executor": "pool", "concurrency": 2} | plain),
        "migrating": Scenario(300, {"executor": "thread", "concurrency": 1} | plain, begin_with=old),
        "taking back": Scenario(300, {"executor": "coroutine", "concurrency": 4} | plain, begin_with=held),
    }


def at_each_step(folder: Path) -> list[str]:
    faults = []
    for name, scenario in scenarios(folder).items():
        one = folder / name
        one.mkdir()
        kills = kill_at_each_step(one, scenario)
        found = [fault for kill in kills for fault in faults_after(kill, scenario.count)]
        print(f"{name}: killed before and after {len({kill.point for kill in kills})} steps, {len(found)} faults", flush=True)
        faults += found
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--copies", type=int, default=4, help="alive at a time")
    parser.add_argument("--per-round", type=int, default=40, help="kills and stops of one database's copies")
    given = parser.parse_args()
    logging.disable(logging.WARNING)  # that dead workers' evaluations are pending again is no news here
    print(f"seed: {given.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="kills"))
    started = time.monotonic()
    problems = at_each_step(folder)
    total = Figures()
    # Stops come on top of so many kills, and are about half as many.
    seeds = Random(given.seed)
    while total.kills < given.kills:
        one = Path(tempfile.mkdtemp(dir=folder))
        for figures in storm(one, times=given.per_round, seed=seeds.getrandbits(32), copies=given.copies):
            total += figures
        print(f"{total.kills} kills, {len(total.problems)} problems", file=sys.stderr, flush=True)
    print(total)
    print(f"seconds: {time.monotonic() - started:.0f}")
    problems += total.problems
    if problems:
        print(f"in {folder}:", *problems, sep="\n")
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
