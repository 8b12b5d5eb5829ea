"""State of what is being read: the sources, slot reads and parts of open reads, as the scheduler sees them.

A slot read changes its status by ``SlotReadState.move`` only, a part by ``PartState.move`` only; both refuse a change
that is not drawn here. The scheduler decides, these classes do nothing by themselves.

Slot reads::

    PENDING ──► FILLING ──► READY ────────► TAKEN     PENDING   has no memory yet
       │           │          │ │             ▲       FILLING   its parts are queued or in flight
       │           │          │ └► RECALLED ──┘       READY     all bytes are there, its slot is leased to the caller
       ▼           ▼          ▼       │               RECALLED  the caller was asked to give the slot back
    DROPPED ◄─────────────────────────┘               TAKEN     a consumer has a view
                                                      DROPPED   discarded, closed, failed or given back untaken

    TAKEN, DROPPED ──► PENDING    when a consumer demands it again; DROPPED also at the end of a recall

A slot read that is dropped while parts are in flight keeps its slot until the last of them has ended: a worker may
still write into it. A demand then makes a *new* state for the same slot read.

Parts::

    QUEUED ◄──► SENT ──────────► ENDED     SENT      a worker has it
      ▲ │         │               ▲ ▲       DELAYED   it waits for the time of its next attempt, or for a new route
      │ ▼         │               │ │       ENDED     received, failed, or dropped with its slot read
    DELAYED ◄─────┘               │ │
      └───────────────────────────┘ │
    QUEUED ─────────────────────────┘
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Final

from mpreader.errors import MpreaderError
from mpreader.pool.coordinator.arena import Slot
from mpreader.pool.coordinator.in_flight import Cut
from mpreader.pool.requests import OpenRead, SlotRead, SourceName
from mpreader.pool.source import ObjectVersion
from mpreader.pool.worker.messages import Failed, FailureKind
from mpreader.pool.worker.route import Route
from mpreader.ranges import Part

__all__ = ["PartState", "PartStatus", "Post", "ReadState", "SlotReadState", "SlotStatus", "SourceState"]

Post = Callable[[object], None]


class SlotStatus(enum.IntEnum):  # of whole numbers, since other enumerations take ten times as long to look up
    """Status of a slot read; see the module's drawing."""

    PENDING = 0
    FILLING = 1
    READY = 2
    RECALLED = 3
    TAKEN = 4
    DROPPED = 5


class PartStatus(enum.IntEnum):
    """Status of a part; see the module's drawing."""

    QUEUED = 0
    SENT = 1
    DELAYED = 2
    ENDED = 3


_SLOT_MOVES: Final[Mapping[SlotStatus, tuple[SlotStatus, ...]]] = {
    SlotStatus.PENDING: (SlotStatus.FILLING, SlotStatus.DROPPED),
    SlotStatus.FILLING: (SlotStatus.READY, SlotStatus.DROPPED),
    SlotStatus.READY: (SlotStatus.RECALLED, SlotStatus.TAKEN, SlotStatus.DROPPED),
    SlotStatus.RECALLED: (SlotStatus.TAKEN, SlotStatus.DROPPED),
    SlotStatus.TAKEN: (SlotStatus.PENDING,),
    SlotStatus.DROPPED: (SlotStatus.PENDING,),
}
_PART_MOVES: Final[Mapping[PartStatus, tuple[PartStatus, ...]]] = {
    PartStatus.QUEUED: (PartStatus.SENT, PartStatus.DELAYED, PartStatus.ENDED),
    PartStatus.SENT: (PartStatus.QUEUED, PartStatus.DELAYED, PartStatus.ENDED),
    PartStatus.DELAYED: (PartStatus.QUEUED, PartStatus.ENDED),
    PartStatus.ENDED: (),
}


class SourceState:
    """A source of a read: its version and route, as far as the caller has told them.

    Attributes:
        version: Version that is read; None until it is known.
        route: Way for the workers; None until it is known.
        error: Reason for which it can't be read; None if it can, or if that is not known yet.
        is_renewing: True while parts must wait for a new route, since the old one was refused.
        route_made: Time at which the route came, by the monotonic clock.
        route_number: Number of routes that have come.
        refusals: Kinds of refusal for which a route of another kind was asked for.
    """

    __slots__ = (
        "error",
        "is_renewing",
        "name",
        "number",
        "refusals",
        "route",
        "route_made",
        "route_number",
        "version",
    )

    def __init__(self, number: int, name: SourceName) -> None:
        self.number = number
        self.name = name
        self.version: ObjectVersion | None = name.version
        self.route: Route | None = None
        self.error: MpreaderError | None = None
        self.is_renewing = False
        self.route_made = 0.0
        self.route_number = 0
        self.refusals: set[FailureKind] = set()


class SlotReadState:
    """A slot read, its status and, while it has one, its slot.

    Attributes:
        read: Its read.
        index: Its index in the read.
        plan: The caller's order: parts and bytes.
        source: Its source.
        parts: Its parts since it was last started.
        slot: Slot that its parts are received into; None while it has none, and after the slot was taken.
        lease: Number of the lease on its slot while it is READY or RECALLED.
        open_parts: Parts that are queued, in flight or delayed. Not zero for some time after the slot read was dropped.
        is_discarded: True if it is not to be read again when it comes back from a recall.
        waits_for_views_since: Time since which only the end of a view can make room for it; None while that is not so.
    """

    __slots__ = (
        "index",
        "is_discarded",
        "lease",
        "open_parts",
        "parts",
        "plan",
        "read",
        "slot",
        "source",
        "status",
        "waits_for_views_since",
    )

    def __init__(self, read: ReadState, index: int, plan: SlotRead) -> None:
        self.read = read
        self.index = index
        self.plan = plan
        self.source = read.sources[plan.source]
        self.parts: list[PartState] = []
        self.status = SlotStatus.PENDING
        self.slot: Slot | None = None
        self.lease = 0
        self.open_parts = 0
        self.is_discarded = False
        self.waits_for_views_since: float | None = None

    def move(self, status: SlotStatus) -> None:
        """Change the status, and keep the read's list of what may be recalled.

        Raises:
            ValueError: The change is not one of those that the module draws.
        """
        if status not in _SLOT_MOVES[self.status]:
            raise ValueError(f"a slot read that is {self.status.name} can't become {status.name}")
        if self.status is SlotStatus.READY:
            self.read.ready.discard(self.index)
        elif status is SlotStatus.READY:
            self.read.ready.add(self.index)
        self.status = status


class PartState:
    """A part, its status, and how it went so far.

    Attributes:
        number: Its number, by which workers know it; never used twice.
        slot_read: Slot read that it belongs to.
        range: Bytes of the object that it asks for, and their place in the slot.
        deadline: Time at which it is given up. Set when it is first sent: the last part of a large slot read may have
            to wait for long before that.
        received: Bytes from its start that are in the slot.
        requests: All GETs made for it.
        attempts: GETs since bytes last came: only those without any progress count against ``max_attempts``.
        malformed: Those of them that a wrong answer has ended.
        crashes: Workers that died while they had it.
        cuts: Requests for it that were cut, since they were much slower than others.
        cut: How the one went that was cut last; None if there was none.
        is_resigned: True if a new route was made for it already.
        route_number: Number of its source's route by which it was last sent.
        refusal: The server's refusal of that route, while another one is looked for.
        last_failure: Reason of its last failure, for people.
    """

    __slots__ = (
        "attempts",
        "crashes",
        "cut",
        "cuts",
        "deadline",
        "is_resigned",
        "last_failure",
        "malformed",
        "number",
        "range",
        "received",
        "refusal",
        "requests",
        "route_number",
        "slot_read",
        "status",
    )

    def __init__(self, number: int, slot_read: SlotReadState, part: Part) -> None:
        self.number = number
        self.slot_read = slot_read
        self.range = part
        self.status = PartStatus.QUEUED
        self.deadline = float("inf")
        self.received = 0
        self.requests = 0
        self.attempts = 0
        self.malformed = 0
        self.crashes = 0
        self.cuts = 0
        self.cut: Cut | None = None
        self.is_resigned = False
        self.route_number = 0
        self.refusal: Failed | None = None
        self.last_failure = ""

    def move(self, status: PartStatus) -> None:
        """Change the status.

        Raises:
            ValueError: The change is not one of those that the module draws.
        """
        if status not in _PART_MOVES[self.status]:
            raise ValueError(f"a part that is {self.status.name} can't become {status.name}")
        self.status = status

    @property
    def byte_range(self) -> tuple[int, int]:
        """[start, end) of the part in the object."""
        return self.range.start, self.range.end

    @property
    def left_bytes(self) -> int:
        """Bytes that are not received yet."""
        return self.range.size - self.received


class ReadState:
    """A read that is open.

    Attributes:
        id: Its name.
        post: Posts a message to its caller.
        grows: True if it may go beyond the limit of memory rather than fail.
        sources: Its objects.
        slot_reads: Its slot reads, in the order in which they will be taken.
        cursor: Index of a slot read before which none is pending.
        ready: Indices of the slot reads that are READY, and may be recalled.
    """

    def __init__(self, message: OpenRead, post: Post) -> None:
        self.id = message.read
        self.post = post
        self.grows = message.grows
        self.sources = [SourceState(number, name) for number, name in enumerate(message.sources)]
        self.cursor = 0
        self.ready: set[int] = set()
        self.slot_reads = [SlotReadState(self, index, plan) for index, plan in enumerate(message.slot_reads)]

    def next_pending(self) -> SlotReadState | None:
        """The first slot read that waits to be started; None if there is none."""
        while self.cursor < len(self.slot_reads):
            slot_read = self.slot_reads[self.cursor]
            if slot_read.status is SlotStatus.PENDING:
                return slot_read
            self.cursor += 1
        return None
