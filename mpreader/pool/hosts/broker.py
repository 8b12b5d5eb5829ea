"""Broker: shares one read of a coordinator between the ranks of a host. It decides only; a server moves its messages.

To the coordinator it is one caller with one read, the union of what the ranks need. To each rank it is a coordinator,
with a read of the rank's own::

    coordinator ── SlotArrived(slot read) ──► broker ── SlotArrived ──► every rank that has subscribed to it
    coordinator ◄─ GiveBack ───────────────── broker ◄─ GiveBack ────── the last of them

A slot is *kept* by the ranks that have subscribed to it and are not done with it: those that have not got it yet
included. All ranks take in the same order, so a rank that is ahead waits for those behind it only while memory is full.
A slot goes to all its ranks when the first of them waits for it. The coordinator may recall it as long as no consumer
has a view of it.

What the ranks keep counts as read ahead: the coordinator is not told that it was taken, so that all ranks together take
no more memory than one that reads alone. For the same reason a rank's demand, which would be served beyond the window,
is only passed on if every rank that keeps something waits, too: any other one is about to give memory back.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from mpreader.errors import ArenaExhausted
from mpreader.pool.hosts.messages import Subscription
from mpreader.pool.hosts.shares import Post, SharedSlot, SharingRank
from mpreader.pool.requests import (
    CloseRead,
    Demand,
    Discard,
    Ended,
    GiveBack,
    HeldUp,
    OpenRead,
    ReadId,
    Recall,
    RequestCut,
    RequestEnded,
    RequestRepeated,
    SegmentMemory,
    SlotArrived,
    SlotFailed,
    SlotRead,
    SlotTaken,
    SourceName,
    VersionLearned,
)
from mpreader.pool.stats import Tally
from mpreader.pool.worker.messages import MapSegment, UnmapSegment

__all__ = ["Broker"]


class Broker:
    """One read, and the ranks that share it. Not thread-safe.

    Args:
        read: Name of the read, to the coordinator.
        tell: Sends a message to the coordinator.
        on_repeat: Called with the index of a slot read that was received once more after a consumer has taken it,
            before any rank gets it.

    Attributes:
        tally: Statistics of the read.
        has_ended: True when the coordinator has ended.
    """

    def __init__(self, read: ReadId, tell: Callable[[object], None], on_repeat: Callable[[int], object]) -> None:
        self._read = read
        self._tell = tell
        self._on_repeat = on_repeat
        self._slots: list[SharedSlot] = []
        self._slot_reads: Sequence[SlotRead] = ()
        self._ranks: dict[int, SharingRank] = {}
        self._numbers = itertools.count(1)
        self._awaited: set[int] = set()  # slot reads that ranks wait for
        self.tally = Tally()
        self.has_ended = False
        self._from_coordinator: dict[type, Callable[[Any], None]] = {
            SlotArrived: self._slot_arrived,
            SlotFailed: self._slot_failed,
            Recall: self._recall,
            UnmapSegment: self._unmap,
            VersionLearned: self.tell_version,
            RequestEnded: self._request_ended,
            RequestRepeated: self._request_repeated,
            RequestCut: self._request_cut,
            HeldUp: self._held_up,
            Ended: self._ended,
        }
        self._from_rank: dict[type, Callable[[SharingRank, Any], None]] = {
            Demand: self._demand,
            SlotTaken: self._slot_taken,
            GiveBack: self._give_back,
            Discard: self._discard,
            CloseRead: self._close_read,
        }

    @property
    def is_over(self) -> bool:
        """True if no rank takes part any more."""
        return not self._ranks

    def open(self, sources: Sequence[SourceName], slot_reads: Sequence[SlotRead]) -> OpenRead:
        """Return the message that begins the read; the ranks are added before it is sent."""
        self._slot_reads = slot_reads
        self._slots = [SharedSlot() for _ in slot_reads]
        return OpenRead(self._read, tuple(sources), tuple(slot_reads))

    def add_rank(self, number: int, read: ReadId, post: Post, subscription: Subscription) -> None:
        """Let a rank take part.

        Args:
            number: Number of the rank, for :meth:`from_rank`.
            read: Name of its read.
            post: Sends it a message; must not block, and must not fail.
            subscription: What it will take.
        """
        if not subscription.indices:  # it takes nothing, and will say nothing
            return
        self._ranks[number] = SharingRank(read, post, subscription)
        for index in subscription.indices:
            self._slots[index].kept_by.add(number)

    def discard_unwanted(self) -> None:
        """Tell the coordinator which slot reads no rank takes, after all ranks were added."""
        for index, slot in enumerate(self._slots):
            if not slot.kept_by:
                self._tell(Discard(self._read, index, index + 1))

    def drop(self, number: int) -> None:
        """End the part of a rank that is dead, or must not read its slots any more."""
        rank = self._ranks.pop(number, None)
        if rank is not None:
            for index in rank.indices:
                slot = self._slots[index]
                if slot.holders.pop(number, 0) or number in slot.kept_by:
                    slot.kept_by.discard(number)
                    self._settle(index, slot)
            self._pass_on_demands()

    def overdue(self, timeout_s: float) -> set[int]:
        """Returns the ranks that keep memory for which others have waited longer than ``timeout_s``."""
        now = time.monotonic()
        waited = [slot for slot in self._slots if slot.demanded_s is not None and slot.arrived is None]
        if not any(now - slot.demanded_s > timeout_s for slot in waited if slot.demanded_s is not None):
            return set()
        return {number for number, rank in self._ranks.items() if rank.is_at_work}

    # -- from the coordinator

    def from_coordinator(self, message: object, memory: SegmentMemory | None = None) -> None:
        """Take a message of the coordinator."""
        if isinstance(message, MapSegment):
            assert memory is not None, "a segment comes with its memory"
            for rank in self._ranks.values():
                rank.post(message, memory)
        else:
            self._from_coordinator[type(message)](message)

    def _slot_arrived(self, message: SlotArrived) -> None:
        slot = self._slots[message.slot_read]
        slot.arrived, slot.is_demanded = message, False
        if slot.was_taken:
            self._on_repeat(message.slot_read)
        self.tally.over_read += self._slot_reads[message.slot_read].over_read
        if not slot.kept_by:
            self._release(slot)
        elif slot.demanded_s is not None:
            self._share(message.slot_read, slot)

    def _share(self, index: int, slot: SharedSlot) -> None:
        """Give a slot to all ranks that keep it and have not got it yet; one that is recalled, to those that wait."""
        arrived = slot.arrived
        assert arrived is not None, "only what has arrived is shared"
        self._end_wait(index, slot)
        for number in slot.kept_by:
            rank = self._ranks[number]
            if index in rank.waits_for or (number not in slot.holders and not slot.is_recalled):
                lease = next(self._numbers)
                rank.leases[lease] = index
                rank.untaken[index] = lease
                slot.holders[number] = slot.holders.get(number, 0) + 1
                rank.waits_for.discard(index)
                rank.post(SlotArrived(rank.read, rank.own_index[index], lease, arrived.segment, arrived.offset), None)

    def _slot_failed(self, message: SlotFailed) -> None:
        slot = self._slots[message.slot_read]
        slot.is_demanded = False
        self._end_wait(message.slot_read, slot)
        # Memory that is short now may be there when it is asked for again; all else fails for everyone.
        is_final = not isinstance(message.error, ArenaExhausted)
        for number in [*slot.kept_by]:
            rank = self._ranks[number]
            rank.waits_for.discard(message.slot_read)
            rank.post(SlotFailed(rank.read, rank.own_index[message.slot_read], message.error), None)
            if is_final:
                slot.kept_by.discard(number)
        self._pass_on_demands()

    def _recall(self, message: Recall) -> None:
        slot = self._slots[message.slot_read]
        if slot.arrived is not None and slot.arrived.lease == message.lease:
            slot.is_recalled = True
            self._settle(message.slot_read, slot)

    def _unmap(self, message: UnmapSegment) -> None:
        for rank in self._ranks.values():
            rank.post(message, None)

    def tell_version(self, message: VersionLearned) -> None:
        """Tell the ranks of the version of a source, before they get any bytes of it."""
        for rank in self._ranks.values():
            source = rank.sources.get(message.source)
            if source is not None:
                rank.post(VersionLearned(rank.read, source, message.version), None)

    def _request_ended(self, message: RequestEnded) -> None:
        self.tally.note(message.worker, message.nbytes, message.seconds)

    def _request_repeated(self, _: RequestRepeated) -> None:
        self.tally.retries += 1

    def _request_cut(self, _: RequestCut) -> None:
        self.tally.slow_cut += 1

    def _held_up(self, message: HeldUp) -> None:
        self.tally.consumer_seconds += message.seconds

    def _ended(self, message: Ended) -> None:
        self.has_ended = True
        for rank in self._ranks.values():
            rank.post(message, None)
        self._ranks.clear()
        self._slots.clear()

    # -- from the ranks

    def from_rank(self, number: int, message: object) -> None:
        """Take a message of a rank; one that does not take part any more is not heard."""
        rank = self._ranks.get(number)
        if rank is not None:
            self._from_rank[type(message)](rank, message)
            if rank.is_closed and not rank.leases:
                self.drop(number)
            elif self._awaited:
                self._pass_on_demands()

    def _demand(self, rank: SharingRank, message: Demand) -> None:
        index = rank.indices[message.slot_read]
        if index in rank.untaken:  # it was sent before this was heard
            return
        slot = self._slots[index]
        slot.kept_by.add(rank.number)  # it may have been done with it, and want it once more
        rank.waits_for.add(index)
        if slot.arrived is not None:
            self._share(index, slot)
        elif slot.demanded_s is None:
            slot.demanded_s = time.monotonic()
            self._awaited.add(index)

    def _slot_taken(self, rank: SharingRank, message: SlotTaken) -> None:
        index = rank.leases.get(message.lease)
        if index is not None and rank.untaken.get(index) == message.lease:
            del rank.untaken[index]
            self._slots[index].was_taken = True
            self._settle(index, self._slots[index])

    def _give_back(self, rank: SharingRank, message: GiveBack) -> None:
        index = rank.leases.pop(message.lease, None)
        if index is None:
            return
        number, slot = rank.number, self._slots[index]
        slot.holders[number] -= 1
        if not slot.holders[number]:
            del slot.holders[number]
        if rank.untaken.get(index) == message.lease:  # recalled: it will ask for it anew, unless it was discarded
            del rank.untaken[index]
        elif index not in rank.waits_for:
            slot.kept_by.discard(number)
        self._settle(index, slot)

    def _discard(self, rank: SharingRank, message: Discard) -> None:
        for own in range(message.start, message.stop):
            index = rank.indices[own]
            lease = rank.untaken.get(index)
            if lease is not None:  # it answers by giving back, unless a consumer just takes it
                rank.post(Recall(rank.read, own, lease), None)
            self._done(rank.number, index)

    def _close_read(self, rank: SharingRank, _: CloseRead) -> None:
        rank.is_closed = True
        rank.waits_for.clear()
        for index in rank.indices:
            self._done(rank.number, index)

    # -- slots

    def _done(self, number: int, index: int) -> None:
        """Note that a rank will not take a slot read, or not once more."""
        slot = self._slots[index]
        if number in slot.kept_by:
            slot.kept_by.discard(number)
            self._settle(index, slot)

    def _settle(self, index: int, slot: SharedSlot) -> None:
        """Let the memory of a slot go if no rank keeps it, or if the coordinator wants it back and nobody uses it.

        Ranks that have got such a slot, but are not about to take it, lose it, and ask for it when they need it.
        Otherwise one that is behind could keep all memory by what others have taken, and wait for memory itself.
        """
        if slot.arrived is None:
            if not slot.kept_by:
                self._end_wait(index, slot)
                self._tell(Discard(self._read, index, index + 1))
        elif not slot.holders and (slot.is_recalled or not slot.kept_by):
            self._release(slot)
        elif slot.is_recalled:
            self._recall_from_ranks(index, slot, slot.arrived.lease)

    def _recall_from_ranks(self, index: int, slot: SharedSlot, lease: int) -> None:
        holders = {number: self._ranks[number] for number in slot.holders}
        if all(slot.holders[number] == 1 and index in rank.untaken for number, rank in holders.items()):
            for rank in holders.values():
                rank.post(Recall(rank.read, rank.own_index[index], rank.untaken[index]), None)
        elif not slot.is_taken:
            slot.is_taken = True
            self._tell(SlotTaken(lease))

    def _release(self, slot: SharedSlot) -> None:
        arrived, slot.arrived = slot.arrived, None
        slot.is_recalled = slot.is_taken = False
        if arrived is not None:
            self._tell(GiveBack(arrived.lease))

    def _end_wait(self, index: int, slot: SharedSlot) -> None:
        slot.demanded_s = None
        self._awaited.discard(index)

    def _pass_on_demands(self) -> None:
        """Tell the coordinator what is waited for, unless a rank is about to give memory back.

        Only of what comes first: with it, those that are behind get on, and take what is kept for them. Those that are
        ahead, within a large tensor for one, must not have the memory that these need.
        """
        if not self._awaited or any(rank.is_at_work for rank in self._ranks.values()):
            return
        index = min(self._awaited)
        slot = self._slots[index]
        if not slot.is_demanded:
            slot.is_demanded = True
            self._tell(Demand(self._read, index))
