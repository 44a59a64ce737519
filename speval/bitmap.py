"""A set of numbers that costs a bit for each where they are dense.

Owns the memory of what has been seen. Invariant: it costs no more than some two hundred bytes for each number, however far
apart they are: an id in a file that somebody has tinkered with may be any number.
"""

from __future__ import annotations

__all__ = ["Bitmap"]

_BITS = 1024  # of one part


class Bitmap:
    """Numbers, each of which is in it or not."""

    def __init__(self) -> None:
        self._parts: dict[int, bytearray] = {}

    def add(self, number: int) -> bool:
        """Put a number in, and tell whether it was not there before."""
        place, bit = divmod(number, _BITS)
        part = self._parts.get(place)
        if part is None:
            part = self._parts[place] = bytearray(_BITS // 8)
        byte, mask = bit >> 3, 1 << (bit & 7)
        if part[byte] & mask:
            return False
        part[byte] |= mask
        return True

    def __contains__(self, number: int) -> bool:
        place, bit = divmod(number, _BITS)
        part = self._parts.get(place)
        return part is not None and bool(part[bit >> 3] & 1 << (bit & 7))
