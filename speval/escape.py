"""Text from elsewhere on its way to people.

Owns how it is shown, and how durations and rates are told. Invariant: no control character of it reaches a terminal, whoever
has put it there.
"""

from __future__ import annotations

import math

__all__ = ["rate", "shown_number", "span", "visible"]


def visible(text: str) -> str:
    """Return the text with control characters spelled out instead of sent."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown_number(number: int) -> str:
    """Return a whole number as text; of a very long one its size, since Python refuses to write thousands of digits."""
    return repr(number) if number.bit_length() <= 128 else f"<{number.bit_length()} bits>"


def span(seconds: float | None) -> str:
    """Return a duration as people say it."""
    if seconds is None:
        return ""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):  # in a file that somebody has tinkered with
        return visible(str(seconds))
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds >= 0.05 or seconds <= 0 else f"{seconds * 1000:.3g} ms"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{round(whole / 60)} min"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole / 86400:.1f} d"


def rate(per_second: float) -> str:
    """Return a rate per second, minute or hour, so that it is one or more."""
    for factor, unit in ((1, "s"), (60, "min")):
        if per_second * factor >= 1:
            return f"{per_second * factor:,.3g}/{unit}" if per_second < 1000 else f"{per_second:,.0f}/{unit}"
    return f"{per_second * 3600:.3g}/h"
