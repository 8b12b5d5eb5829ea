"""Messages between the leader of a host and its members, besides those of :mod:`mpreader.pool.requests`.

::

    member                                                            leader
    the token, as raw bytes ─────────────────────────────────────────►  who can't say it is told nothing
    Join(need): what this rank is going to read ─────────────────────►
                 ◄────────────────────────────────────────────────────  Joined(answer, slot reads), with the board
    Demand, SlotTaken, GiveBack, Discard, CloseRead ─────────────────►
                 ◄────────────────────────────────────────────────────  MapSegment, SlotArrived, Recall, SlotFailed, …
                 ◄────────────────────────────────────────────────────  HostStats, once a second: the leader is alive
"""

from __future__ import annotations

from typing import Any, NamedTuple

from mpreader.errors import PoolError
from mpreader.pool.requests import ReadId, SlotRead
from mpreader.pool.stats import PoolStats

__all__ = ["HostLost", "HostStats", "Join", "Joined", "SharedRead", "Subscription"]


class HostLost(PoolError):
    """The host's shared read has ended for this rank before the rank was done, which can read the rest by itself."""


class Join(NamedTuple):
    """A rank takes part.

    Attributes:
        need: What it is going to read, in the words of whoever plans the read; must be pickled.
    """

    need: Any


class Subscription(NamedTuple):
    """The part of a shared read that one rank takes.

    Attributes:
        answer: What the planner has to say to the rank; must be pickled.
        indices: Indices of the rank's slot reads among those of the shared read, in the order in which it takes them.
        sources: Indices of the rank's sources among those of the shared read, in the order in which it knows them.
    """

    answer: Any
    indices: tuple[int, ...]
    sources: tuple[int, ...]


class SharedRead(NamedTuple):
    """A read that several ranks take together: the union of what they need, cut once.

    Attributes:
        slot_reads: Its slot reads, in the order in which all ranks take theirs.
        subscriptions: One for each rank, in the order of the needs.
        notes: Number of notes that the ranks leave for each other on the :class:`~mpreader.pool.hosts.board.Board`.
    """

    slot_reads: tuple[SlotRead, ...]
    subscriptions: tuple[Subscription, ...]
    notes: int = 0


class Joined(NamedTuple):
    """The shared read has begun. With it comes the descriptor of the board.

    Attributes:
        read: Name of the rank's own read, for all further messages.
        answer: See :class:`Subscription`.
        slot_reads: The slot reads that the rank has subscribed to; their sources are the rank's.
        place: Place of the rank among those that take part.
        ranks: Number of ranks that take part.
        max_bytes: Largest number of bytes of shared memory that the leader's pool may reserve.
        repeats: For each slot read the number of the leader's note that it was received more than once, so that ranks
            may have got different bytes.
    """

    read: ReadId
    answer: Any
    slot_reads: tuple[SlotRead, ...]
    place: int
    ranks: int
    max_bytes: int
    repeats: tuple[int, ...]


class HostStats(NamedTuple):
    """Statistics of the shared read so far. Said at least once a second, so that its absence says something, too.

    Attributes:
        stats: The statistics.
        is_last: True if it answers the rank's CloseRead: nothing more will be said.
    """

    stats: PoolStats
    is_last: bool = False
