"""Leases: how much shared memory is kept by the tensors of streams that their users have not dropped yet."""

from __future__ import annotations

import contextlib
import os
from collections import deque

import numpy as np

from mpreader.pool.lease import Lease

__all__ = ["HELD_SLOTS", "HeldSlots"]


class HeldSlots:
    """Slots of shared memory whose views were handed out, until the last view of each is gone.

    A slot may hold many tensors, and each of them keeps it: what counts is the slot, not the tensor. Memory that is no
    slot does not count. Threads may use it at the same time: it has no lock, which a fork could leave locked.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._leases: dict[int, tuple[Lease, int]] = {}  # with the bytes of the slot, by the identity of its array
        # Filled by whoever drops the last view, at any point of any thread: a callback in Python could be interrupted
        # there by a Ctrl-C, which would be lost.
        self._ended: deque[object] = deque()

    def try_hold(self, view: memoryview, most_nbytes: int) -> bool:
        """Count the slot of a view as held; False if more than ``most_nbytes`` would be held then."""
        if os.getpid() != self._pid:  # views do not survive a fork
            self.__init__()  # type: ignore[misc]
        self._forget_ended()
        slot = view.obj
        # Local files are read into arrays that have memory of their own.
        if not isinstance(slot, np.ndarray) or slot.base is None or id(slot) in self._leases:
            return True
        if sum(nbytes for _, nbytes in list(self._leases.values())) + slot.nbytes > most_nbytes:
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
"""Those of this process: streams that use one pool use one memory."""
