"""What comes before the first evaluation: the import, the first worker process.

Owns the table ``start``. Invariant: each is measured in a process that has done nothing else.
"""

import asyncio
import compileall
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from .harness import ROOT, Figures, by_turns, measured, table

_IMPORT = "import time; started = time.perf_counter(); import speval; print(time.perf_counter() - started)"


def first_result(copies: int, copy: int) -> Callable[[], Figures]:
    """Prepare to make a process executor and to get one result from it."""
    from speval.clock import Clock
    from speval.executors import make_executor
    from speval.options import Options

    async def main() -> None:
        executor = make_executor(abs, Options(executor="process"), Clock())
        slot = executor.slot(0)
        await slot.call("0", "1", None)
        finish_at.append(time.perf_counter())
        await slot.close()
        await executor.close()

    finish_at: list[float] = []

    def run() -> Figures:
        started = time.perf_counter()
        asyncio.run(main())
        return {"seconds": finish_at[0] - started}

    return run


def interpreter(code: str) -> Figures:
    """Return the seconds an interpreter takes to start, do this, and end, or what it prints instead."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    return {"seconds": float(done.stdout or time.perf_counter() - started)}


def measure(rounds: int, share: float, pythons: dict[str, str]) -> Figures:
    compileall.compile_dir(ROOT / "speval", quiet=1)  # as pip does where it installs a package
    return by_turns(
        rounds * 3,
        {
            "import": partial(interpreter, _IMPORT),
            "bare": partial(interpreter, "pass"),
            "first_result": partial(measured, "benchmarks.start:first_result"),
        },
    )


def tables(found: Figures) -> dict[str, str]:
    texts = {
        "import": "import speval",
        "bare": "a bare interpreter, start to end",
        "first_result": "making a process executor, to its first result",
    }
    rows = [[text, f"{1000 * found[key]['seconds']:.0f} ms"] for key, text in texts.items()]
    return {"start": table(["what", " median"], rows)}
