"""Make the pictures of the README and the guide: ``python -m benchmarks.pictures``, a minute or two.

``docs/watch.svg`` is what ``speval watch`` shows of three real copies at work, ``docs/digits.svg`` what
``examples/04_draw_digits.py`` draws.
"""

from __future__ import annotations

import dataclasses
import io
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from speval.cli.watch import picture
from speval.model import Overview
from speval.stores import make_control

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT = 100, 22

TRAIN = """
import random
import time

def train(args):
    luck = random.Random(str(args))
    time.sleep(luck.uniform(0.3, 2.5))
    if luck.random() < 0.04:
        raise FloatingPointError(f"loss is nan in epoch {luck.randint(2, 9)}")
    if luck.random() < 0.02:
        time.sleep(60)
    return {"loss": luck.random()}
"""
SPACE = f"grid:rate={','.join(str(n / 10) for n in range(1, 16))};depth={','.join(str(n) for n in range(2, 14))}"
COMMAND = [sys.executable, "-m", "speval", "run", "train.py:train", "runs.db", "--space", SPACE, "--timeout", "4"]


def watched(folder: Path) -> Overview:
    """Return what is to be seen when most of a search is done."""
    (folder / "train.py").write_text(TRAIN)
    quiet: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    copies = []
    try:
        for concurrency in ("4", "4", "8"):
            copies.append(subprocess.Popen([*COMMAND, "--max-attempts", "1", "-j", concurrency], **quiet))
            time.sleep(random.uniform(1, 2))
        while True:
            with make_control(folder / "runs.db") as control:
                seen = control.overview(failures=5, runs=20)
            if seen.failed >= 5 and seen.total - seen.open > 0.62 * seen.total:
                return dataclasses.replace(seen, workers=tuple(dataclasses.replace(w, host="laptop") for w in seen.workers))
            time.sleep(0.1)
    finally:
        for copy in copies:
            copy.kill()
            copy.wait()


def draw_watch() -> None:
    with tempfile.TemporaryDirectory() as folder:
        seen = watched(Path(folder))
    console = Console(file=io.StringIO(), record=True, width=WIDTH, height=HEIGHT, force_terminal=True, highlight=False)
    console.print(picture("runs.db", seen, WIDTH, HEIGHT))
    svg = console.export_svg(title="speval watch runs.db", unique_id="watch")
    # Fonts would have to be fetched from elsewhere.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace(
        "Fira Code, monospace", "ui-monospace, Menlo, monospace"
    )
    (ROOT / "docs" / "watch.svg").write_text(svg)


def draw_digits() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for example in ("04_tune_digits.py", "04_draw_digits.py"):
            subprocess.run([sys.executable, ROOT / "examples" / example], cwd=folder, check=True)
        (Path(folder) / "04_digits.svg").replace(ROOT / "docs" / "digits.svg")


if __name__ == "__main__":
    draw_watch()
    draw_digits()
