"""kill -9 before and after every commit on a PostgreSQL server, and what one call makes of what is left.

Invariant: only what the function has written outside of speval, and what plain SQL finds in the tables, is believed.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from speval import load_evals, speval

from .conftest import rows
from .crashes.processes import FINISH_WITHIN

# Forks a child for each kill, since an interpreter that has imported everything already is soon at its first commit.
POINTS = """
import functools, itertools, json, logging, os, signal, sys
from concurrent.futures import ThreadPoolExecutor
from psycopg.pq import TransactionStatus
from speval import speval
from speval.stores.postgres.connection import Connection

scenario = json.loads(sys.argv[1])
logging.disable(logging.CRITICAL)
CALLS = ("record_1", "renew_1", "leave_1", "take_back_1")
WRITES = {"CREATE FUNCTION": "create", "COPY pg_temp.incoming": "seed", ".workers (id": "register"}

def arm(point, side):
    count, execute, commit = itertools.count(1), Connection.execute, Connection.commit
    wrote = []

    def step(label, call):
        here = next(count) == point
        if here:
            os.write(1, (json.dumps({"label": label}) + "\\n").encode())
        if here and side == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = call()
        if here and side == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def executed(self, query, *args, **kwargs):
        call = functools.partial(execute, self, query, *args, **kwargs)
        text = query.decode() if isinstance(query, bytes) else query
        if self.info.transaction_status == TransactionStatus.IDLE:
            wrote.clear()
            for name in CALLS:
                if f".{name}(" in text:
                    return step(name, call)
        wrote.extend(label for part, label in WRITES.items() if part in text)
        if "incoming" in text:
            wrote.append("seed")
        return call()

    def committed(self):
        return step(f"commit of {wrote[0]}", functools.partial(commit, self)) if wrote else commit(self)

    Connection.execute, Connection.commit = executed, committed

def note(log, args):
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.write(file, f"{args}\\n".encode())
    os.close(file)
    return {"number": args, "square": args**2}

def run(namespace, point, side):
    url = scenario["url"] + f"?namespace={namespace}"
    log = f"{namespace}.executions"

    async def waiting(args):
        return note(log, args)

    child = os.fork()
    if child == 0:
        code = 1
        try:
            arm(point, side)
            options = dict(scenario["options"])
            function = waiting if options["executor"] == "coroutine" else functools.partial(note, log)
            if options["executor"] == "pool":
                options["executor"] = ThreadPoolExecutor(options["concurrency"])
            speval(function, range(scenario["count"]), url, max_attempts=100_000, progress=False, **options)
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

ended = 0  # by itself; how many commits a run has differs a little from run to run
for point in itertools.count(1):
    namespace = f"{scenario['namespace']}_{scenario['side']}_{point}"
    if scenario["held_after"]:  # first, a copy that dies with what it has claimed
        assert run(namespace, scenario["held_after"], "after") == -signal.SIGKILL
    code = run(namespace, point, scenario["side"])
    print(json.dumps({"namespace": namespace, "point": point, "code": code}), flush=True)
    ended = ended + 1 if code != -signal.SIGKILL else 0
    if ended == 2:
        break
"""

WRONG = {
    "the number of evaluations is wrong": "SELECT count(*) FROM evaluations HAVING count(*) <> ?",
    # A seeding that came to nothing leaves a gap in the ids, which are never given again.
    "a name is out of order": """
        SELECT name FROM (SELECT name, row_number() OVER (ORDER BY id) AS place FROM evaluations) AS e
        WHERE name <> (place - 1)::text
    """,
    "an evaluation waits or is in progress": "SELECT id FROM queue UNION ALL SELECT id FROM running",
    "an evaluation has not exactly one completed attempt": """
        SELECT e.id FROM evaluations AS e LEFT JOIN attempts AS a ON a.evaluation = e.id AND a.outcome = 'completed'
        GROUP BY e.id HAVING count(a.seq) <> 1 OR NOT bool_and(a.final AND a.result IS NOT NULL)
    """,
    "an attempt is neither recorded nor released": """
        SELECT f.evaluation FROM attempts AS f WHERE f.final AND f.attempt <> f.released + (
            SELECT count(*) FROM attempts AS a WHERE a.evaluation = f.evaluation)
    """,
    "an attempt ended otherwise than completed or lost": "SELECT 1 FROM attempts WHERE outcome NOT IN ('completed', 'lost')",
}


@dataclass
class Kill:
    url: str
    log: Path
    side: str
    point: int
    label: str


def kill_at_each_step(folder, postgres, namespace, count, options, held_after=0) -> list[Kill]:
    (folder / "points.py").write_text(POINTS)
    given = {"url": postgres.url(), "namespace": namespace, "count": count, "options": options, "held_after": held_after}
    processes = {}
    kills = []
    try:
        for side in ("before", "after"):
            command = [sys.executable, "points.py", json.dumps(given | {"side": side})]
            processes[side] = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
        for side, process in processes.items():
            out, _ = process.communicate(timeout=FINISH_WITHIN)
            assert process.returncode == 0, out
            label = ""
            for line in map(json.loads, out.splitlines()):
                label = line.get("label", label)
                if line.get("code") == -signal.SIGKILL:
                    log = folder / f"{line['namespace']}.executions"
                    kills.append(Kill(postgres.url(namespace=line["namespace"]), log, side, line["point"], label))
                elif "code" in line:
                    assert line["code"] == 0, f"the run ended with {line['code']} {side} step {line['point']}"
        return kills
    finally:
        for process in processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def recorded(url: str) -> dict[str, str]:
    if rows(url, "SELECT to_regclass('evals')") == [(None,)]:
        return {}
    return dict(rows(url, "SELECT name, result FROM evals WHERE status = 'completed'"))


def faults_after(kill: Kill, count: int, copies: int) -> list[str]:
    """Let one call complete what killed copies have left, and return what is wrong then."""
    before = recorded(kill.url)
    executed = Counter(kill.log.read_text().split() if kill.log.exists() else ())
    again: Counter[str] = Counter()

    def function(args: int) -> dict[str, int]:
        again[str(args)] += 1
        return {"number": args, "square": args**2}

    summary = speval(function, range(count), kill.url, lease=1.0, max_attempts=100_000, progress=False)
    faults = [f"not completed: {summary}"] if summary.completed != count else []
    for what, sql in WRONG.items():
        if found := rows(kill.url, sql, *([count] * sql.count("?"))):
            faults.append(f"{what}: {found[:5]}")
    results = {e["name"]: e["result"] for e in load_evals(kill.url)}
    if results != {str(n): {"number": n, "square": n**2} for n in range(count)}:
        faults.append(f"wrong results: {results}")
    if twice := [name for name in again if name in before or again[name] > 1]:
        faults.append(f"evaluated though recorded, or twice: {twice[:5]}")
    if twice := [name for name in executed if executed[name] > copies]:
        faults.append(f"executed twice by one of those that were killed: {twice[:5]}")
    after = recorded(kill.url)
    if changed := [name for name in before if after.get(name) != before[name]]:
        faults.append(f"recorded before the kill and changed by now: {changed[:5]}")
    if missing := [str(n) for n in range(count) if not (again[str(n)] or executed[str(n)])]:
        faults.append(f"has a result and was never executed: {missing[:5]}")
    return [f"killed {kill.side} {kill.label} (step {kill.point}): {fault}" for fault in faults]


@pytest.mark.parametrize(
    ("executor", "concurrency", "count"),
    [
        ("coroutine", 4, 6),
        *(pytest.param("coroutine", 4, 12, marks=pytest.mark.slow), pytest.param("process", 2, 4, marks=pytest.mark.slow)),
    ],
    ids=str,
)
def test_killed_before_or_after_any_commit_the_next_start_completes_the_rest(
    tmp_path, postgres, namespace, executor, concurrency, count
):
    options = {"executor": executor, "concurrency": concurrency, "lease": 1.0}
    kills = kill_at_each_step(tmp_path, postgres, namespace, count, options)
    assert {"commit of create", "commit of seed", "commit of register", "record_1", "leave_1"} <= {kill.label for kill in kills}
    assert {kill.side for kill in kills} == {"before", "after"}
    assert [fault for kill in kills for fault in faults_after(kill, count, 1)] == []


def test_a_start_reclaims_from_a_dead_worker_and_from_one_killed_while_reclaiming(tmp_path, postgres, namespace):
    options = {"executor": "coroutine", "concurrency": 4, "lease": 1.0}
    kills = kill_at_each_step(tmp_path, postgres, namespace, 6, options, held_after=4)
    assert "take_back_1" in {kill.label for kill in kills}
    assert [fault for kill in kills for fault in faults_after(kill, 6, 2)] == []
