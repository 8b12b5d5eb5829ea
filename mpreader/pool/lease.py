"""Leases: views of shared memory whose end is noticed.

A view that a consumer has taken is *leased* to it. The lease ends by itself, when the last reference to the view, to a
slice of it, or to an array or tensor made from either, is gone. Used by the caller's side of the pool only.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Lease", "leased_view"]


class Lease(weakref.ref[object]):
    """The lease ``number``; dead when nothing refers to its memory any more.

    Its owner must keep it: a weak reference that is itself gone tells nobody anything.
    """

    __slots__ = ("number",)
    number: int


def leased_view(
    memory: mmap.mmap, offset: int, nbytes: int, number: int, on_end: Callable[[Lease], object]
) -> tuple[memoryview, Lease]:
    """Make a writable view of ``nbytes`` of a segment from ``offset`` on, and the lease that watches it.

    Args:
        memory: The segment. The view keeps it mapped, also after its owner has forgotten it.
        offset: First byte of the view in the segment.
        nbytes: Bytes of the view.
        number: Number of the lease.
        on_end: Called once, from whatever thread drops the last reference. It must not block or take a lock that this
            thread may hold. And it must not be written in Python: a Ctrl-C that strikes in such a callback is
            printed, and then lost.
    """
    import numpy as np  # costs 0.1 s: not before the first bytes are there

    # The array, not the view: slices of a view hold on to what is below it, and only that can be watched.
    array = np.frombuffer(memory, np.uint8, nbytes, offset)
    lease = Lease(array, on_end)
    lease.number = number
    return memoryview(cast("Buffer", array)), lease
