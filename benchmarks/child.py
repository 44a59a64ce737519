"""What a measuring process runs: get ready, wait for the word, do it, tell the figures.

Owns the child's half of ``harness``. Invariant: imports and other preparation are over when the clock starts, and what the
measured code prints goes nowhere near the figures.
"""

import importlib
import json
import os
import resource
import sys
import time
from typing import Any

_figures = 1


def main() -> None:
    """Call ``module:function`` with the keywords given, which returns what is to be measured."""
    global _figures
    _figures = os.dup(1)
    os.dup2(2, 1)
    module, _, name = sys.argv[1].partition(":")
    run = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    _tell({})  # ready
    sys.stdin.readline()
    started, cpu = time.perf_counter(), _cpu()
    figures = run()
    finish({"seconds": time.perf_counter() - started, "cpu": _cpu() - cpu, **(figures or {})})


def finish(figures: dict[str, Any]) -> None:
    """Tell the figures and end this process at once: some candidates leave threads."""
    _tell(figures)
    os._exit(0)


def _tell(figures: dict[str, Any]) -> None:
    os.write(_figures, json.dumps(figures).encode() + b"\n")


def _cpu() -> float:
    """Return the seconds of CPU that this process and its children that have ended have taken."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
