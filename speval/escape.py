"""Text for people: untrusted text, durations and rates.

Owns the escaping of untrusted text, and the format of durations and rates. Invariant: no control character of untrusted text
reaches a terminal.
"""

from __future__ import annotations

import math

__all__ = ["rate", "shown_number", "span", "visible"]


def visible(text: str) -> str:
    """Return the text with control characters escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown_number(number: int) -> str:
    """Return a whole number as text, or the size of a very long one: Python refuses to convert thousands of digits."""
    return repr(number) if number.bit_length() <= 128 else f"<{number.bit_length()} bits>"


def span(seconds: float | None) -> str:
    """Return a duration in seconds as short text: 35 s, 2 min 5 s."""
    if seconds is None:
        return ""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):  # the file was edited by another program
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
    """Return a rate per second, minute or hour: the shortest unit in which it is at least 1."""
    for factor, unit in ((1, "s"), (60, "min")):
        if per_second * factor >= 1:
            return f"{per_second * factor:,.3g}/{unit}" if per_second < 1000 else f"{per_second:,.0f}/{unit}"
    return f"{per_second * 3600:.3g}/h"
