"""Text from elsewhere on its way to people.

Owns how it is shown. Invariant: no control character of it reaches a terminal, whoever has put it there.
"""

from __future__ import annotations

__all__ = ["visible"]


def visible(text: str) -> str:
    """Return the text with control characters spelled out instead of sent."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
