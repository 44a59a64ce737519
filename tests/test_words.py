"""Comments, docstrings, messages and pages are in plain English.

A reader whose English is a second language should understand each sentence at once. The phrases below usually mark a
sentence that fails this: a riddle, an inversion, or a pronoun for a program.
"""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = sorted(
    path
    for folder, kinds in (("speval", ("py", "sql")), ("docs", ("md",)), ("examples", ("py",)), (".", ("md",)))
    for kind in kinds
    for path in (ROOT.glob(f"*.{kind}") if folder == "." else (ROOT / folder).rglob(f"*.{kind}"))
    if path.name != "original-README.rst"
)

# A phrase, and what to write in its place.
PLAIN = {
    r"whoever|whomever|whom": "name the program or the person: the worker, another process, the reader",
    r"nobody|anybody|somebody|everybody": "name the program or the person: no worker, another program, a user",
    r"(?<!there )(?<!There )(is|are|was|were) no(?! longer| more)": "is not a, has no, must be",
    r"none of": "not one of, or say what it is in place of what it is not",
    r"of (its|their|one's|his|our|my) own": "a separate, another, its",
    r"as late as can be": "as late as possible",
    r"bit by bit": "lazy (a space), incrementally",
    r"does not exist yet": "lazy (a space), or: is missing",
    r"strangers?|stranger's": "unlisted (an evaluation), untrusted (a file), another user",
    r"tinkered": "edited by another program",
    r"under the bonnet": "check",
    r"given back unused": "released",
    r"left as it (is|was)|as it was": "not changed",
    r"(stands?|stood|standing) still": "hangs, is suspended, is unchanged",
    r"is not there|are not there": "does not exist, is missing",
    r"bury|buried": "reap",
    r"to be had|can be had|be had": "available",
    r"has to be|have to be|had to be": "must be",
    r"sees? to it|saw to it": "checks, ensures",
}
WORDS = re.compile("|".join(rf"(?P<p{n}>\b(?:{pattern})\b)" for n, pattern in enumerate(PLAIN)), re.IGNORECASE)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_of(path: Path) -> list[tuple[int, str]]:
    """Return the English lines of a file with their numbers: comments and strings of code, and prose of pages."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        found = []
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING) or tokenize.tok_name[token.type] == "FSTRING_MIDDLE":
                found += [(token.start[0] + n, line) for n, line in enumerate(token.string.splitlines())]
        return found
    if path.suffix == ".sql":
        return [(n, line.partition("--")[2]) for n, line in enumerate(text.splitlines(), 1) if "--" in line]
    prose, is_code = [], False
    for n, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code:
            prose.append((n, re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)))
    return prose


def offences(path: Path) -> list[str]:
    found = []
    for number, line in lines_of(path):
        for match in WORDS.finditer(line):
            plain = list(PLAIN.values())[int(str(match.lastgroup)[1:])]
            found.append(f"{name(path)}:{number}: {match[0]!r}; write: {plain}")
    return found


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_texts_are_in_plain_words(path: Path) -> None:
    assert offences(path) == []


def test_a_riddle_is_found_where_it_stands(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text('"""Whoever\nreads it."""\nnobody = 1  # none of ours\n', encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text("It `is no` riddle.\n\n```\nnobody\n```\nIt is no riddle; there is no riddle.\n", encoding="utf-8")
    statement = tmp_path / "statement.sql"
    statement.write_text("SELECT nobody  -- nobody\n", encoding="utf-8")
    found = {path: [number for number, line in lines_of(path) if WORDS.search(line)] for path in (code, page, statement)}
    assert found == {code: [1, 3], page: [6], statement: [1]}
