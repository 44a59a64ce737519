"""A set of whole numbers that needs one bit per number where they are dense.

Owns the set of ids that have been seen. Invariant: a number needs at most about two hundred bytes, also when the numbers are
far apart: a file that another program has edited may contain any id.
"""

from __future__ import annotations

__all__ = ["Bitmap"]

_BITS = 1024  # of one part


class Bitmap:
    """A set of whole numbers."""

    def __init__(self) -> None:
        self._parts: dict[int, bytearray] = {}

    def add(self, number: int) -> bool:
        """Add a number; return whether it is new."""
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
