"""``python -m speval`` is the command ``speval``.

Owns nothing. Invariant: it does what the installed command does.
"""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
