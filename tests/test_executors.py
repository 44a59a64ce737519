"""The contract of an executor, held by every executor."""

import asyncio
import contextvars
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest

from speval.clock import Clock
from speval.executors import make_executor
from speval.options import Options

from .conftest import wait_for

EXECUTORS = ["coroutine", "thread"]

context = contextvars.ContextVar("context", default="none")


class Rig:
    """One executor with one slot, and the function in the form that fits it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.closers = []
        self.released = threading.Event()

    def slot(self, function: Callable, **options):
        executor = make_executor(self.fitting(function), Options(executor=self.kind, **options), Clock())
        slot = executor.slot(0)
        self.closers += [slot.close, executor.close]
        return slot

    def fitting(self, function: Callable) -> Callable:
        if self.kind != "coroutine":
            return function

        async def fitting(args):
            result = function(args)
            return await result if asyncio.iscoroutine(result) else result

        return fitting

    def sleep(self, seconds: float):
        """Return a sleep that can be stopped where the executor can stop one."""
        return asyncio.sleep(seconds) if self.kind == "coroutine" else self.released.wait(seconds)


@pytest.fixture(params=EXECUTORS)
async def rig(request) -> AsyncIterator[Rig]:
    rig = Rig(request.param)
    yield rig
    rig.released.set()
    for close in rig.closers:
        await close()


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
    assert "executors/base.py" not in outcome.error["traceback"]


async def test_an_exception_of_retry_on_may_be_tried_again(rig):
    def function(args):
        raise [ConnectionResetError, KeyError][args]

    slot = rig.slot(function, retry_on=OSError)
    assert [(await slot.call("n", args, None)).again for args in ("0", "1")] == [True, False]


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(1), asyncio.CancelledError("own")]
)
async def test_no_exception_of_the_function_ends_the_program(rig, error):
    def function(args):
        raise error

    if rig.kind == "coroutine" and isinstance(error, KeyboardInterrupt):
        pytest.skip("in the main thread it is the user's own Ctrl-C")
    outcome = await rig.slot(function).call("n", "1", None)
    assert outcome.cause == "exception"
    # A coroutine turns StopIteration into RuntimeError by itself.
    assert outcome.error["type"] in (type(error).__name__, "RuntimeError")


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


async def test_a_result_without_a_json_form_is_this_evaluations_failure(rig):
    slot = rig.slot(lambda args: object() if args else "fine")
    outcome = await slot.call("17", "1", None)
    assert outcome.cause == "unserializable"
    assert "the result of evaluation '17' can't be written as JSON: object is none of" in outcome.error["message"]
    assert not outcome.again
    assert (await slot.call("18", "0", None)).result == '"fine"'


async def test_a_big_result_comes_back_whole(rig):
    outcome = await rig.slot(lambda args: "x" * args).call("n", "20000000", None)
    assert len(outcome.result) == 20_000_002


async def test_a_timeout_ends_the_call_and_not_the_slot(rig):
    slot = rig.slot(lambda args: rig.sleep(args) if args else "next")
    outcome = await slot.call("n", "600", 0.05)
    assert outcome.cause == "timeout"
    assert outcome.again
    assert (outcome.error["type"], outcome.error["message"]) == ("TimeoutError", "ran longer than 0.05 s")
    assert "sleep" in outcome.error["traceback"]
    assert "test_executors.py" in outcome.error["traceback"]
    assert 0.05 <= outcome.duration < 30
    assert (await slot.call("n", "0", 60)).result == '"next"'


async def test_a_call_within_its_timeout_is_left_alone(rig):
    slot = rig.slot(lambda args: args)
    for i in range(50):
        assert (await slot.call("n", str(i), 60)).result == str(i)


async def test_cancelling_a_call_raises_the_cancellation_and_leaves_the_slot_usable(rig):
    started = threading.Event()

    def function(args):
        started.set()
        return rig.sleep(600) if args else "next"

    slot = rig.slot(function)
    task = asyncio.create_task(slot.call("n", "1", None))
    while not started.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await slot.call("n", "0", None)).result == '"next"'


async def test_durations_are_the_functions_own(rig):
    outcome = await rig.slot(lambda args: rig.sleep(0.05)).call("n", "1", None)
    assert 0.05 <= outcome.duration < 30
    assert abs(outcome.started_at - time.time()) < 60


async def test_each_call_has_the_callers_context_and_none_of_the_last_calls(rig):
    def function(args):
        before = context.get()
        context.set("changed")
        return before

    context.set("caller's")
    slot = rig.slot(function)
    assert [(await slot.call("n", "1", None)).result for _ in range(2)] == ['"caller\'s"'] * 2


async def test_the_function_gets_args_of_its_own(rig):
    slot = rig.slot(lambda args: args.append(1) or len(args))
    assert [(await slot.call("n", "[]", None)).result for _ in range(3)] == ["1"] * 3


# What only one of them promises


async def test_a_coroutine_that_swallows_its_cancellation_is_left_behind(caplog):
    rig, stop = Rig("coroutine"), asyncio.Event()

    async def stubborn():
        while not stop.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.wait_for(stop.wait(), 1000)

    slot = rig.slot(lambda args: stubborn() if args else "next")
    outcome = await slot.call("17", "1", 0.01)
    assert outcome.cause == "timeout"
    assert "evaluation '17' refuses to be cancelled" in caplog.text
    assert (await slot.call("n", "0", 10)).result == '"next"'
    stop.set()


async def test_a_coroutine_has_time_to_clean_up(rig):
    if rig.kind != "coroutine":
        pytest.skip("threads are not told")
    cleaned = []

    async def function():
        try:
            await asyncio.sleep(600)
        finally:
            await asyncio.sleep(0.01)
            cleaned.append(True)

    assert (await rig.slot(lambda args: function()).call("n", "1", 0.01)).cause == "timeout"
    assert cleaned == [True]


async def test_a_task_of_the_function_that_is_cancelled_is_its_own_failure():
    async def function():
        task = asyncio.create_task(asyncio.sleep(600))
        task.cancel()
        await task

    outcome = await Rig("coroutine").slot(lambda args: function()).call("n", "1", 60)
    assert (outcome.cause, outcome.error["type"]) == ("exception", "CancelledError")


@pytest.mark.leaves_threads
async def test_a_thread_that_runs_too_long_is_abandoned_and_said_so_once(caplog):
    release = threading.Event()
    rig = Rig("thread")
    slot = rig.slot(lambda args: release.wait(600))
    before = threading.active_count()
    for name in ("first", "second"):
        assert (await slot.call(name, "1", 0.01)).cause == "timeout"
    assert caplog.text.count("in a thread, which can't be stopped") == 1
    assert threading.active_count() == before + 2
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("speval"))
    release.set()
    wait_for(lambda: threading.active_count() == before, "abandoned threads to end")


async def test_an_async_function_runs_in_a_thread_too():
    async def function(args):
        await asyncio.sleep(0)
        return threading.current_thread().name

    executor = make_executor(function, Options(executor="thread"), Clock())
    slot = executor.slot(3)
    assert (await slot.call("n", "1", None)).result == '"speval slot 3"'
    await slot.close()


def test_auto_takes_coroutines_for_async_functions_and_threads_for_plain_ones():
    import functools

    async def afunction(args):
        pass

    class Async:
        async def __call__(self, args):
            pass

    def kind(function):
        return type(make_executor(function, Options(), Clock())).__name__

    assert kind(afunction) == kind(functools.partial(afunction)) == kind(Async()) == "CoroutineExecutor"
    assert kind(print) == kind(lambda args: None) == kind(functools.partial(print)) == "ThreadExecutor"
