"""Slot memory: the arena with its accounts: what is read ahead, what is leased, and who holds it.

Used by the scheduler only, in the coordinator's thread. It decides nothing: the scheduler says who gets memory and who
must give it back.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from mpreader.pool.coordinator.arena import Arena, Slot
from mpreader.pool.coordinator.state import SlotReadState

__all__ = ["SlotMemory"]


class _Lease(NamedTuple):
    slot: Slot
    slot_read: SlotReadState


class SlotMemory:
    """Slots of the arena, and the leases on them.

    A slot has as many holders as there are leases on it, and goes back to the arena with the last.

    Attributes:
        arena: The arena, which makes the slots.
        ahead_bytes: Bytes of slots that are being received into, or wait to be taken. What consumers have taken is not
            counted: it must not keep the rest from being read ahead.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.ahead_bytes = 0
        self._numbers = itertools.count(1)
        self._leases: dict[int, _Lease] = {}
        self._taken: set[int] = set()

    @property
    def has_taken(self) -> bool:
        """True while consumers hold views."""
        return bool(self._taken)

    @property
    def taken_bytes(self) -> int:
        """Bytes of slots of which consumers hold views."""
        return sum(slot.nbytes for slot in {self._leases[number].slot for number in self._taken})

    def assign(self, slot: Slot, slot_read: SlotReadState) -> None:
        """Let the parts of a slot read be received into a slot."""
        slot_read.slot = slot
        self.ahead_bytes += slot.nbytes

    def release(self, slot_read: SlotReadState) -> None:
        """Take back the slot of a slot read that was never leased, if it has one."""
        slot = self._unassign(slot_read)
        if slot is not None:
            self.arena.free(slot)

    def lease(self, slot: Slot, slot_read: SlotReadState) -> int:
        """Lease a slot to the caller of a slot read; returns the number of the lease."""
        number = next(self._numbers)
        self._leases[number] = _Lease(slot, slot_read)
        slot.holders += 1
        return number

    def leases_of(self, caller: int) -> list[int]:
        """Returns the numbers of the leases that a caller has."""
        return [number for number, lease in self._leases.items() if lease.slot_read.read.id.caller == caller]

    def take(self, number: int) -> SlotReadState | None:
        """Note that a consumer has a view; returns the slot read, None if the lease is over."""
        lease = self._leases.get(number)
        if lease is None:
            return None
        self._taken.add(number)
        self._unassign(lease.slot_read)
        return lease.slot_read

    def give_back(self, number: int) -> SlotReadState | None:
        """End a lease; returns the slot read if no consumer had taken it."""
        lease = self._leases.pop(number, None)
        if lease is None:
            return None
        was_taken = number in self._taken
        self._taken.discard(number)
        if not was_taken:
            self._unassign(lease.slot_read)
        lease.slot.holders -= 1
        if not lease.slot.holders:
            self.arena.free(lease.slot)
        return None if was_taken else lease.slot_read

    def clear(self) -> None:
        """Forget all leases and slots; the arena is closed by its owner."""
        self._leases.clear()
        self._taken.clear()
        self.ahead_bytes = 0

    def _unassign(self, slot_read: SlotReadState) -> Slot | None:
        slot, slot_read.slot = slot_read.slot, None
        if slot is not None:
            self.ahead_bytes -= slot.nbytes
        return slot
