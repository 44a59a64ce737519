"""Record the film of the README: ``python -m benchmarks.recording``, a quarter of a minute.

``docs/recording.svg`` shows two real terminals. The upper one runs the first script of README.md, the lower one kills it with
``kill -9``, and the upper one starts it again. The picture shows what the terminals showed. A wait without a change is cut to
``IDLE`` seconds, so a busy machine makes the same film.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import pyte

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "recording.svg"

COLUMNS, UPPER, LOWER = 76, 9, 2  # characters and rows
CELL, ROW, SIZE, PAD = 8.4, 20, 14, 16  # pixels; CELL is the width of a character at font size SIZE
KEY = 0.04  # seconds between two keystrokes
IDLE = 0.7  # seconds
STILL = 3.0  # seconds for which the last picture stays
BLOCKS = " ▏▎▍▌▋▊▉█"  # each fills one eighth of a cell more
INK = {"default": "#d6deeb", "green": "#5eead4"}

STYLE = """\
text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:#d6deeb;white-space:pre}
g.r{visibility:hidden;animation-duration:%.2fs;animation-timing-function:step-end;animation-iteration-count:infinite}
g.r.e{visibility:visible}
%s
@media (prefers-reduced-motion:reduce){g.r{animation:none!important}}"""


@dataclass(frozen=True)
class Run:
    """Neighbouring characters of one look: text, or a bar of so many eighths of a cell."""

    column: int
    text: str
    ink: str
    bold: bool
    eighths: int = 0


Line = tuple[Run, ...]


class Terminal:
    """A shell in a terminal, and what has been on its screen since when."""

    def __init__(self, rows: int, folder: Path, start: float) -> None:
        self.screen = pyte.Screen(COLUMNS, rows)
        self.seen: list[tuple[float, list[Line]]] = []
        self._stream = pyte.ByteStream(self.screen)
        self._start = start
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {"PATH": path, "HOME": str(folder), "TERM": "xterm-256color", "LANG": "C.UTF-8", "PS1": r"\[\e[32m\]$\[\e[0m\] "}
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "--noediting"], env)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, COLUMNS, 0, 0))

    def read(self) -> None:
        self._stream.feed(os.read(self.fd, 65536))
        self.seen.append((time.monotonic() - self._start, [self._line(row) for row in range(self.screen.lines)]))

    def text(self) -> str:
        return "\n".join(self.screen.display)

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.fd)

    def _line(self, row: int) -> Line:
        runs: list[Run] = []
        for column in range(COLUMNS):
            char = self.screen.buffer[row][column]
            ink, eighths = INK.get(char.fg, INK["default"]), BLOCKS.find(char.data)
            last = runs[-1] if runs else None
            if eighths > 0:
                if last is not None and last.eighths and last.eighths == 8 * (column - last.column):
                    runs[-1] = Run(last.column, "", last.ink, last.bold, last.eighths + eighths)
                else:
                    runs.append(Run(column, "", INK["green"], False, eighths))
            elif last is not None and not last.eighths and (last.ink, last.bold) == (ink, char.bold):
                runs[-1] = Run(last.column, last.text + char.data, ink, char.bold)
            else:
                runs.append(Run(column, char.data, ink, char.bold))
        trimmed = [Run(run.column, run.text.rstrip(), run.ink, run.bold, run.eighths) for run in runs]
        return tuple(run for run in trimmed if run.text or run.eighths)


@dataclass
class Film:
    """Two terminals, and the hands that type in them."""

    folder: Path
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.upper, self.lower = (Terminal(rows, self.folder, self.start) for rows in (UPPER, LOWER))

    def wait(self, seconds: float, until: str = "") -> None:
        """Read both screens for a while, or until the upper one shows a pattern."""
        end = time.monotonic() + seconds
        terminals = {terminal.fd: terminal for terminal in (self.upper, self.lower)}
        while (left := end - time.monotonic()) > 0:
            for fd in select.select(list(terminals), [], [], left)[0]:
                terminals[fd].read()
            if until and re.search(until, self.upper.text()):
                return
        if until:
            raise SystemExit(f"{until!r} was not shown within {seconds} s:\n{self.upper.text()}")

    def type(self, terminal: Terminal, text: str) -> None:
        for key in text:
            os.write(terminal.fd, key.encode())
            self.wait(KEY)

    def close(self) -> float:
        """End both shells, cut long waits, and return the length of the film in seconds."""
        cut: dict[float, float] = {}
        last = length = 0.0
        for at in sorted(at for terminal in (self.upper, self.lower) for at, _ in terminal.seen):
            length += min(at - last, IDLE)
            cut[at], last = length, at
        for terminal in (self.upper, self.lower):
            terminal.close()
            terminal.seen = [(cut[at], lines) for at, lines in terminal.seen]
        return length + STILL


def record(folder: Path) -> tuple[Film, float]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = re.search(r"```python\n(# tune\.py\n.*?)```", readme, re.DOTALL)
    assert script is not None, "README.md has no tune.py"
    (folder / "tune.py").write_text(script[1])
    film = Film(folder)
    film.wait(0.7)
    film.type(film.upper, "python tune.py\n")
    film.wait(30, until=" 3/12")
    children = ["ps", "-o", "pid=", "--ppid", str(film.upper.pid)]
    pid = subprocess.run(children, capture_output=True, text=True, check=True).stdout.split()[0]
    film.type(film.lower, f"kill -9 {pid}")
    film.wait(30, until=" 5/12")
    film.type(film.lower, "\n")
    film.wait(10, until="Killed")
    film.wait(0.8)
    film.type(film.upper, "python tune.py\n")
    film.wait(30, until=r"12 completed in.*\n\$")
    return film, film.close()


def spans(seen: list[tuple[float, list[Line]]], row: int, length: float) -> list[tuple[float, float, Line]]:
    """Return from when to when each line stood in a row."""
    found: list[tuple[float, float, Line]] = []
    for at, lines in seen:
        if found and found[-1][2] == lines[row]:
            continue
        if found:
            found[-1] = (found[-1][0], at, found[-1][2])
        found.append((at, length, lines[row]))
    return [span for span in found if span[2] and span[1] - span[0] > 0.02]


def draw(line: Line, top: float) -> str:
    drawn = []
    for run in line:
        x = PAD + run.column * CELL
        if run.eighths:
            wide = run.eighths * CELL / 8
            drawn.append(f'<rect x="{x:.1f}" y="{top + 3}" width="{wide:.1f}" height="{ROW - 5}" fill="{run.ink}"/>')
            continue
        look = "" if run.ink == INK["default"] else f' style="fill:{run.ink}"'
        # The length keeps the columns, whatever font the reader has.
        length = f'textLength="{len(run.text) * CELL:.1f}" lengthAdjust="spacingAndGlyphs"'
        drawn.append(f'<text x="{x:.1f}" y="{top + SIZE}" {length}{look}>{escape(run.text, quote=False)}</text>')
    return "".join(drawn)


def picture(film: Film, length: float) -> str:
    width = round(2 * PAD + COLUMNS * CELL)
    below = 34 + UPPER * ROW + 12  # where the lower terminal begins
    height = below + 8 + LOWER * ROW + 8
    rules: dict[str, str] = {}
    rows: list[str] = []
    for terminal, top in ((film.upper, 34), (film.lower, below + 8)):
        for row in range(terminal.screen.lines):
            for begin, end, line in spans(terminal.seen, row, length):
                frames = "0%{visibility:hidden}" if begin > 0.05 else ""
                frames += f"{100 * begin / length if frames else 0:.2f}%{{visibility:visible}}"
                last = end >= length
                frames += "" if last else f"{100 * end / length:.2f}%{{visibility:hidden}}"
                name = rules.setdefault(frames, f"k{len(rules)}")
                look = f'class="r{" e" if last else ""}" style="animation-name:{name}"'
                rows.append(f"<g {look}>{draw(line, top + row * ROW)}</g>")
    style = STYLE % (length, "\n".join(f"@keyframes {name}{{{frames}}}" for frames, name in rules.items()))
    buttons = "".join(f'<circle cx="{18 + 16 * n}" cy="16" r="5" fill="#475569"/>' for n in range(3))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        "<title>A script is killed after five of twelve evaluations. The next start computes the other seven.</title>"
        f"<style>{style}</style>"
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="9" fill="#111827" stroke="#475569"/>{buttons}'
        f'<path d="M1 {below}H{width - 1}" stroke="#475569"/>' + "\n".join(rows) + "</svg>\n"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        film, length = record(Path(folder))
    TARGET.write_text(picture(film, length), encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {length:.1f} s, {TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
