"""Objects that a forked child must not keep.

Owns the list of objects with descriptors of worker processes. Invariant: after a fork only the parent has these descriptors,
so the death of the parent reaches its worker processes, and the child can't affect them.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["forgotten_after_fork"]


class _Forgets(Protocol):
    def forget(self) -> None: ...


_all: weakref.WeakSet[_Forgets] = weakref.WeakSet()


def forgotten_after_fork(one: _Forgets) -> None:
    """Call ``one.forget()`` in every child that is forked while ``one`` is alive."""
    _all.add(one)


def _forget() -> None:
    for one in list(_all):
        one.forget()
    _all.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
