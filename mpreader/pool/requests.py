"""Messages between a caller and the coordinator. They are all that the two have in common.

A *caller* is whoever reads through a coordinator: today the pool of the same process, one day each rank of a host. A
*read* is an ordered list of *slot reads*; a slot read fills one slot of shared memory with one or more parts of one
object. Everything is named by numbers, objects by their URI and version, so that each message can be pickled and sent
to another process as it is.

::

    caller                                                        coordinator
    OpenRead(read, sources, slot reads) ───────────────────────►
                 ◄─────────────────────────────────────────────── ResolveSource(read, source)
    SourceResolved(read, source, version, route | error) ──────►
                 ◄─────────────────────────────────────────────── MapSegment(segment), with the memory itself
                 ◄─────────────────────────────────────────────── VersionLearned(read, source, version)
                 ◄─────────────────────────────────────────────── SlotArrived(read, slot read, lease, place)
    Demand(read, slot read): a consumer waits for it ──────────►
    SlotTaken(lease): a consumer has a view of it ─────────────►
    GiveBack(lease): nobody has a view of it any more ─────────►
                 ◄─────────────────────────────────────────────── Recall(lease): give it back, if nobody has taken it
    Discard(read, [start, stop)): nobody will take these ──────►
    CloseRead(read) ───────────────────────────────────────────►
                 ◄─────────────────────────────────────────────── SlotFailed(read, slot read, error)
                 ◄─────────────────────────────────────────────── UnmapSegment(segment): no slot of it is in use
                 ◄─────────────────────────────────────────────── RequestEnded, RequestRepeated, RequestCut, HeldUp
                 ◄─────────────────────────────────────────────── Ended(error): the last message, of all reads

A ``read`` is a ReadId; a ``slot read`` is an index among those of the read, and a ``source`` one among its sources.
Leases and segments are numbered by the coordinator. Each direction keeps its order. These rules hold the memory
together:

* A slot that was sent in ``SlotArrived`` is leased to the caller until the caller's ``GiveBack``, whatever else either
  side says meanwhile. A caller that can't use it (the read is closed, say) gives it back at once.
* ``SlotTaken`` is said as soon as a slot is handed to a consumer, asked or not. A ``Recall`` of a slot that was handed
  over is not answered; one of any other is answered by its ``GiveBack``. So the coordinator waits for one of the two.
* After ``Ended`` neither side says anything. Views that consumers hold stay valid: they keep the mapping.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple, Protocol

from mpreader.errors import MpreaderError
from mpreader.pool.source import ObjectVersion, Refusal
from mpreader.pool.worker.route import Route
from mpreader.ranges import Part

__all__ = [
    "CloseRead",
    "Demand",
    "Discard",
    "Ended",
    "GiveBack",
    "HeldUp",
    "OpenRead",
    "ReadId",
    "Recall",
    "RequestCut",
    "RequestEnded",
    "RequestRepeated",
    "ResolveSource",
    "SegmentMemory",
    "SlotArrived",
    "SlotFailed",
    "SlotRead",
    "SlotTaken",
    "SourceName",
    "SourceResolved",
    "VersionLearned",
]


class ReadId(NamedTuple):
    """Number of a read, unique within its caller, which has a number of its own."""

    caller: int
    number: int


class SourceName(NamedTuple):
    """Name of an object, as the coordinator knows it: by it errors are worded and versions compared.

    Attributes:
        uri: ``s3://bucket/key``, or an http(s) URL without its secrets.
        bucket: Bucket, or host of an http(s) source.
        key: Key, or path of an http(s) source.
        max_attempts: Requests made for the same bytes before giving up.
        version: Version to read. None: the one that there is when the read begins; the caller finds it out.
    """

    uri: str
    bucket: str
    key: str
    max_attempts: int
    version: ObjectVersion | None = None


class SlotRead(NamedTuple):
    """Work for one slot: ``parts`` of one object into ``nbytes`` of contiguous memory.

    Attributes:
        source: Index of the object among the sources of the read.
        nbytes: Bytes of the slot, at least 1.
        parts: Byte ranges to request, each received at its ``slot_offset``; at least one.
        over_read: Number of requested bytes that are gaps between what was asked for.
    """

    source: int
    nbytes: int
    parts: tuple[Part, ...]
    over_read: int = 0

    @property
    def requested_bytes(self) -> int:
        """Number of bytes of all requests; of these, parts with skips keep a few only."""
        return sum(part.size for part in self.parts)


# -- from a caller


class OpenRead(NamedTuple):
    """Begin to read ahead, in the order of ``slot_reads``.

    With ``grows`` the read may go beyond the limit of shared memory rather than fail.
    """

    read: ReadId
    sources: tuple[SourceName, ...]
    slot_reads: tuple[SlotRead, ...]
    grows: bool = False


class SourceResolved(NamedTuple):
    """The answer to a ResolveSource: version and route of a source, or why they can't be had.

    ``version`` is None where only a new route was asked for; ``route`` and ``error`` both are where a route of another
    kind was asked for, and there is none.
    """

    read: ReadId
    source: int
    version: ObjectVersion | None
    route: Route | None
    error: MpreaderError | None


class Demand(NamedTuple):
    """A consumer waits for a slot read. One demand is enough for as long as the consumer waits."""

    read: ReadId
    slot_read: int


class SlotTaken(NamedTuple):
    """A consumer has a view of a leased slot: it can't be recalled any more."""

    lease: int


class GiveBack(NamedTuple):
    """The end of a lease: no view of the slot is left, or none was ever taken."""

    lease: int


class Discard(NamedTuple):
    """No consumer will take the slot reads [start, stop), unless it demands them anew."""

    read: ReadId
    start: int
    stop: int


class CloseRead(NamedTuple):
    """The end of a read: its downloads stop. Slots that are leased are given back one by one."""

    read: ReadId


# -- to a caller (besides MapSegment and UnmapSegment, which the workers are sent, too: mpreader.pool.worker.messages)


class SegmentMemory(Protocol):
    """The memory that comes with a MapSegment.

    A caller in the coordinator's process shares the mapping, since another one would cost page faults; one in another
    process is sent the descriptor and maps that.
    """

    @property
    def fd(self) -> int:
        """Descriptor of the shared memory, the coordinator's."""

    @property
    def map(self) -> mmap.mmap:
        """Mapping of the whole segment."""


class ResolveSource(NamedTuple):
    """Find out the route, and with ``needs_version`` also the version, of a source; answered by SourceResolved.

    With ``refusal`` a route of another kind is wanted, since the server refused the last one.
    """

    read: ReadId
    source: int
    needs_version: bool
    refusal: Refusal | None = None


class SlotArrived(NamedTuple):
    """All bytes of a slot read are in shared memory, at ``offset`` of a segment. The slot is leased to the caller."""

    read: ReadId
    slot_read: int
    lease: int
    segment: int
    offset: int


class VersionLearned(NamedTuple):
    """Responses have told more of the version of a source than was known of it; comes before the bytes of them."""

    read: ReadId
    source: int
    version: ObjectVersion


class Recall(NamedTuple):
    """The coordinator wants a slot back that it has leased, if no consumer has taken it yet."""

    read: ReadId
    slot_read: int
    lease: int


class SlotFailed(NamedTuple):
    """A slot read can't be had."""

    read: ReadId
    slot_read: int
    error: MpreaderError


class RequestEnded(NamedTuple):
    """A GET for the read has ended, well or not: ``nbytes`` were received in ``seconds`` (0 if it failed)."""

    read: ReadId
    worker: int
    nbytes: int
    seconds: float


class RequestRepeated(NamedTuple):
    """A GET for the read is made again."""

    read: ReadId


class RequestCut(NamedTuple):
    """A GET for the read was much slower than others: its connection was closed, and its rest is requested again."""

    read: ReadId


class HeldUp(NamedTuple):
    """For ``seconds`` nothing was received, though more was wanted, since memory was full of what nobody had taken."""

    read: ReadId
    seconds: float


class Ended(NamedTuple):
    """The coordinator has ended: every read of the caller fails with ``error``."""

    error: MpreaderError
