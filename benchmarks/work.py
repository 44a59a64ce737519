"""The functions that are evaluated: one that does nothing, one that sleeps, two that compute.

Owns what an evaluation of a benchmark is. Invariant: each returns its args, so that whoever has run it can see that it was run.
What computes takes a fixed time of its core, not of the wall clock: other load makes it later, not shorter.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any


def nothing(args: Any) -> Any:
    return args


def sleep(args: Any) -> Any:
    time.sleep(0.01)
    return args


def compute(args: Any) -> Any:
    return _computed(args, 0.01)


def compute_1ms(args: Any) -> Any:
    return _computed(args, 0.001)


def _computed(args: Any, seconds: float) -> Any:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return args


async def nothing_async(args: Any) -> Any:
    return args


async def sleep_async(args: Any) -> Any:
    await asyncio.sleep(0.01)
    return args


async def sleep_50ms_async(args: Any) -> Any:
    await asyncio.sleep(0.05)
    return args


async def compute_async(args: Any) -> Any:
    return compute(args)


PLAIN: dict[str, Callable[[Any], Any]] = {
    "nothing": nothing, "sleep": sleep, "compute": compute, "compute_1ms": compute_1ms
}  # fmt: skip
ASYNC: dict[str, Callable[[Any], Any]] = {
    "nothing": nothing_async,
    "sleep": sleep_async,
    "compute": compute_async,
    "sleep_50ms": sleep_50ms_async,
}
# The unit of each, for the heads of tables.
SHOWN = {
    "nothing": "nothing",
    "sleep": "10 ms of sleep",
    "compute": "10 ms of CPU",
    "compute_1ms": "1 ms of CPU",
    "sleep_50ms": "50 ms of sleep",
}
