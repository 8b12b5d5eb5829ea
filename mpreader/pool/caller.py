"""Caller: this process's end of the conversation with one coordinator.

It numbers the reads, sorts the coordinator's messages to their transfers, maps the shared memory and watches the
leases. It is the *mailbox* that the coordinator posts to. Used by the pool only; it never starts or ends a coordinator.

Threads: ``open`` is called by any thread, ``post`` and ``collect`` by the coordinator's, ``_view_of`` and ``_forget``
by a transfer under its lock. There is no lock here: every step on a dictionary is one operation, and what follows is
decided under the lock of the transfer.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from mpreader.errors import ObjectChanged, PlanError
from mpreader.pool.lease import Lease, leased_view
from mpreader.pool.requests import (
    Ended,
    GiveBack,
    HeldUp,
    OpenRead,
    ReadId,
    Recall,
    RequestCut,
    RequestEnded,
    RequestRepeated,
    ResolveSource,
    SegmentMemory,
    SlotArrived,
    SlotFailed,
    SlotRead,
    SourceName,
    VersionLearned,
)
from mpreader.pool.resolver import SourceResolver
from mpreader.pool.source import LearningSource, Source
from mpreader.pool.transfer import Transfer
from mpreader.pool.worker.messages import MapSegment, UnmapSegment

__all__ = ["Caller"]


class Caller:
    """A caller of one coordinator. Thread-safe; not usable after a fork.

    Args:
        number: Number by which the coordinator knows it.
        tell: Sends a message to the coordinator; must keep the order of each thread's messages.
    """

    def __init__(self, number: int, tell: Callable[[object], None]) -> None:
        self.number = number
        self._tell = tell
        self._resolver = SourceResolver(tell)
        self._numbers = itertools.count(1)
        self._transfers: dict[int, Transfer] = {}
        self._sources: dict[int, Sequence[Source]] = {}
        self._segments: dict[int, mmap.mmap] = {}
        self._leases: dict[int, Lease] = {}
        # Leases that have ended, and were not told of yet. ``append`` is the callback of a lease: it may run at any
        # moment, in a garbage collection, while a Ctrl-C strikes; so it wakes nobody.
        self._ended_leases: deque[Lease] = deque()
        self._waited_s = 0.0  # by the consumers of transfers that are closed
        self._receivers: dict[type, Callable[[Any], None]] = {
            SlotArrived: self._slot_arrived,
            RequestEnded: self._request_ended,
            Recall: self._recall,
            SlotFailed: self._slot_failed,
            ResolveSource: self._resolve,
            VersionLearned: self._version_learned,
            UnmapSegment: self._unmap,
            RequestRepeated: self._request_repeated,
            RequestCut: self._request_cut,
            HeldUp: self._held_up,
            Ended: self._ended,
        }

    # -- for the pool

    def open(
        self, sources: Sequence[Source], slot_reads: Sequence[SlotRead], *, grows: bool = False
    ) -> tuple[Transfer, OpenRead]:
        """Make a transfer, and the message that begins it, which is the pool's to send.

        Args:
            sources: The objects.
            slot_reads: Reads of these objects, in the order in which they will be taken.
            grows: Go beyond the limit of shared memory rather than fail.

        Raises:
            PlanError: A slot read has no parts, or one that doesn't lie within the slot.
        """
        for slot_read in slot_reads:
            _check(slot_read)
        read = ReadId(self.number, next(self._numbers))
        names: tuple[SourceName, ...] = tuple(map(_name_of, sources))
        transfer = Transfer(read, names, slot_reads, self._tell, self._view_of, self._forget)
        message = OpenRead(read, names, tuple(slot_reads), grows)
        self._sources[read.number] = sources
        self._transfers[read.number] = transfer  # last: only a transfer that the pool gets is closed
        return transfer, message

    @property
    def waited_s(self) -> float:
        """Seconds that consumers have waited for bytes, summed over their threads."""
        return self._waited_s + sum(transfer.tally.seconds for transfer in list(self._transfers.values()))

    # -- for the coordinator

    def post(self, message: object, memory: SegmentMemory | None = None) -> None:
        """Take in a message of the coordinator; with a MapSegment comes its ``memory``."""
        receive = self._receivers.get(type(message))
        if receive is not None:
            receive(message)
        elif isinstance(message, MapSegment) and memory is not None:
            self._segments[message.segment] = memory.map
        else:
            raise TypeError(f"no message for a caller: {message!r}")

    def collect(self) -> list[GiveBack]:
        """Messages that are ready, but that nobody was woken for: the leases that have ended."""
        ended = []
        with contextlib.suppress(IndexError):  # empty: a garbage collection in between may have taken some of them
            while True:
                ended.append(self._ended_leases.popleft())
        return [GiveBack(lease.number) for lease in ended if self._leases.pop(lease.number, None) is not None]

    # -- messages

    def _slot_arrived(self, message: SlotArrived) -> None:
        transfer = self._transfers.get(message.read.number)
        if transfer is None:  # closed meanwhile
            self._tell(GiveBack(message.lease))
        else:
            transfer.arrived(message)

    def _slot_failed(self, message: SlotFailed) -> None:
        transfer = self._transfers.get(message.read.number)
        if transfer is not None:
            transfer.failed(message)

    def _recall(self, message: Recall) -> None:
        transfer = self._transfers.get(message.read.number)
        if transfer is not None:  # else its close has given everything back
            transfer.recall(message)

    def _resolve(self, message: ResolveSource) -> None:
        sources = self._sources.get(message.read.number)
        if sources is not None:
            self._resolver.resolve(message, sources[message.source])

    def _version_learned(self, message: VersionLearned) -> None:
        transfer = self._transfers.get(message.read.number)
        sources = self._sources.get(message.read.number)
        if transfer is None or sources is None:  # closed meanwhile
            return
        source = sources[message.source]
        if isinstance(source, LearningSource):
            try:
                source.learn(message.version)
            except ObjectChanged as error:
                transfer.fail(error.with_traceback(None))

    def _unmap(self, message: UnmapSegment) -> None:
        self._segments.pop(message.segment, None)  # views that are left keep it mapped

    def _request_ended(self, message: RequestEnded) -> None:
        transfer = self._transfers.get(message.read.number)
        if transfer is not None:
            transfer.tally.note(message.worker, message.nbytes, message.seconds)

    def _request_repeated(self, message: RequestRepeated) -> None:
        transfer = self._transfers.get(message.read.number)
        if transfer is not None:
            transfer.tally.retries += 1

    def _request_cut(self, message: RequestCut) -> None:
        transfer = self._transfers.get(message.read.number)
        if transfer is not None:
            transfer.tally.slow_cut += 1

    def _held_up(self, message: HeldUp) -> None:
        transfer = self._transfers.get(message.read.number)
        if transfer is not None:
            transfer.tally.consumer_seconds += message.seconds

    def _ended(self, message: Ended) -> None:
        for transfer in list(self._transfers.values()):
            transfer.fail(message.error)
            self._forget(transfer)
        self._resolver.close()
        self._segments.clear()

    # -- for transfers

    def _view_of(self, arrived: SlotArrived, nbytes: int) -> memoryview:
        # The segment can't be gone: the lease keeps the slot, and the coordinator unmaps no segment with slots in use.
        memory = self._segments[arrived.segment]
        view, lease = leased_view(memory, arrived.offset, nbytes, arrived.lease, self._ended_leases.append)
        self._leases[arrived.lease] = lease
        return view

    def _forget(self, transfer: Transfer) -> None:
        if self._transfers.pop(transfer.read.number, None) is not None:
            self._waited_s += transfer.tally.seconds
        self._sources.pop(transfer.read.number, None)


def _name_of(source: Source) -> SourceName:
    return SourceName(source.uri, source.bucket, source.key, source.max_attempts, source.version)


def _check(slot_read: SlotRead) -> None:
    if not slot_read.parts:
        raise PlanError("a slot read needs at least one part")
    for part in slot_read.parts:
        if not (0 <= part.start < part.end and 0 <= part.slot_offset <= slot_read.nbytes - part.kept_bytes):
            raise PlanError(f"{part} does not lie within a slot of {slot_read.nbytes} bytes")
