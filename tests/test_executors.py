"""The contract of an executor, held by every executor."""

import asyncio
import contextvars
import functools
import json
import math
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from speval.clock import Clock
from speval.executors import make_executor
from speval.executors.base import Work
from speval.model import Claim
from speval.options import Options

from .conftest import wait_for

EXECUTORS = ["coroutine", "thread", "process", "pool"]

context = contextvars.ContextVar("context", default="none")


class Rig:
    """One executor with one slot, and functions in the form that fits it."""

    def __init__(self, kind: str, pool: ProcessPoolExecutor | None = None) -> None:
        self.kind = kind
        self.executor: Any = pool or kind
        self.closers = []

    def slot(self, function: Callable, **options):
        if self.kind == "coroutine":
            function = in_coroutine(function)
        executor = make_executor(function, Options(executor=self.executor, **options), Clock())
        slot = executor.slot(0)
        self.closers += [slot.close, executor.close]
        return slot

    def sleeper(self, started=None):
        """Return a slot whose function sleeps so many seconds, in a way that can be stopped where anything can."""

        async def coroutine(args):
            if started is not None:
                Path(started).touch()
            await asyncio.sleep(args)
            return "next"

        def plain(args):
            if started is not None:
                Path(started).touch()
            time.sleep(args)
            return "next"

        return self.slot(coroutine if self.kind == "coroutine" else plain)

    async def close(self) -> None:
        for close in self.closers:
            await close()


class Noted(Work):
    """Claims for a slot; notes results and what comes back, and hands out more."""

    def __init__(self, claims, timeout, got, back, more):
        self.claims, self.timeout = claims, timeout
        self._got, self._back, self._more = got, back, more

    def ended(self, claim, outcome):
        self._got.append((claim, outcome.result))

    def give_back(self, claims):
        self._back += claims

    def more(self):
        return self._more.popleft() if self._more else None


def in_coroutine(function):
    async def coroutine(args):
        result = function(args)
        return await result if asyncio.iscoroutine(result) else result

    return coroutine


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """An executor of somebody else's; with room for what tests leave behind in it."""
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture
async def make_rig(request) -> AsyncIterator[Callable]:
    rigs = []

    def make(kind):
        rigs.append(Rig(kind, request.getfixturevalue("pool") if kind == "pool" else None))
        return rigs[-1]

    yield make
    for rig in rigs:
        await rig.close()


@pytest.fixture(params=EXECUTORS)
def rig(request, make_rig) -> Rig:
    return make_rig(request.param)


async def test_the_result_comes_back_as_json(rig):
    outcome = await rig.slot(lambda args: {"sum": args["a"] + 1, "t": (1, 2)}).call("n", '{"a":1}', None)
    assert outcome.cause is None
    assert outcome.error is None
    assert json.loads(outcome.result) == {"sum": 2, "t": [1, 2]}


async def test_none_is_a_result(rig):
    outcome = await rig.slot(lambda args: None).call("n", "1", None)
    assert (outcome.cause, outcome.result) == (None, "null")


async def test_special_floats_and_unicode_go_through(rig):
    outcome = await rig.slot(lambda args: args).call("n", '[NaN,Infinity,-Infinity,"grüße \\ud800 🎈"]', None)
    nan, up, down, text = json.loads(outcome.result)
    assert math.isnan(nan)
    assert (up, down, text) == (math.inf, -math.inf, "grüße \ud800 🎈")


async def test_an_exception_is_data_with_its_traceback(rig):
    def guilty_function(args):
        raise LookupError(f"no {args}")

    outcome = await rig.slot(guilty_function).call("n", "7", None)
    assert outcome.cause == "exception"
    assert outcome.result is None
    assert not outcome.again
    assert (outcome.error["type"], outcome.error["message"]) == ("LookupError", "no 7")
    assert "guilty_function" in outcome.error["traceback"]
    assert outcome.error["traceback"].endswith("LookupError: no 7\n")
    assert "executors/call.py" not in outcome.error["traceback"]


async def test_an_exception_of_retry_on_may_be_tried_again(rig):
    def function(args):
        raise [ConnectionResetError, KeyError][args]

    slot = rig.slot(function, retry_on=OSError)
    assert [(await slot.call("n", args, None)).again for args in ("0", "1")] == [True, False]


def raising(error):
    def function(args):
        raise error

    return function


@pytest.mark.parametrize("error", [GeneratorExit(), StopIteration(1), asyncio.CancelledError("own"), SystemExit(3)], ids=repr)
async def test_no_exception_of_the_function_ends_the_program(rig, error):
    outcome = await rig.slot(raising(error)).call("n", "1", None)
    # In a process, to exit is to leave it; to the others of that process it would be the end.
    assert outcome.cause == ("crash" if rig.kind == "process" and isinstance(error, SystemExit) else "exception")
    # A coroutine turns StopIteration into RuntimeError by itself.
    assert outcome.error["type"] in (type(error).__name__, "RuntimeError")


@pytest.mark.parametrize("kind", ["thread", "process"])
async def test_keyboard_interrupt_raised_by_a_plain_function_is_its_failure(make_rig, kind):
    # In a coroutine in the main thread it is the user's own Ctrl-C.
    outcome = await make_rig(kind).slot(raising(KeyboardInterrupt())).call("n", "1", None)
    assert (outcome.cause, outcome.error["type"]) == ("exception", "KeyboardInterrupt")


class HostileError(Exception):
    def __str__(self):
        raise ValueError("no text for you")

    __repr__ = __str__


class OddError(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a}{b}\ud800")


async def test_odd_exceptions_are_recorded_all_the_same(rig):
    def function(args):
        if args == 0:
            raise HostileError
        if args == 1:
            raise OddError(1, 2)
        raise ValueError("x" * 1_000_000)

    slot = rig.slot(function)
    hostile, odd, huge = [await slot.call("n", str(i), None) for i in range(3)]
    assert hostile.error["type"] == "HostileError"
    assert odd.error["message"] == "12\\ud800"
    assert len(huge.error["message"]) < 20_000
    assert "characters ..." in huge.error["message"]
    for outcome in (hostile, odd, huge):
        json.dumps(outcome.error).encode()


class Liar(Exception):
    @property  # type: ignore[misc]
    def __class__(self):
        raise RuntimeError("no class for you")


async def test_an_exception_that_misbehaves_when_it_is_looked_at_is_a_failure_like_others(rig):
    def function(args):
        raise Liar

    slot = rig.slot(function, retry_on=OSError)
    outcome = await asyncio.wait_for(slot.call("n", "1", None), 60)
    assert (outcome.cause, outcome.error["type"], outcome.again) == ("exception", "Liar", False)


async def test_a_child_that_the_function_forks_has_no_part_in_the_run(rig):
    def function(args):
        import os
        import sys
        import warnings

        warnings.simplefilter("ignore")  # later Pythons warn of forks beside threads
        pid = os.fork()
        if pid == 0:
            if args % 2:
                sys.exit(7)
            return "the child's"
        return [args, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]

    slot = rig.slot(function)
    for i in range(6):
        outcome = await asyncio.wait_for(slot.call("n", str(i), None), 60)
        assert outcome.result == f"[{i},{7 if i % 2 else 0}]"


@pytest.mark.parametrize("kind", ["coroutine", "thread"])
async def test_a_result_too_big_for_any_database_is_this_evaluations_failure(make_rig, monkeypatch, kind):
    monkeypatch.setattr("speval.codec._LONGEST", 1000)
    outcome = await make_rig(kind).slot(lambda args: "x" * 2000).call("17", "1", None)
    assert outcome.cause == "unserializable"
    assert "the result of evaluation '17'" in outcome.error["message"]
    assert "write the data to a file" in outcome.error["message"]


async def test_a_result_without_a_json_form_is_this_evaluations_failure(rig):
    slot = rig.slot(lambda args: object() if args else "fine")
    outcome = await slot.call("17", "1", None)
    assert outcome.cause == "unserializable"
    assert "the result of evaluation '17' can't be written as JSON: object is not supported" in outcome.error["message"]
    assert not outcome.again
    assert (await slot.call("18", "0", None)).result == '"fine"'


async def test_a_big_result_and_big_args_go_through_whole(rig):
    outcome = await rig.slot(lambda args: args + "y").call("n", f'"{"x" * 20_000_000}"', None)
    assert len(outcome.result) == 20_000_003


@pytest.mark.leaves_threads
async def test_a_timeout_ends_the_call_and_not_the_slot(rig):
    slot = rig.sleeper()
    assert (await slot.call("n", "0", 60)).result == '"next"'
    outcome = await slot.call("n", "5", 0.05)
    assert outcome.cause == "timeout"
    assert outcome.again
    assert (outcome.error["type"], outcome.error["message"]) == ("TimeoutError", "ran longer than 0.05 s")
    if rig.kind in ("coroutine", "thread"):
        assert "sleep" in outcome.error["traceback"]
        assert "test_executors.py" in outcome.error["traceback"]
    assert 0.05 <= outcome.duration < 4
    assert (await slot.call("n", "0", 60)).result == '"next"'


async def test_a_call_within_its_timeout_is_left_alone(rig):
    slot = rig.slot(lambda args: args)
    for i in range(50):
        assert (await slot.call("n", str(i), 60)).result == str(i)


@pytest.mark.leaves_threads
async def test_cancelling_a_call_raises_the_cancellation_and_leaves_the_slot_usable(rig, tmp_path):
    started = tmp_path / "started"
    slot = rig.sleeper(str(started))
    task = asyncio.create_task(slot.call("n", "5", None))
    while not started.exists():
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await slot.call("n", "0", None)).result == '"next"'


async def test_durations_are_the_functions_own(rig):
    outcome = await rig.sleeper().call("n", "0.05", None)
    assert 0.05 <= outcome.duration < 30
    assert abs(outcome.started_at - time.time()) < 60


async def test_results_come_in_the_order_of_the_calls(rig):
    slot = rig.slot(lambda args: args)
    claims, got = [Claim(i, 1, 1, str(i), str(i), 1) for i in range(60)], []
    batch, left = claims[:40], deque(claims[40:])
    while batch:
        back = []  # where the machine is busy, some of a batch come back
        await slot.run(Noted(batch, 60, got, back, left))
        batch = back
    assert got == [(claim, claim.args) for claim in claims[: len(got)]]
    assert len(got) == len(claims) - len(left) >= 40


async def test_the_function_gets_args_of_its_own(rig):
    slot = rig.slot(lambda args: args.append(1) or len(args))
    assert [(await slot.call("n", "[]", None)).result for _ in range(3)] == ["1"] * 3


# What only some of them promise


@pytest.mark.parametrize("kind", ["coroutine", "thread"])
async def test_each_call_has_the_callers_context_and_none_of_the_last_calls(make_rig, kind):
    def function(args):
        before = context.get()
        context.set("changed")
        return before

    context.set("caller's")
    slot = make_rig(kind).slot(function)
    assert [(await slot.call("n", "1", None)).result for _ in range(2)] == ['"caller\'s"'] * 2


async def test_a_coroutine_that_swallows_its_cancellation_is_left_behind(make_rig, caplog):
    stop = asyncio.Event()

    async def stubborn():
        while not stop.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.wait_for(stop.wait(), 1000)

    slot = make_rig("coroutine").slot(lambda args: stubborn() if args else "next")
    outcome = await slot.call("17", "1", 0.01)
    assert outcome.cause == "timeout"
    assert "evaluation '17' ignores its cancellation" in caplog.text
    assert (await slot.call("n", "0", 10)).result == '"next"'
    stop.set()


async def test_what_one_left_behind_returns_later_is_not_taken_for_the_next_ones(make_rig):
    release, is_released = asyncio.Event(), asyncio.Event()

    async def function(args):
        if args == "next":
            release.set()
            await is_released.wait()
            await asyncio.sleep(0)  # until whoever waits for the one left behind has been told
            await asyncio.sleep(0)
            return args
        while not release.is_set():
            with suppress(asyncio.CancelledError):
                await release.wait()
        is_released.set()
        return args

    slot = make_rig("coroutine").slot(function)
    assert (await slot.call("17", '"left behind"', 0.01)).cause == "timeout"
    assert (await slot.call("18", '"next"', 60)).result == '"next"'


async def test_a_slot_of_coroutines_goes_on_with_more_and_stops_with_the_one_that_runs(make_rig):
    async def function(args):
        if args == "endless":
            started.set()
            await asyncio.sleep(600)
        return args

    started, got = asyncio.Event(), []
    more = deque(Claim(i, 1, 1, str(i), f'"{args}"', 1) for i, args in ((2, "quick"), (3, "endless"), (4, "never")))
    slot = make_rig("coroutine").slot(function)
    first = Claim(1, 1, 1, "1", '"first"', 1)
    back = []
    running = asyncio.create_task(slot.run(Noted([first], None, got, back, more)))
    await started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [(claim.id, result) for claim, result in got] == [(1, '"first"'), (2, '"quick"')]
    assert back == []
    assert [claim.id for claim in more] == [4]


class Parked(Noted):
    """Keeps the slot when there is nothing to do for it."""

    async def go_on(self, claim):
        while not self.calls:
            await asyncio.sleep(0.001)
        self.calls.pop()(claim)

    def park(self, go_on):
        self.calls = [go_on]
        return True

    calls: list[Callable] | None = None


async def test_a_parked_slot_of_coroutines_goes_on_with_what_it_is_given_and_ends_when_told(make_rig):
    slot, got = make_rig("coroutine").slot(lambda args: args), []
    first, second = (Claim(i, 1, 1, str(i), str(i), 1) for i in (1, 2))
    work = Parked([first], 60, got, [], deque())
    running = asyncio.create_task(slot.run(work))
    await work.go_on(second)
    await work.go_on(None)
    await running
    assert got == [(first, "1"), (second, "2")]


async def test_a_parked_slot_can_be_cancelled(make_rig):
    slot, got = make_rig("coroutine").slot(lambda args: args), []
    work = Parked([Claim(1, 1, 1, "1", "1", 1)], None, got, [], deque())
    running = asyncio.create_task(slot.run(work))
    while not work.calls:
        await asyncio.sleep(0.001)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(got) == 1


async def test_a_coroutine_has_time_to_clean_up(make_rig):
    cleaned = []

    async def function():
        try:
            await asyncio.sleep(600)
        finally:
            await asyncio.sleep(0.01)
            cleaned.append(True)

    assert (await make_rig("coroutine").slot(lambda args: function()).call("n", "1", 0.01)).cause == "timeout"
    assert cleaned == [True]


async def test_a_task_of_the_function_that_is_cancelled_is_its_own_failure(make_rig):
    async def function():
        task = asyncio.create_task(asyncio.sleep(600))
        task.cancel()
        await task

    outcome = await make_rig("coroutine").slot(lambda args: function()).call("n", "1", 60)
    assert (outcome.cause, outcome.error["type"]) == ("exception", "CancelledError")


@pytest.mark.leaves_threads
async def test_a_thread_that_runs_too_long_is_abandoned_and_said_so_once(make_rig, caplog):
    release = threading.Event()
    slot = make_rig("thread").slot(lambda args: release.wait(600))
    before = set(threading.enumerate())  # some of earlier tests may end meanwhile
    for name in ("first", "second"):
        assert (await slot.call(name, "1", 0.01)).cause == "timeout"
    assert caplog.text.count("in a thread, which can't be stopped") == 1
    abandoned = set(threading.enumerate()) - before
    assert len(abandoned) == 2
    assert all(thread.daemon for thread in abandoned)
    release.set()
    wait_for(lambda: not any(thread.is_alive() for thread in abandoned), "abandoned threads to end")


@pytest.mark.parametrize("kind", ["thread", "process"])
async def test_an_async_function_runs_where_plain_ones_do_too(kind):
    async def function(args):
        await asyncio.sleep(0)
        return threading.current_thread().name

    executor = make_executor(function, Options(executor=kind), Clock())
    slot = executor.slot(3)
    assert (await slot.call("n", "1", None)).result == ('"speval slot 3"' if kind == "thread" else '"MainThread"')
    await slot.close()
    await executor.close()


async def test_auto_chooses_by_the_kind_of_function_and_by_what_has_to_be_enforced():
    async def afunction(args):
        pass

    class Async:
        async def __call__(self, args):
            pass

    async def kind(function, **options):
        executor = make_executor(function, Options(**options), Clock())
        await executor.close()
        return type(executor).__name__.removesuffix("Executor").lower()

    for function in (afunction, functools.partial(afunction), Async()):
        assert await kind(function) == await kind(function, timeout=1, concurrency=9) == "coroutine"
    for function in (print, lambda args: None, functools.partial(print)):
        assert await kind(function) == "thread"
        assert await kind(function, timeout=1) == await kind(function, concurrency=2) == "process"
        assert await kind(function, timeout=1, concurrency=2, executor="thread") == "thread"
