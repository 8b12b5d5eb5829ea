"""Broker: shares one read of a coordinator between the ranks of a host. It decides only; a server moves its messages.

To the coordinator it is one caller with one read, the union of what the ranks need. To each rank it is a coordinator,
with a read of the rank's own::

    coordinator ── SlotArrived(slot read) ──► broker ── SlotArrived ──► every rank that has subscribed to it
    coordinator ◄─ GiveBack ───────────────── broker ◄─ GiveBack ────── the last of them

A slot is *kept* by the ranks that have subscribed to it and are not done with it: those that have not got it yet
included. All ranks take in the same order, so a rank that is ahead waits for those behind it only while memory is full.
A slot goes to all its ranks when the first of them waits for it; until then the coordinator may recall it.

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

__all__ = ["Broker", "Post"]

Post = Callable[[object, "SegmentMemory | None"], None]
"""Sends a message to a rank; with a MapSegment goes its memory."""


class _SharedSlot:
    """A slot read of the union.

    Attributes:
        kept_by: The ranks that are not done with it.
        arrived: The slot, while the broker has it.
        is_shared: True when ranks have got it: the coordinator can't have it back.
        demanded_s: Time since when a rank waits for it; None if none does.
        is_demanded: True if the coordinator was told that.
    """

    __slots__ = ("arrived", "demanded_s", "is_demanded", "is_shared", "kept_by")

    def __init__(self) -> None:
        self.kept_by: set[int] = set()
        self.arrived: SlotArrived | None = None
        self.is_shared = False
        self.demanded_s: float | None = None
        self.is_demanded = False


class _Rank:
    """A rank that takes part.

    Attributes:
        read: Name of its read.
        post: Sends it a message.
        indices: Its slot reads, among those of the union.
        places: For each of these, its index in ``indices``.
        sources: For each of its sources, by its index in the union, the rank's own index.
        leases: Leases that it has, and the slot reads that they are of.
        holds: For each slot read that it has, the lease.
        waits_for: Slot reads that it has demanded, and not got yet.
        is_closed: True when it takes no more.
    """

    def __init__(self, read: ReadId, post: Post, subscription: Subscription) -> None:
        indices = subscription.indices
        self.read = read
        self.post = post
        self.indices = indices
        self.places = {index: place for place, index in enumerate(indices)}
        self.sources = {index: place for place, index in enumerate(subscription.sources)}
        self.leases: dict[int, int] = {}
        self.holds: dict[int, int] = {}
        self.waits_for: set[int] = set()
        self.is_closed = False


class Broker:
    """One read, and the ranks that share it. Not thread-safe.

    Args:
        read: Name of the read, to the coordinator.
        tell: Sends a message to the coordinator.

    Attributes:
        tally: Statistics of the read.
        has_ended: True when the coordinator has ended.
    """

    def __init__(self, read: ReadId, tell: Callable[[object], None]) -> None:
        self._read = read
        self._tell = tell
        self._slots: list[_SharedSlot] = []
        self._slot_reads: Sequence[SlotRead] = ()
        self._ranks: dict[int, _Rank] = {}
        self._segments: dict[int, tuple[MapSegment, SegmentMemory]] = {}
        self._numbers = itertools.count(1)
        self._awaited: dict[int, None] = {}  # slot reads that ranks wait for, in the order of their demands
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
        self._from_rank: dict[type, Callable[[_Rank, Any], None]] = {
            Demand: self._demand,
            SlotTaken: _ignore,
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
        self._slots = [_SharedSlot() for _ in slot_reads]
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
        self._ranks[number] = _Rank(read, post, subscription)
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
            for index in {*rank.indices, *rank.leases.values()}:
                self._done(number, index)
            self._pass_on_demands()

    def overdue(self, timeout_s: float) -> set[int]:
        """Returns the ranks that keep memory for which others have waited longer than ``timeout_s``."""
        now = time.monotonic()
        waited = [slot for slot in self._slots if slot.demanded_s is not None and slot.arrived is None]
        if not any(now - slot.demanded_s > timeout_s for slot in waited if slot.demanded_s is not None):
            return set()
        return {number for number, rank in self._ranks.items() if rank.holds and not rank.waits_for}

    # -- from the coordinator

    def from_coordinator(self, message: object, memory: SegmentMemory | None = None) -> None:
        """Take a message of the coordinator."""
        if isinstance(message, MapSegment):
            assert memory is not None, "a segment comes with its memory"
            self._segments[message.segment] = message, memory
            for rank in self._ranks.values():
                rank.post(message, memory)
        else:
            self._from_coordinator[type(message)](message)

    def map_segments(self, number: int) -> None:
        """Tell a rank of the segments that were made before it came."""
        for message, memory in self._segments.values():
            self._ranks[number].post(message, memory)

    def _slot_arrived(self, message: SlotArrived) -> None:
        slot = self._slots[message.slot_read]
        slot.arrived, slot.is_shared, slot.is_demanded = message, False, False
        self.tally.over_read += self._slot_reads[message.slot_read].over_read
        if not slot.kept_by:
            self._release(slot)
        elif slot.demanded_s is not None:
            self._share(message.slot_read, slot)

    def _share(self, index: int, slot: _SharedSlot) -> None:
        """Give a slot to all ranks that keep it and have not got it yet."""
        arrived = slot.arrived
        assert arrived is not None, "only what has arrived is shared"
        self._end_wait(index, slot)
        slot.is_shared = True
        for number in slot.kept_by:
            rank = self._ranks[number]
            if index not in rank.holds:
                lease = next(self._numbers)
                rank.leases[lease] = index
                rank.holds[index] = lease
                rank.waits_for.discard(index)
                rank.post(SlotArrived(rank.read, rank.places[index], lease, arrived.segment, arrived.offset), None)

    def _slot_failed(self, message: SlotFailed) -> None:
        slot = self._slots[message.slot_read]
        slot.is_demanded = False
        self._end_wait(message.slot_read, slot)
        # Memory that is short now may be there when it is asked for again; all else fails for everyone.
        is_final = not isinstance(message.error, ArenaExhausted)
        for number in [*slot.kept_by]:
            rank = self._ranks[number]
            rank.waits_for.discard(message.slot_read)
            rank.post(SlotFailed(rank.read, rank.places[message.slot_read], message.error), None)
            if is_final:
                slot.kept_by.discard(number)

    def _recall(self, message: Recall) -> None:
        slot = self._slots[message.slot_read]
        if slot.arrived is None or slot.arrived.lease != message.lease:
            return
        if slot.is_shared:
            self._tell(SlotTaken(message.lease))
        else:
            self._release(slot)

    def _unmap(self, message: UnmapSegment) -> None:
        self._segments.pop(message.segment, None)
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

    def _number_of(self, rank: _Rank) -> int:
        return rank.read.caller

    def _demand(self, rank: _Rank, message: Demand) -> None:
        index = rank.indices[message.slot_read]
        slot = self._slots[index]
        slot.kept_by.add(self._number_of(rank))  # it may have been done with it, and want it once more
        if slot.arrived is not None:
            self._share(index, slot)
        else:
            rank.waits_for.add(index)
            if slot.demanded_s is None:
                slot.demanded_s = time.monotonic()
                self._awaited[index] = None

    def _give_back(self, rank: _Rank, message: GiveBack) -> None:
        index = rank.leases.pop(message.lease, None)
        if index is None:
            return
        if rank.holds.get(index) == message.lease:
            del rank.holds[index]
        self._done(self._number_of(rank), index)

    def _discard(self, rank: _Rank, message: Discard) -> None:
        for place in range(message.start, message.stop):
            index = rank.indices[place]
            lease = rank.holds.get(index)
            if lease is None:
                self._done(self._number_of(rank), index)
            else:  # it answers by giving back, unless a consumer has it
                rank.post(Recall(rank.read, place, lease), None)

    def _close_read(self, rank: _Rank, _: CloseRead) -> None:
        rank.is_closed = True
        for index in rank.indices:
            if index not in rank.holds:
                self._done(self._number_of(rank), index)

    # -- slots

    def _done(self, number: int, index: int) -> None:
        """Note that a rank is done with a slot read; the last one of them lets its memory go."""
        if index >= len(self._slots):  # the coordinator has ended
            return
        slot = self._slots[index]
        if number not in slot.kept_by:
            return
        slot.kept_by.discard(number)
        if slot.kept_by:
            return
        self._end_wait(index, slot)
        if slot.arrived is not None:
            self._release(slot)
        else:
            self._tell(Discard(self._read, index, index + 1))

    def _release(self, slot: _SharedSlot) -> None:
        arrived, slot.arrived = slot.arrived, None
        if arrived is not None:
            self._tell(GiveBack(arrived.lease))
        slot.is_shared = False

    def _end_wait(self, index: int, slot: _SharedSlot) -> None:
        slot.demanded_s = None
        self._awaited.pop(index, None)

    def _pass_on_demands(self) -> None:
        """Tell the coordinator what is waited for, unless a rank is about to give memory back."""
        is_any_at_work = any(rank.holds and not rank.waits_for for rank in self._ranks.values())
        for index in () if is_any_at_work else self._awaited:
            slot = self._slots[index]
            if not slot.is_demanded and slot.arrived is None:
                slot.is_demanded = True
                self._tell(Demand(self._read, index))


def _ignore(_: _Rank, __: object) -> None:
    pass
