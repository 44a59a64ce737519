"""Measure speval beside its peers.

Run: ``pip install -e '.[bench]'`` and ``python -m benchmarks``, which takes some ten minutes on two cores. It prints its
tables as Markdown and writes them to docs/performance.md, and all figures to benchmarks/results.json. With ``--quick`` it takes
two minutes and writes nothing: a first look, at less.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import venv
from contextlib import ExitStack
from pathlib import Path

from . import copies, peers, sizes, start
from .candidates import CANDIDATES
from .goals import goal_table
from .harness import ROOT, Figures, machine

PARTS = {"peers": peers, "copies": copies, "sizes": sizes, "start": start}
RESULTS = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs" / "performance.md"


def old_python(folder: str) -> str:
    """Make an environment with the speval of 2019 and return its interpreter."""
    venv.create(folder, with_pip=True)
    python = str(Path(folder, "bin", "python"))
    subprocess.run([python, "-m", "pip", "install", "-q", "speval==0.1.1"], check=True, stderr=subprocess.DEVNULL)
    return python


def measure(parts: list[str], rounds: int, share: float) -> Figures:
    with ExitStack() as stack:
        pythons = {"": sys.executable}
        if "peers" in parts or "copies" in parts:
            old = old_python(stack.enter_context(tempfile.TemporaryDirectory()))
            pythons |= {name: old for name, candidate in CANDIDATES.items() if candidate.is_old}
        found: Figures = {}
        for part in parts:
            started = time.monotonic()
            found[part] = machine() | PARTS[part].measure(rounds, share, pythons)
            print(f"{part}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        return found


def tables_of(found: Figures) -> dict[str, str]:
    """Return all tables by name."""
    tables = {"goals": goal_table(found)}
    for part, figures in found.items():
        tables |= PARTS[part].tables(figures)
    return tables


def on_page(page: str, tables: dict[str, str], about: str) -> str:
    """Return the page with its tables, and what they were measured on, replaced."""
    for name, text in {"machine": about, **tables}.items():
        mark, end = f"<!-- {name} -->", "<!-- end -->"
        new = f"{mark}\n{text}\n{end}".replace("\\", r"\\")  # nothing in it stands for a group
        page = re.sub(f"{mark}.*?{end}", new, page, flags=re.DOTALL)
    return page


def about_machine(found: Figures) -> str:
    (m, *others) = found.values()
    dates = ", ".join(sorted({one["at"] for one in (m, *others)}))
    kind = f"{m['cores']} cores, {m['system']}, Python {m['python']}, SQLite {m['sqlite']}, {dates}"
    return f"{kind}; the load average was {m['load']} when it began."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="what to measure (default: everything)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds of fewer evaluations; nothing is written")
    parser.add_argument(
        "--rounds", type=int, help="how often each is measured (default: 5, what takes long 3, and 1 with --quick)"
    )
    parser.add_argument("--print", action="store_true", help="measure nothing: print and write the tables of the last time")
    options = parser.parse_args()
    parts = options.parts or list(PARTS)
    stored: Figures = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = stored
    if not options.print:
        found = measure(parts, options.rounds or (1 if options.quick else 5), 0.2 if options.quick else 1.0)
        if not options.quick:
            found = {part: (stored | found)[part] for part in PARTS if part in stored | found}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    tables, about = tables_of(found), about_machine(found)
    print(about, *(f"{name}\n\n{text}" for name, text in tables.items()), sep="\n\n")
    if not options.quick:
        PAGE.write_text(on_page(PAGE.read_text(), tables, about))


if __name__ == "__main__":
    main()
