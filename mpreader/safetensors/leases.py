"""Leases: count the shared memory that is held by tensors of streams whose users still have them."""

from __future__ import annotations

import contextlib
import os
from collections import deque

import numpy as np

from mpreader.pool.lease import Lease

__all__ = ["HELD_SLOTS", "HeldSlots"]


class HeldSlots:
    """Slots of shared memory whose views were handed out, each until its last view is gone.

    A slot may hold many tensors, and any one of them keeps it: slots are counted, not tensors. Memory that is not a
    slot is not counted. Thread-safe without a lock, since a fork could leave one locked.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._leases: dict[int, tuple[Lease, int]] = {}  # and bytes of the slots, by the identity of their arrays
        # Filled by whichever thread drops a last view, at any point. The callback is written in C: one in Python could
        # be interrupted there by a Ctrl-C, which would be lost.
        self._ended: deque[object] = deque()

    def try_hold(self, view: memoryview, max_bytes: int) -> bool:
        """Count the slot of a view as held, and return True; return False if more than ``max_bytes`` would be held."""
        if os.getpid() != self._pid:  # views do not survive a fork
            self.__init__()  # type: ignore[misc]
        self._forget_ended()
        slot = view.obj
        # Local files are read into arrays that have memory of their own.
        if not isinstance(slot, np.ndarray) or slot.base is None or id(slot) in self._leases:
            return True
        if sum(nbytes for _, nbytes in list(self._leases.values())) + slot.nbytes > max_bytes:
            return False
        lease = Lease(slot, self._ended.append)
        lease.number = id(slot)
        self._leases[lease.number] = lease, slot.nbytes
        return True

    def _forget_ended(self) -> None:
        with contextlib.suppress(IndexError):  # another thread may have taken the last one
            while True:
                ended = self._ended.popleft()
                assert isinstance(ended, Lease)
                self._leases.pop(ended.number, None)


HELD_SLOTS = HeldSlots()
"""Held slots of this process: streams that share a pool share its memory."""
