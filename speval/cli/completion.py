"""Shell completion for the command.

Owns the completion scripts for bash and fish, which replace click's, and the completions they receive. Invariant: the name of
an evaluation comes from a database, so it reaches the command line only as one quoted word. Zsh and fish quote what they
insert. Bash does not: its quoting of file names leaves "$" and "`" active, so this module quotes for it.
"""

from __future__ import annotations

import os
import re
from typing import ClassVar

from click.shell_completion import (
    BashComplete,
    FishComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

__all__ = ["get_completion_class"]

# Bash would split COMP_WORDS at each "=" and ":" of a name.
_BASH = """\
%(complete_func)s() {
    local entry
    COMPREPLY=()
    while IFS= read -r entry; do
        case ${entry%%%%,*} in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            part) compopt -o nospace; COMPREPLY+=("${entry#*,}") ;;
            plain) COMPREPLY+=("${entry#*,}") ;;
        esac
    done < <(env COMP_WORDS="${COMP_LINE:0:COMP_POINT}" COMP_CWORD="$2" %(complete_var)s=bash_complete "$1")
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""

# Fish quotes what it inserts. Click's script truncates it at the first comma and passes "-n" to echo as an option.
_FISH = """\
function %(complete_func)s
    for entry in (env %(complete_var)s=fish_complete COMP_WORDS=(commandline -cp) COMP_CWORD=(commandline -t) %(prog_name)s)
        set -l parts (string split -m 1 "," -- $entry)
        switch $parts[1]
            case dir
                __fish_complete_directories $parts[2]
            case file
                __fish_complete_path $parts[2]
            case plain
                printf "%%s\\n" $parts[2]
        end
    end
end

complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""


class _Bash(BashComplete):
    """Completes the last word before the cursor; bash replaces the part after the last word break, passed in ``$2``."""

    source_template: ClassVar[str] = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        words = _words(os.environ["COMP_WORDS"])
        return words[1:-1], words[-1] if words[1:] else ""

    def complete(self) -> str:
        args, incomplete = self.get_completion_args()
        items = self.get_completions(args, incomplete)
        if not any(item.stored for item in items):
            return "\n".join(map(self.format_completion, items))
        items = [item for item in items if item.value.startswith(incomplete)]
        replaced = os.environ["COMP_CWORD"]
        if not incomplete.endswith(replaced):
            replaced = _words(replaced)[-1]
        values = [item.value[len(incomplete) - len(replaced) :] for item in items]
        quote = _open_quote(os.environ["COMP_WORDS"])
        # Bash inserts the common prefix, even when it ends inside an escape sequence, so this code computes it.
        common = os.path.commonprefix(values)  # noqa: RUF071
        if len(values) > 1 and len(common) > len(replaced):
            return f"part,{_begun(common, quote)}"
        entries = [f"plain,{_quoted(value, quote)}" for value in values]
        return "\n".join(entries if len(values) == 1 else [*entries, "plain, "])  # the blank leaves no common prefix


class _Fish(FishComplete):
    source_template: ClassVar[str] = _FISH


def _words(line: str) -> list[str]:
    """Return the words of a line. The last word is incomplete: it may be empty, and its quote may be open."""
    *words, last = split_arg_string(f"{line}x")
    return [*words, last[:-1]]


def _open_quote(line: str) -> str:
    """Return the quote character that is open at the end of a line, or an empty string."""
    rest = re.sub(r"""\\.|'[^']*'|"(?:\\.|[^"\\])*\"""", "", line, flags=re.DOTALL)
    found = re.search("['\"]", rest)
    return found[0] if found else ""


def _begun(text: str, quote: str) -> str:
    """Return the text quoted for bash as the start of a word; ``quote`` is open before it and stays open."""
    if quote == "'":
        return quote + text.replace("'", "'\\''")
    if quote == '"':
        # Bash expands history inside double quotes, and keeps a backslash before "!".
        return quote + re.sub(r'[$`"\\]', r"\\\g<0>", text).replace("!", '"\\!"')
    return re.sub(r"[^\w@%+=:,./-]", r"\\\g<0>", text)


def _quoted(text: str, quote: str) -> str:
    return _begun(text, quote) + quote


add_completion_class(_Bash)
add_completion_class(_Fish)
