"""SystemExit and KeyboardInterrupt out of the tasks and callbacks that an async function starts."""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from speval import aio, load_evals
from speval.executors.subtasks import fail_evaluation

from .conftest import Scripts


async def _later(error):
    await asyncio.sleep(0.001)
    raise error


async def _gather(error):
    await asyncio.gather(_later(error), _later(ValueError("x")))


async def _task_group(error):
    async with asyncio.TaskGroup() as group:
        group.create_task(_later(error))


async def _wait_for(error):
    await asyncio.wait_for(_later(error), 60)


async def _shield(error):
    await asyncio.shield(_later(error))


async def _callback(error):
    def strike():
        raise error

    asyncio.get_running_loop().call_soon(strike)
    await asyncio.sleep(60)


async def _forgotten_task(error):
    task = asyncio.create_task(_later(error))
    await asyncio.sleep(60)
    await task


async def _timer(error):
    def strike():
        raise error

    asyncio.get_running_loop().call_later(0.001, strike)
    await asyncio.sleep(60)


ways = {way.__name__[1:]: way for way in (_gather, _task_group, _wait_for, _shield, _callback, _forgotten_task, _timer)}


def in_a_loop_that_goes_on(main):
    """Run a coroutine in a loop of a thread's own that is run on after the end of an evaluation's, as the blocking calls do."""

    def run():
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            task = loop.create_task(main)
            while True:
                try:
                    return loop.run_until_complete(task)
                except (SystemExit, KeyboardInterrupt) as error:
                    if not fail_evaluation(error):
                        raise

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("way", ways)
def test_in_a_loop_that_goes_on_it_fails_the_evaluation_and_the_run_goes_on(db, way, error):
    async def function(args):
        await asyncio.sleep(0)
        if args == 5:
            await ways[way](error)
        return args

    summary = in_a_loop_that_goes_on(aio.speval(function, range(30), db, concurrency=4, progress=False))
    assert (summary.completed, summary.causes) == (29, {"exception": 1})
    (failed,) = load_evals(db, status="failed")
    assert (failed["name"], failed["error"]["type"]) == ("5", type(error).__name__)
    assert "run_forever" not in failed["error"]["traceback"]


def test_what_no_evaluation_has_raised_is_none_of_its_failures(db):
    async def main():
        asyncio.get_running_loop().call_soon(sys.exit, 4)
        await asyncio.sleep(60)

    with pytest.raises(SystemExit, match="4"):
        in_a_loop_that_goes_on(main())


def test_what_an_evaluation_that_has_ended_left_behind_fails_no_other(db, caplog):
    async def function(args):
        if args == 0:
            asyncio.get_running_loop().call_later(0.001, sys.exit, 3)
        else:
            await asyncio.sleep(0.01)
        return args

    assert in_a_loop_that_goes_on(aio.speval(function, range(4), db, concurrency=1, progress=False)).completed == 4
    assert "evaluation '0' had ended when something that it had started raised SystemExit(3)" in caplog.text


ENDING = """
import asyncio, sys
from speval import aio, load_evals
from tests.test_subtasks import ways
async def function(args):
    await asyncio.sleep(0.01)
    if args == 2:
        await ways[WAY](ERROR)
    return args
for _ in range(5):
    try:
        summary = asyncio.run(aio.speval(function, range(6), "runs.db", concurrency=3, progress=False, backoff=0))
    except BaseException as error:
        print(type(error).__name__)
    else:
        print(summary.completed, summary.causes)
        break
print([(e["name"], e["attempts"], e["error"]["type"]) for e in load_evals("runs.db", status="failed")])
"""


@pytest.mark.parametrize("way", ["gather", "task_group", "callback", "forgotten_task"])
def test_in_a_loop_of_the_users_own_it_ends_the_loop_once_and_is_charged(scripts: Scripts, monkeypatch, way):
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    done = scripts.run(ENDING.replace("WAY", repr(way)).replace("ERROR", "SystemExit(3)"))
    assert done.stdout == "SystemExit\n5 {'exception': 1}\n[('2', 1, 'SystemExit')]\n", done.stderr


def test_an_interrupt_in_a_loop_of_the_users_own_costs_an_attempt_each_time(scripts: Scripts, monkeypatch):
    # A Ctrl-C of the user's that arrives in the evaluation's code looks the same.
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    done = scripts.run(ENDING.replace("WAY", "'gather'").replace("ERROR", "KeyboardInterrupt()"))
    lines = ["KeyboardInterrupt"] * 3 + ["5 {'exception': 1}", "[('2', 3, 'KeyboardInterrupt')]"]
    assert done.stdout.splitlines() == lines, done.stderr
