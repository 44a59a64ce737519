"""The types of the public face: what mypy and pyright make of calls that are right, and of calls that are wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKERS = {
    "mypy": (sys.executable, "-m", "mypy"),
    "pyright": (sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable),
}
SLIPS = {  # what is wrong, and what each checker says of it
    "assert_type(retry('runs.db'), str)": {"mypy": "assert-type", "pyright": "reportAssertTypeFailure"},
    "load_evals(5)": {"mypy": "arg-type", "pyright": "reportArgumentType"},
    "retry('runs.db')  # type: ignore[arg-type]": {"mypy": "unused-ignore", "pyright": "reportUnnecessaryTypeIgnoreComment"},
}

pytestmark = [
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="the settings are those of a checkout"),
    pytest.mark.timeout(600),  # half a minute of CPU the first time, which a busy machine takes long to give
    pytest.mark.xdist_group("typing"),  # the second run of a checker uses what the first one has stored
]


def checked(checker: str, *files: Path | str) -> subprocess.CompletedProcess[str]:
    command = [*CHECKERS[checker], *files]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@pytest.mark.parametrize("checker", CHECKERS)
def test_right_calls_have_their_types_and_wrong_ones_are_refused(checker: str):
    done = checked(checker, *sorted((ROOT / "tests" / "typing").glob("*.py")))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("checker", CHECKERS)
def test_each_slip_is_noticed(checker: str, tmp_path: Path):
    """Lest the test above passes because nothing is looked at."""
    slips = tmp_path / "slips.py"
    slips.write_text("from typing import assert_type\nfrom speval import load_evals, retry\n" + "\n".join(SLIPS))
    done = checked(checker, slips)
    assert done.returncode == 1, done.stdout + done.stderr
    for number, (slip, said) in enumerate(SLIPS.items(), 3):
        assert f"{slips.name}:{number}:" in done.stdout, slip
        assert said[checker] in done.stdout, slip
